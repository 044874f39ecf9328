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

SEEDS = [0, 2, 4, 5, 6, 8, 10, 11, 13, 15]  # of those with secondary sinks


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    model = planted_model()
    host = model.load()
    return host, ss.detect_sinks(host, model.tokens(64))


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_law(seed):
    """The norm follows the dose; the lifetime is the planted one as soon as there is a sink."""
    model = random_planted(seed)
    host, tokens = model.load(), model.tokens(64)
    sinks = ss.detect_sinks(host, tokens)
    expected = model.truth(tokens).sinks[0]
    scales = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    curve = ss.dose_response(host, sinks, expected.position, scales, progress=False)
    assert curve.writer == expected.writer
    assert curve.lifetime.tolist() == [0] + [expected.lifetime] * 5
    assert curve.is_sink[1:, expected.onset].all()
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_planted_law_of_a_sink_that_fades(architecture):
    """Every layer takes off the same length, so the lifetime grows with the dose."""
    sinks = (
        PlantedSink(token=9, writer=3, norm=80, lifetime=4, fades=True),
        PlantedSink(token=12, writer=4, norm=150, lifetime=5, fades=True, feeders=(1, 2)),
    )
    phase = PlantedPhase(start=1, end=15, norm=400)
    model = planted_model(n_layers=16, phases=(phase,), secondary=sinks, architecture=architecture)
    host, tokens = model.load(), model.tokens(64)
    found = ss.detect_sinks(host, tokens)
    for expected in model.truth(tokens).sinks:
        curve = ss.dose_response(host, found, expected.position, progress=False)
        assert curve.writer == expected.writer
        lived = [math.ceil(dose * expected.lifetime) for dose in curve.scales.tolist()]
        assert curve.lifetime.tolist() == [min(n, phase.end - expected.onset) for n in lived]
        assert curve.lifetime_correlation.rho > 0.98
        taken_off = expected.norm / expected.lifetime
        falls = -curve.norm[-1, expected.onset : expected.onset + 6].diff()
        torch.testing.assert_close(falls, torch.full((5,), taken_off), rtol=0.02, atol=0.0)


def test_the_clean_dose_is_the_clean_sink():
    host, sinks = default()
    sink = sinks.secondary[1]
    curve = ss.dose_response(host, sinks, sink, [1.0])
    assert curve.layers == sink.layers
    assert curve.is_sink[0].nonzero().flatten().tolist() == list(sink.layers)
    torch.testing.assert_close(curve.norm[0], sinks.norm[:, sink.position], rtol=1e-4, atol=1e-4)
    assert curve.score.item() == pytest.approx(sink.sink_score, rel=1e-3)
    assert math.isnan(curve.score_correlation.rho)  # one point has no order


def test_total_scores():
    host, sinks = default()
    sink = sinks.secondary[0]
    curve = ss.dose_response(host, sinks, sink, totals=True, progress=False)
    assert len(curve.scales) == 21
    known = ~torch.isnan(curve.total)
    assert curve.scales[known].tolist() == [0.0, 0.625, 1.25, 1.875, 2.5]
    torch.testing.assert_close(curve.total[known], curve.score[known], rtol=0.1, atol=0.02)
    full = ss.dose_response(
        host,
        sinks,
        sink,
        [0.0, 1.0],
        writer=curve.writer,
        totals=True,
        method="full",
        progress=False,
    )
    assert full.engine == "full"
    assert full.total[1].item() == pytest.approx(sink.sink_score, rel=1e-3)
    torch.testing.assert_close(full.norm[1], curve.norm[8], rtol=1e-3, atol=1e-3)


def test_seeds_and_texts():
    host, sinks = default()
    sink = sinks.secondary[0]
    scales = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3]
    one = ss.dose_response(host, sinks, sink, scales, seed=1)
    again = ss.dose_response(host, sinks.tokens, sink.position, scales, seed=1)
    assert one.lifetime_correlation == again.lifetime_correlation
    assert torch.equal(one.written_norm, again.written_norm)
    assert one.seed == 1


def test_another_layer_than_the_writer_changes_little():
    host, sinks = default()
    sink = sinks.secondary[0]
    curve = ss.dose_response(host, sinks, sink, writer=sink.l_start + 1)
    assert set(curve.lifetime.tolist()) == {sink.lifetime}
    assert math.isnan(curve.lifetime_correlation.rho)
    assert curve.norm[:, sink.l_start].std() < 1e-3


@pytest.mark.parametrize(
    ("scales", "lifetime", "expected"),
    [
        ([0.0, 0.5, 1.0, 2.0], [0, 4, 4, 4], 0.5),
        ([2.0, 1.0, 0.5, 0.0], [4, 4, 4, 0], 0.5),  # in any order
        ([0.0, 0.5, 1.0, 2.0], [4, 4, 4, 4], 0.0),
        ([0.25, 0.5, 0.75, 1.0], [4, 3, 4, 4], 0.75),  # as often as it differs before
        ([0.0, 0.5, 1.0, 2.0], [0, 3, 4, 5], math.inf),
        ([0.0, 0.5, 2.0], [0, 4, 4], math.nan),
    ],
)
def test_saturation_dose(scales, lifetime, expected):
    host, sinks = default()
    curve = ss.dose_response(host, sinks, sinks.secondary[0], [1.0])
    is_sink = torch.arange(len(curve.is_sink[0])) < torch.tensor(lifetime)[:, None]
    curve = dataclasses.replace(curve, scales=torch.tensor(scales), is_sink=is_sink)
    assert curve.saturation_dose == pytest.approx(expected, nan_ok=True)


def test_table_figure_and_file(tmp_path):
    host, sinks = default()
    curve = ss.dose_response(host, sinks, sinks.secondary[0], totals=True, progress=False)
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
    back = ss.DoseResponse.load(curve.save(tmp_path / "curve.safetensors"))
    assert back.to_frame().equals(frame)
    assert back.score_correlation == curve.score_correlation
    assert (back.layers, back.model) == (curve.layers, curve.model)


def test_bad_input(tiny):
    host, sinks = default()
    sink = sinks.secondary[0]
    with pytest.raises(ss.InputError, match="no scales"):
        ss.dose_response(host, sinks, sink, [])
    with pytest.raises(ss.InputError, match="scales hold inf"):
        ss.dose_response(host, sinks, sink, [1.0, math.inf])
    with pytest.raises(ss.InputError, match="no secondary sink at position 1;"):
        ss.dose_response(host, sinks, 1)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.dose_response(host, sinks, dataclasses.replace(sink, position=50))
    with pytest.raises(ss.InputError, match="layer 12 is out of range"):
        ss.dose_response(host, sinks, sink, writer=12)
    with pytest.raises(ss.InputError, match="sink map is of"):
        ss.dose_response(tiny("llama"), sinks, sink)
    with pytest.raises(ss.InputError, match="one at a time"):
        ss.dose_response(host, sinks.tokens.expand(2, -1), sink)
