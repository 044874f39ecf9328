"""Norms are those of the activations; sinks have long residuals, in Qwen short keys and values."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.cli.detect import demo_messages
from secondary_sinks.sinks.controls import ordinary_tokens


def test_norms_are_those_of_the_activations(tiny, family, tokens_of):
    """Checked on every family: sites of keys and values exist and fire everywhere."""
    model, tokens = tiny(family), tokens_of(24)
    sink_map = ss.detect_sinks(model, tokens)
    profiles = ss.norm_profiles(model, sink_map)
    traced = ss.trace(model, tokens, [ss.Norms("k"), ss.Norms("v"), ss.ResidualNorms()])
    for part, norm in (
        ("key", traced["k_norm"].mean(dim=1)),
        ("value", traced["v_norm"].mean(dim=1)),
        ("residual", traced["ResidualNorms"]),
    ):
        curves = profiles.curves(part)
        assert torch.equal(curves.primary, norm[:, sink_map.primary_position])
        low, median, high = curves.ordinary
        assert (low <= median).all()
        assert (median <= high).all()
        assert (low >= norm.min(dim=1).values).all()
        assert (high <= norm.max(dim=1).values).all()


@pytest.mark.slow
def test_planted_norms():
    planted = ss.planted_model()
    model, tokens = planted.load(), planted.tokens(64)
    profiles = ss.norm_profiles(model, ss.detect_sinks(model, tokens))
    truth = planted.truth(tokens).sinks
    for row, (expected, sink) in enumerate(zip(truth, profiles.sinks, strict=True)):
        assert expected.position == sink.position
        alive = profiles.residual.sinks[row, expected.onset : expected.onset + expected.lifetime]
        torch.testing.assert_close(alive, torch.full_like(alive, expected.norm), rtol=0.05, atol=1)
    assert (profiles.ratio("residual") > 10).all()


@pytest.mark.slow
def test_a_text_without_secondary_sinks(tmp_path):
    planted = ss.planted_model(secondary=())
    model = planted.load()
    profiles = ss.norm_profiles(model, ss.detect_sinks(model, planted.tokens(40)))
    assert profiles.sinks == ()
    assert profiles.ratio("key").shape == (0,)
    assert set(profiles.to_frame().kind) == {"primary", "ordinary"}
    profiles.plot()
    back = ss.NormProfiles.load(profiles.save(tmp_path / "norms.safetensors"))
    assert back.to_frame().equals(profiles.to_frame())


@pytest.mark.slow
def test_other_sinks_and_a_position_that_is_no_sink():
    planted = ss.planted_model()
    model = planted.load()
    sink_map = ss.detect_sinks(model, planted.tokens(64))
    ordinary = int(ordinary_tokens(sink_map).nonzero()[9])
    sink = sink_map.secondary[0]
    profiles = ss.norm_profiles(model, sink_map, sinks=[sink.position, ordinary])
    assert [s.kind for s in profiles.sinks] == ["secondary", "chosen"]
    assert torch.equal(profiles.residual.sinks[1], sink_map.norm[:, ordinary])
    ratios = profiles.ratio("residual")
    assert 0.5 < ratios[1] < 2 < 10 < ratios[0]
    assert set(profiles.to_frame().kind) == {"primary", "secondary", "chosen", "ordinary"}
    alone = ss.norm_profiles(model, sink_map, sinks=ordinary)
    assert "1 chosen token:" in repr(alone)
    alone.plot()
    primary = ss.norm_profiles(model, sink_map, sinks="primary")
    assert torch.equal(primary.key.sinks[0], primary.key.primary)


def test_qwen_sinks_have_short_keys_and_values(qwen):
    profiles = ss.norm_profiles(qwen, ss.detect_sinks(qwen, demo_messages()))
    assert len(profiles.sinks) == 7
    assert (profiles.ratio("key") < 0.3).all()
    assert (profiles.ratio("value") < 0.4).all()
    assert (profiles.ratio("residual") > 5).all()
    life = slice(6, 22)
    secondary, primary = profiles.key.sinks[:, life], profiles.key.primary[life]
    assert ((secondary / primary).log().abs().mean(dim=1) < 0.5).all(), "keys as the primary's"
    figure = profiles.plot()
    drawn = [line for line in figure.axes[0].lines if line.get_gid() == "sink"]
    shown = torch.tensor(drawn[0].get_ydata()).isfinite().nonzero().flatten().tolist()
    assert shown == list(range(6, 23)), "keys show a life one layer later"
    with pytest.raises(ss.InputError, match="panel"):
        profiles.plot(panel=0)
