"""The verdict on erasers, from invented numbers."""

from __future__ import annotations

import math

import pytest
import torch

from secondary_sinks.analyses.decomposition.erasers import (
    Block,
    BlockAblation,
    Erased,
    EraserVerdict,
    judge,
    leading_life,
    main_head,
    rank,
)


def without(block, lifetime, left, role="control"):
    return BlockAblation(0, block, role, lifetime, left)


def test_ranking_ends_where_the_sink_is_gone():
    mlp = torch.tensor([0.0, 100.0, 0.0, -30.0, -60.0, 900.0, -900.0])
    attention = torch.tensor([0.0, 0.0, 0.0, -5.0, 1.0, 0.0, 0.0])
    projection = torch.cat([(mlp + attention).cumsum(0)])
    ranking = rank(mlp, attention, projection, last_layer=2)
    assert [str(erased.block) for erased in ranking] == [
        "mlp 4",
        "mlp 3",
        "attention 3",
        "attention 4",
    ]
    assert [erased.length for erased in ranking] == [60, 30, 5, -1]
    assert rank(mlp, attention, projection, last_layer=6) == []
    kept = torch.full_like(projection, 100.0)
    assert rank(mlp, attention, kept, last_layer=2)[0].block == Block("mlp", 6)


def test_a_main_head_takes_at_least_half():
    five, six, less = (Erased(Block("attention", 22), length) for length in (5.0, 6.0, -1.0))
    assert main_head(torch.tensor([-1.0, -6.0, 2.0]), five) == Erased(Block("head", 22, 1), 6.0)
    assert main_head(torch.tensor([-2.0, -2.0, -2.0]), six) is None
    assert main_head(torch.tensor([-1.0, 2.0]), less) is None
    assert str(Block("head", 22, 3)) == "head 22.3"


def test_leading_life_stops_at_the_first_gap():
    alive = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)
    assert [leading_life(alive, onset) for onset in (0, 1, 2, 4)] == [0, 2, 1, 1]


def ask(rows, candidate=60.0, others=((3, 40.0),), lifetime=2):
    return judge(
        Erased(Block("mlp", 4), candidate),
        [Erased(Block("mlp", layer), length) for layer, length in others],
        whole=100.0,
        primary_share=0.4,
        ablations=[without("", lifetime, 0.1, "unedited"), *rows] if rows else [],
    )


def test_an_eraser_takes_most_and_is_needed():
    rows = [without("mlp 4", 3, 0.7, "candidate"), without("mlp 3", 2, 0.5)]
    verdict = ask(rows)
    assert (verdict.eraser, verdict.candidate, verdict.candidate_layer) == ("mlp 4", "mlp 4", 4)
    assert (verdict.share, verdict.runner_up, verdict.runner_up_share) == (0.6, "mlp 3", 0.4)
    assert (verdict.reason, verdict.primary_share, verdict.percentile) == ("", 0.4, 100)
    assert (verdict.lifetime, verdict.lifetime_without) == (2, 3)
    assert (verdict.left, verdict.left_without) == (0.1, 0.7)
    assert verdict.co_erasers == ()


def test_co_erasers_are_needed_and_take_half_as_much():
    rows = [without("mlp 4", 5, 0.7, "candidate"), without("mlp 3", 5, 0.5)]
    assert ask(rows).co_erasers == ("mlp 3",)
    assert ask(rows, others=((3, 20.0),)).co_erasers == ()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rows": []}, "not tested"),
        ({"rows": [without("mlp 4", 2, 0.7, "candidate")]}, "2 layers, with it 2 layers"),
        ({"rows": [without("mlp 4", 1, 0.7, "candidate")]}, "1 layer, with it 2 layers"),
        ({"rows": [without("mlp 4", 3, 0.7, "candidate")], "candidate": 20.0}, "only 20%"),
    ],
)
def test_tests_that_disagree_leave_no_eraser(arguments, reason):
    verdict = ask(**arguments)
    assert (verdict.eraser, verdict.candidate) == (None, "mlp 4")
    assert reason in verdict.reason
    assert verdict.co_erasers == ()


def test_a_verdict_without_tests_names_no_block():
    verdict = EraserVerdict("nothing ends it")
    assert (verdict.eraser, verdict.candidate, verdict.candidate_layer) == (None, "", -1)
    assert math.isnan(verdict.share)
