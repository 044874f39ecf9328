"""Depth and length must not pass for a weakening, and a weakening must be found beside them."""

from __future__ import annotations

import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.plots.plot_primary_weakening import plot_primary_weakening
from secondary_sinks.sinks.sink import Evidence, Sink
from secondary_sinks.sinks.sink_map import SinkMap

LIFE = tuple(range(5, 12))
N_LAYERS, N_TOKENS = 20, 40


def invented(text, count, *, effect):
    """A text with `count` secondary sinks in layers 5 to 11, all seen in layers 6 to 12.

    The primary draws less there in every text; with `effect`, less by that for each sink.
    """
    generator = torch.Generator().manual_seed(text)
    primary = 0.5 + 0.02 * torch.randn(N_LAYERS, generator=generator)
    primary += 0.1 * torch.randn(1, generator=generator)  # a text's own
    primary[6:13] -= 0.2 + effect * count
    score = torch.full((N_LAYERS, 2, N_TOKENS), 0.01)
    score[:, :, 0] = primary[:, None]
    ones = (1.0,) * len(LIFE)
    evidence = Evidence(ones, ones, ones, (9.0,) * len(LIFE), ones, (0.01,) * len(LIFE), 9.0, 20)
    sinks = [Sink(0, "x", 1, "primary", tuple(range(1, 19)))]
    sinks += [Sink(3 + n, "y", 2, "secondary", LIFE, evidence) for n in range(count)]
    return SinkMap(
        tokens=torch.randint(9, (N_TOKENS,), generator=generator),
        token_strings=("x",) * N_TOKENS,
        n_tokens=N_TOKENS,
        model={"name": "invented", "n_layers": N_LAYERS},
        criterion="evidence",
        thresholds={},
        primary_position=0,
        phases=((1, 19),),
        sinks=tuple(sinks),
        norm=torch.ones(N_LAYERS, N_TOKENS),
        sink_score=score,
    )


def related(effect):
    maps = [invented(text, text % 7, effect=effect) for text in range(21)]
    return ss.primary_weakening(maps)


def test_what_all_texts_do_with_depth_is_no_weakening():
    found = related(effect=0.0).relation()
    assert found.pooled.rho < -0.5, "the obvious number is taken in"
    assert found.adjusted.low < 0 < found.adjusted.high
    assert found.slope_low < 0 < found.slope_high


def test_a_weakening_is_found_with_its_size():
    found = related(effect=0.03)
    for strength in ("number", "norm", "score"):
        assert found.relation(strength).adjusted.high < -0.5
        assert found.relation(strength).within_layers.high < 0
    assert found.relation().slope == pytest.approx(-0.03, abs=0.005)
    assert found.relation().slope_low < -0.03 < found.relation().slope_high
    assert found.relation("norm").slope == pytest.approx(-0.03 / 9, abs=0.001)


def test_the_attention_of_the_next_layer_shows_a_sink():
    found = ss.primary_weakening(invented(0, 3, effect=0.1))
    assert found.number[0].nonzero().flatten().tolist() == list(range(6, 13))
    assert found.norm[0, 6:13].tolist() == [27.0] * 7
    assert found.counted[0].nonzero().flatten().tolist() == list(range(2, 20))
    assert found.primary[0, 7] == pytest.approx(invented(0, 3, effect=0.1).sink_score[7, 0, 0])


def test_texts_that_do_not_differ_say_nothing():
    found = ss.primary_weakening([invented(text, 3, effect=0.1) for text in range(4)])
    assert math.isnan(found.relation().adjusted.rho)
    assert math.isnan(found.relation().slope)
    assert any("same number" in note for note in found.notes)
    alone = ss.primary_weakening(invented(0, 3, effect=0.1))
    assert math.isnan(alone.relation().adjusted.rho)
    assert any("one text" in note for note in alone.notes)
    plot_primary_weakening(alone)


def test_table_figure_and_file(tmp_path):
    found = related(effect=0.03)
    frame = found.to_frame()
    assert len(frame) == 21 * N_LAYERS
    assert found.summary().strength.tolist() == ["number", "norm", "score"]
    figure = found.plot()
    assert [axes.get_label() for axes in figure.axes][::2] == ["layers", "remainders"]
    line = next(line for line in figure.axes[2].lines if line.get_gid() == "slope")
    (x0, x1), (y0, y1) = line.get_data()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(found.relation().slope)
    back = ss.PrimaryWeakening.load(found.save(tmp_path / "found.safetensors"))
    assert back.relations == found.relations
    assert back.to_frame().equals(frame)
    with pytest.raises(ss.InputError, match="no strength"):
        found.plot(strength="size")
