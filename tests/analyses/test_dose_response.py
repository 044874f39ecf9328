"""Dose-response: what a planted vector must do at other lengths, and what is asked wrongly."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import (
    PlantedPhase,
    PlantedSink,
    planted_model,
    random_planted,
)
from secondary_sinks.sinks.controls import ordinary_tokens

SEEDS = [2, 4, 8, 13, 15]  # both architectures, one and two phases, feeders and none


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    planted = planted_model()
    model = planted.load()
    return model, ss.detect_sinks(model, planted.tokens(64))


@functools.cache
def single_dose():
    """The clean dose of one of these sinks."""
    model, sink_map = default()
    return ss.dose_response(model, sink_map, sink_map.secondary[1], [1.0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_planted_law(seed):
    """The norm follows the dose; the lifetime is the planted one as soon as there is a sink."""
    planted = random_planted(seed)
    model, tokens = planted.load(), planted.tokens(64)
    sink_map = ss.detect_sinks(model, tokens)
    expected = planted.truth(tokens).sinks[0]
    scales = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    curve = ss.dose_response(model, sink_map, expected.position, scales, progress=False)
    assert (curve.writer, curve.writer_rule) == (expected.writer, "largest_write")
    # Half of a weak vector may draw too little to be a sink.
    assert curve.lifetime.tolist()[:2] in ([0, 0], [0, expected.lifetime])
    assert curve.lifetime.tolist()[2:] == [expected.lifetime] * 4
    assert curve.is_sink[2:, expected.onset].all()
    clean = curve.written_norm[2]
    assert clean == pytest.approx(expected.norm, rel=0.02)
    torch.testing.assert_close(curve.written_norm, torch.tensor(scales) * clean)
    # residual = rest + dose * vector, so its norm is off the written one by the rest at most.
    norm = curve.norm[:, expected.onset]
    assert ((norm - curve.written_norm).abs() <= norm[0] * 1.001).all()
    # Linear along the sink direction, of which the norm is the hypotenuse with a fixed side.
    second_difference = (norm**2).diff(n=3)
    assert second_difference.abs().max() < 1e-3 * float((norm**2).max())
    assert (curve.score.diff() > -1e-4).all()
    assert curve.score_correlation.rho > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_planted_law_of_a_sink_that_fades(architecture):
    """Every layer takes off the same length, so the lifetime grows with the dose."""
    sinks = (
        PlantedSink(token=9, writer=3, norm=80, lifetime=4, fades=True),
        PlantedSink(token=12, writer=4, norm=150, lifetime=5, fades=True, feeders=(1, 2)),
    )
    phase = PlantedPhase(start=1, end=15, norm=400)
    planted = planted_model(
        n_layers=16, phases=(phase,), secondary=sinks, architecture=architecture
    )
    model, tokens = planted.load(), planted.tokens(64)
    sink_map = ss.detect_sinks(model, tokens)
    for expected in planted.truth(tokens).sinks:
        curve = ss.dose_response(model, sink_map, expected.position, progress=False)
        assert curve.writer == expected.writer
        lived = [math.ceil(dose * expected.lifetime) for dose in curve.scales.tolist()]
        lived = [n if n >= sink_map.thresholds["min_lifetime"] else 0 for n in lived]
        assert curve.lifetime.tolist() == [min(n, phase.end - expected.onset) for n in lived]
        assert curve.lifetime_correlation.rho > 0.98
        taken_off = expected.norm / expected.lifetime
        falls = -curve.norm[-1, expected.onset : expected.onset + 6].diff()
        torch.testing.assert_close(falls, torch.full((5,), taken_off), rtol=0.02, atol=0.0)


@pytest.mark.slow
def test_the_clean_dose_is_the_clean_sink():
    _, sink_map = default()
    sink, curve = sink_map.secondary[1], single_dose()
    assert (curve.kind, curve.layers) == ("secondary", sink.layers)
    assert curve.is_sink[0].nonzero().flatten().tolist() == list(sink.layers)
    torch.testing.assert_close(curve.norm[0], sink_map.norm[:, sink.position], rtol=1e-4, atol=1e-4)
    assert curve.score.item() == pytest.approx(sink.sink_score, rel=1e-3)
    assert math.isnan(curve.score_correlation.rho)  # one point has no order
    assert repr(curve) == (
        f"DoseResponse({sink.token!r} at {sink.position}, MLP 4, 1 dose of 1: no correlation with "
        "score, no correlation with lifetime)"
    )


@pytest.mark.slow
def test_total_scores():
    model, sink_map = default()
    sink = sink_map.secondary[0]
    curve = ss.dose_response(model, sink_map, sink, totals=True, progress=False)
    assert len(curve.scales) == 21
    known = ~torch.isnan(curve.total)
    assert curve.scales[known].tolist() == [0.0, 0.625, 1.25, 1.875, 2.5]
    torch.testing.assert_close(curve.total[known], curve.score[known], rtol=0.1, atol=0.02)
    full = ss.dose_response(
        model,
        sink_map,
        sink,
        [0.0, 1.0],
        writer=curve.writer,
        totals=True,
        method="full",
        progress=False,
    )
    assert (full.provenance.engine, full.writer_rule) == ("full", "given")
    assert full.total[1].item() == pytest.approx(sink.sink_score, rel=1e-3)
    torch.testing.assert_close(full.norm[1], curve.norm[8], rtol=1e-3, atol=1e-3)


def test_seeds_and_positions():
    model, sink_map = default()
    sink = sink_map.secondary[0]
    scales = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3]
    by_sink = ss.dose_response(model, sink_map, sink, scales, seed=1)
    by_position = ss.dose_response(model, sink_map, sink.position, scales, seed=1)
    assert by_sink.lifetime_correlation == by_position.lifetime_correlation
    assert torch.equal(by_sink.written_norm, by_position.written_norm)
    assert by_sink.provenance.seed == 1


def test_another_layer_than_the_writer_changes_little():
    model, sink_map = default()
    sink = sink_map.secondary[0]
    curve = ss.dose_response(model, sink_map, sink, writer=sink.l_start + 1)
    assert set(curve.lifetime.tolist()) == {sink.lifetime}
    assert math.isnan(curve.lifetime_correlation.rho)
    assert curve.norm[:, sink.l_start].std() < 1e-3


def test_a_token_that_is_not_a_sink_is_measured_and_not_called_one():
    model, sink_map = default()
    position = int(ordinary_tokens(sink_map)[20:].nonzero()[0]) + 20
    curve = ss.dose_response(model, sink_map, position, [0.0, 1.0, 2.0], totals=True)
    assert (curve.kind, curve.position) == ("chosen", position)
    assert curve.layers == sink_map.select(position)[0].layers
    assert curve.lifetime.tolist() == [0, 0, 0]
    assert curve.norm.isfinite().all()
    assert (curve.score < sink_map.secondary[0].sink_score / 5).all()
    assert math.isnan(curve.saturation_dose)
    assert repr(curve).startswith(f"DoseResponse({curve.token!r} at {position}, not a sink, MLP ")
    assert "not a sink" in {text.get_text().split(", ")[-1] for text in curve.plot().texts}


@pytest.mark.parametrize(
    ("scales", "lifetime", "expected"),
    [
        ([0.0, 0.5, 1.0, 2.0], [0, 4, 4, 4], 0.5),
        ([2.0, 1.0, 0.5, 0.0], [4, 4, 4, 0], 0.5),  # in any order
        ([0.0, 0.5, 1.0, 2.0], [4, 4, 4, 4], 0.0),
        ([0.25, 0.5, 0.75, 1.0], [4, 3, 4, 4], 0.75),  # as often as it differs before
        ([0.0, 0.5, 1.0, 2.0], [0, 3, 4, 5], math.inf),
        ([0.0, 0.5, 2.0], [0, 4, 4], math.nan),
        ([0.0, 1.0, 2.0], [0, 0, 4], math.nan),  # not a sink at the clean dose
    ],
)
def test_saturation_dose(scales, lifetime, expected):
    curve = single_dose()
    is_sink = torch.arange(len(curve.is_sink[0])) < torch.tensor(lifetime)[:, None]
    curve = dataclasses.replace(curve, scales=torch.tensor(scales), is_sink=is_sink)
    assert curve.saturation_dose == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
def test_table_figure_and_file(tmp_path):
    model, sink_map = default()
    curve = ss.dose_response(model, sink_map, sink_map.secondary[0], totals=True, progress=False)
    frame = curve.to_frame()
    assert frame.scale.tolist() == curve.scales.tolist()
    assert frame.lifetime.tolist() == curve.lifetime.tolist()
    assert frame.total_score.notna().sum() == 5
    assert repr(curve).startswith("DoseResponse('t9' at ")
    assert "<table" in curve._repr_html_()
    figure = curve.plot()
    assert [axes.get_label() for axes in figure.axes] == [
        "direct_score",
        "norm",
        "alignment",
        "lifetime",
    ]
    line = figure.axes[1].lines[0]
    assert list(line.get_xdata()) == pytest.approx(curve.written_norm.tolist())
    with pytest.raises(ss.InputError, match="panel"):
        curve.plot(panel=0)
    loaded = ss.DoseResponse.load(curve.save(tmp_path / "curve.safetensors"))
    assert loaded.to_frame().equals(frame)
    assert loaded.score_correlation == curve.score_correlation
    assert (loaded.layers, loaded.provenance) == (curve.layers, curve.provenance)


def test_bad_input(tiny):
    model, sink_map = default()
    sink = sink_map.secondary[0]
    with pytest.raises(ss.InputError, match="scales is empty"):
        ss.dose_response(model, sink_map, sink, [])
    with pytest.raises(ss.InputError, match="scales contains inf"):
        ss.dose_response(model, sink_map, sink, [1.0, math.inf])
    with pytest.raises(ss.InputError, match="sinks contains 64; a position is"):
        ss.dose_response(model, sink_map, 64)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.dose_response(model, sink_map, dataclasses.replace(sink, position=50))
    with pytest.raises(ss.InputError, match="writer 12 is out of range"):
        ss.dose_response(model, sink_map, sink, writer=12)
    with pytest.raises(ss.InputError, match="the sink map was measured in"):
        ss.dose_response(tiny("llama"), sink_map, sink)
    with pytest.raises(ss.InputError, match="expected a sink map, got Tensor"):
        ss.dose_response(model, sink_map.tokens, sink)
