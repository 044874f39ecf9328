"""Levels from maps made by hand."""

from __future__ import annotations

import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


def make_map(levels, *, n_layers=36, name="hand", tokens=None):
    sinks = [Sink(0, "<bos>", 1, "primary", tuple(range(2, 30)))]
    sinks += [
        Sink(i + 1, token, 5, "secondary", tuple(range(onset, onset + life)))
        for i, (onset, life, token) in enumerate(levels)
    ]
    return SinkMap(
        tokens=tokens,
        token_strings=(),
        n_tokens=100,
        provenance=Provenance(ModelInfo(name, n_layers=n_layers)),
        criterion="evidence",
        primary_position=0,
        phases=((2, 30),),
        sinks=tuple(sinks),
    )


def test_counts_and_merging():
    maps = [
        make_map([(16, 18, " "), (16, 18, " "), (16, 17, "\n")]),
        make_map([(16, 8, "1"), (20, 18, "2")]),
        make_map([]),
    ]
    levels = ss.sink_levels(maps)
    assert levels.counts == {(16, 8): 1, (16, 17): 1, (16, 18): 2, (20, 18): 1}
    assert levels.n_sinks == 5
    assert (levels.n_texts, levels.n_texts_with_sinks) == (3, 2)
    first = levels.levels[0]
    assert (first.onset, first.lifetime, first.lifetimes, first.n_sinks) == (16, 18, (17, 18), 3)
    assert first.tokens[0] == (" ", 2)
    assert first.n_texts == 1
    assert {(x.onset, x.lifetime) for x in levels.levels} == {(16, 18), (16, 8), (20, 18)}


def test_a_level_is_never_wider_than_max_spread():
    """A chain of neighbors is not one level: 10 and 14 differ by 4, whatever lies between."""
    maps = [make_map([(5, life, "x") for life in (10, 11, 12, 13, 14)])]
    levels = ss.sink_levels(maps, max_spread=2)
    assert len(levels.levels) > 1
    assert all(high - low <= 2 for low, high in (x.lifetimes for x in levels.levels))
    assert sum(x.n_sinks for x in levels.levels) == 5
    assert len(ss.sink_levels(maps, max_spread=0).levels) == 5
    assert len(ss.sink_levels(maps, max_spread=4).levels) == 1


def test_onsets_are_never_merged():
    levels = ss.sink_levels(make_map([(5, 10, "x"), (6, 10, "x")]), max_spread=5)
    assert {x.onset for x in levels.levels} == {5, 6}


def test_determinism_from_one_pair_to_all_different():
    same = ss.sink_levels(make_map([(5, 10, "x")] * 6))
    spread = ss.sink_levels(make_map([(onset, onset, "x") for onset in range(3, 9)]))
    halves = ss.sink_levels(make_map([(5, 10, "x"), (9, 4, "x")] * 3))
    assert same.determinism == 1
    assert spread.determinism == pytest.approx(0)
    assert halves.determinism == pytest.approx(1 - math.log(2) / math.log(6))
    assert math.isnan(ss.sink_levels(make_map([(5, 10, "x")])).determinism)


def test_no_sinks_is_a_result():
    levels = ss.sink_levels([make_map([]), make_map([])])
    assert levels.levels == ()
    assert levels.n_texts == 2
    assert len(levels.to_frame()) == 0


def test_order_of_texts_does_not_matter():
    maps = [make_map([(16, 18, " "), (7, 3, "a")]), make_map([(16, 17, " ")]), make_map([])]
    assert ss.sink_levels(maps) == ss.sink_levels(maps[::-1])


def test_a_sink_that_several_texts_share_counts_once():
    ids = torch.arange(100)
    other = torch.cat([ids[:2], torch.tensor([7]), ids[3:]])
    first = make_map([(5, 10, "x"), (6, 3, "y")], tokens=ids)  # at positions 1 and 2
    second = make_map([(5, 10, "x"), (6, 3, "z")], tokens=other)
    levels = ss.sink_levels([first, first])
    assert levels.counts == {(5, 10): 1, (6, 3): 1}
    assert (levels.n_texts, levels.n_texts_with_sinks) == (1, 1)
    assert "2 of 4 sinks" in levels.notes[0]
    levels = ss.sink_levels([first, second])
    assert levels.counts == {(5, 10): 1, (6, 3): 2}
    assert (levels.n_texts, levels.n_texts_with_sinks) == (2, 2)
    assert {level.onset: level.n_texts for level in levels.levels} == {5: 2, 6: 2}
    assert "1 of 4 sinks" in levels.notes[0]
    assert ss.sink_levels(first).notes == ()


def test_levels_of_primary_sinks_and_of_all():
    levels = ss.sink_levels([make_map([(5, 10, "x")])], sinks="primary")
    assert levels.counts == {(2, 28): 1}
    assert ss.sink_levels([make_map([(5, 10, "x")])], sinks="all").n_sinks == 2
    with pytest.raises(ss.InputError, match="sinks='noise'"):
        ss.sink_levels([make_map([])], sinks="noise")


def test_maps_of_several_names_are_noted():
    levels = ss.sink_levels([make_map([]), make_map([], name="other")])
    assert "hand, other" in levels.notes[0]


def test_levels_come_back_from_disk(tmp_path):
    levels = ss.sink_levels([make_map([(16, 18, "\n"), (16, 17, "·")])])
    assert ss.SinkLevels.load(levels.save(tmp_path / "levels.safetensors")) == levels


def test_bad_input():
    with pytest.raises(ss.InputError, match="expected sink maps, got none"):
        ss.sink_levels([])
    with pytest.raises(ss.InputError, match="layers"):
        ss.sink_levels([make_map([]), make_map([], n_layers=24)])
    with pytest.raises(ss.InputError, match="max_spread"):
        ss.sink_levels([make_map([])], max_spread=-1)


def test_the_published_run_is_one_level(tmp_path):
    """Qwen3-4B-Base as published: 21 secondary sinks, all with onset 16 and lifetime 18."""
    import json

    lines = [
        {
            "candidate_sinks": {
                "0": {"layer": list(range(6, 35)), "token_id": 9, "sink_type": "bos_sink"},
                **{
                    str(100 + i): {
                        "layer": list(range(16, 34)),
                        "token_id": 220,
                        "sink_type": label,
                    }
                    for i in range(count)
                },
            },
            "sample_index": index,
            "prompt_len": 1,
            "response_len": 2,
            "full_text_len": 3,
        }
        for index, (count, label) in enumerate([(6, "cliff"), (5, "secondary"), (10, "secondary")])
    ]
    path = tmp_path / "qwen3.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    levels = ss.sink_levels(ss.read_published(path))
    assert [(x.onset, x.lifetime, x.n_sinks) for x in levels.levels] == [(16, 18, 21)]
    assert levels.determinism == 1
