"""Planted secondary sinks weaken the primary, by observation and when they are removed; depth and
length alone do not count as weakening."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.plots.plot_primary_weakening import plot_primary_weakening
from secondary_sinks.sinks.sink import Evidence, Sink
from secondary_sinks.sinks.sink_map import SinkMap

LIFE = tuple(range(5, 12))
N_LAYERS, N_TOKENS = 20, 40


@functools.cache
def texts():
    """Texts of one length with 0 to 5 of two planted sinks."""
    bridge = ss.planted_model().load()
    generator = torch.Generator().manual_seed(1)
    listed = []
    for count in (0, 1, 2, 3, 4, 5, 0, 2, 4):
        ids = torch.randint(20, 60, (48,), generator=generator)
        ids[0] = 0
        places = torch.randperm(34, generator=generator)[:count] + 4
        ids[places] = torch.tensor([9, 17])[torch.arange(count) % 2]
        listed.append(ids)
    return bridge, ss.detect_sinks(bridge, listed, progress=False)


@functools.cache
def removal_of(text):
    """The removal of the secondary sinks of one text."""
    bridge, maps = texts()
    return ss.remove_sinks(bridge, maps[text], n_controls=2)


@pytest.mark.slow
def test_planted_sinks_weaken_the_primary():
    _, maps = texts()
    weakening = ss.primary_weakening(maps, removals=[removal_of(2), removal_of(5)])
    assert [len(one.secondary) for one in maps] == [0, 1, 2, 3, 4, 5, 0, 2, 4]
    assert weakening.relation().adjusted.high < -0.5
    assert weakening.relation().within_layers.high < 0
    assert weakening.relation().slope_high < 0
    assert (weakening.causal.change > 0).all()
    assert (weakening.causal.change > 5 * weakening.causal.control_change.abs()).all()
    # What a sink takes by observation is of the size of what its removal gives back.
    assert 0.3 < float(-weakening.relation().slope / weakening.causal.per_sink.mean()) < 3
    assert repr(weakening).endswith("in 2 texts)")
    assert [axes.get_label() for axes in weakening.plot().axes][-1] == "removal"


def test_a_removal_must_be_of_one_of_the_texts():
    _, maps = texts()
    removal = removal_of(2)
    with pytest.raises(ss.InputError, match="another text"):
        ss.primary_weakening(maps[3], removals=removal)
    reverse = dataclasses.replace(removal, donors=tuple(p for p, _ in removal.where))
    with pytest.raises(ss.InputError, match="adds sinks"):
        ss.primary_weakening(maps, removals=[reverse])


def test_tokens_that_are_not_sinks_are_not_evidence():
    bridge, maps = texts()
    removal = ss.remove_sinks(bridge, maps[2], sinks=[40], n_controls=0)
    with pytest.raises(ss.InputError, match="edits tokens that are not secondary sinks"):
        ss.primary_weakening(maps, removals=removal)


def invented(text, count, *, effect):
    """A text with `count` secondary sinks in layers 5 to 11, all seen in layers 6 to 12.

    The primary draws less there in every text; with `effect`, less by that for each sink.
    """
    generator = torch.Generator().manual_seed(text)
    primary = 0.5 + 0.02 * torch.randn(N_LAYERS, generator=generator)
    primary += 0.1 * torch.randn(1, generator=generator)  # differs between texts
    primary[6:13] -= 0.2 + effect * count
    score = torch.full((N_LAYERS, 2, N_TOKENS), 0.01)
    score[:, :, 0] = primary[:, None]
    ones = (1.0,) * len(LIFE)
    evidence = Evidence(
        alignment=ones,
        centered_alignment=ones,
        norm=ones,
        norm_ratio=(9.0,) * len(LIFE),
        centered_norm_ratio=ones,
        sink_score=(0.01,) * len(LIFE),
        attention_ratio=9.0,
        strength=1.0,
        n_queries=20,
        delay=1,
        published_kind="secondary",
    )
    sinks = [Sink(0, "x", 1, "primary", tuple(range(1, 19)))]
    sinks += [Sink(3 + n, "y", 2, "secondary", LIFE, evidence) for n in range(count)]
    return SinkMap(
        tokens=torch.randint(9, (N_TOKENS,), generator=generator),
        token_strings=("x",) * N_TOKENS,
        n_tokens=N_TOKENS,
        provenance=Provenance(ModelInfo("invented", n_layers=N_LAYERS)),
        criterion="evidence",
        primary_position=0,
        phases=((1, 19),),
        sinks=tuple(sinks),
        norm=torch.ones(N_LAYERS, N_TOKENS),
        mean_attention=score,
    )


def related(effect):
    maps = [invented(text, text % 7, effect=effect) for text in range(21)]
    return ss.primary_weakening(maps)


def test_a_change_with_depth_in_all_texts_is_not_weakening():
    weakening = related(effect=0.0).relation()
    assert weakening.pooled.rho < -0.5, "the pooled correlation is confounded"
    assert weakening.adjusted.low < 0 < weakening.adjusted.high
    assert weakening.slope_low < 0 < weakening.slope_high


@pytest.mark.slow
def test_a_weakening_is_found_with_its_size():
    weakening = related(effect=0.03)
    for strength in ("number", "norm", "score"):
        assert weakening.relation(strength).adjusted.high < -0.5
        assert weakening.relation(strength).within_layers.high < 0
    assert weakening.relation().slope == pytest.approx(-0.03, abs=0.005)
    assert weakening.relation().slope_low < -0.03 < weakening.relation().slope_high
    assert weakening.relation("norm").slope == pytest.approx(-0.03 / 9, abs=0.001)


def test_the_attention_of_the_next_layer_shows_a_sink():
    weakening = ss.primary_weakening(invented(0, 3, effect=0.1))
    assert weakening.number[0].nonzero().flatten().tolist() == list(range(6, 13))
    assert weakening.norm[0, 6:13].tolist() == [27.0] * 7
    assert weakening.counted[0].nonzero().flatten().tolist() == list(range(2, 20))
    assert weakening.primary[0, 7] == pytest.approx(invented(0, 3, effect=0.1).sink_score[7, 0, 0])


def test_texts_that_do_not_differ_give_nan():
    weakening = ss.primary_weakening([invented(text, 3, effect=0.1) for text in range(4)])
    assert math.isnan(weakening.relation().adjusted.rho)
    assert math.isnan(weakening.relation().slope)
    assert any("same number" in note for note in weakening.notes)
    alone = ss.primary_weakening(invented(0, 3, effect=0.1))
    assert math.isnan(alone.relation().adjusted.rho)
    assert any("one text" in note for note in alone.notes)
    plot_primary_weakening(alone)


def test_table_figure_and_file(tmp_path):
    weakening = related(effect=0.03)
    frame = weakening.to_frame()
    assert len(frame) == 21 * N_LAYERS
    assert weakening.summary().strength.tolist() == ["number", "norm", "score"]
    figure = weakening.plot()
    assert [axes.get_label() for axes in figure.axes][::2] == ["layers", "remainders"]
    line = next(line for line in figure.axes[2].lines if line.get_gid() == "slope")
    (x0, x1), (y0, y1) = line.get_data()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(weakening.relation().slope)
    back = ss.PrimaryWeakening.load(weakening.save(tmp_path / "weakening.safetensors"))
    assert back.relations == weakening.relations
    assert back.provenance.seed == 0
    assert back.to_frame().equals(frame)
    with pytest.raises(ss.InputError, match="strength="):
        weakening.plot(strength="size")
