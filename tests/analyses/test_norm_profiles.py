"""Norms are the model's own; sinks have long residuals, and in Qwen short keys and values."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.cli.app import demo_messages


def test_norms_are_those_of_the_activations(tiny, family, tokens_of):
    """Checked on every family: sites of keys and values exist and fire everywhere."""
    model, tokens = tiny(family), tokens_of(24)
    sinks = ss.detect_sinks(model, tokens)
    found = ss.norm_profiles(model, tokens, sinks)
    seen = ss.trace(model, tokens, [ss.Norms("k"), ss.Norms("v"), ss.ResidualNorms()])
    for part, norm in (
        ("key", seen["k_norm"].mean(dim=1)),
        ("value", seen["v_norm"].mean(dim=1)),
        ("residual", seen["ResidualNorms"]),
    ):
        curves = found.curves(part)
        assert torch.equal(curves.primary, norm[:, sinks.primary_position])
        low, median, high = curves.ordinary
        assert (low <= median).all()
        assert (median <= high).all()
        assert (low >= norm.min(dim=1).values).all()
        assert (high <= norm.max(dim=1).values).all()


def test_planted_norms():
    planted = ss.planted_model()
    host, tokens = planted.load(), planted.tokens(64)
    found = ss.norm_profiles(host, tokens)
    truth = planted.truth(tokens).sinks
    for row, (own, sink) in enumerate(zip(truth, found.sinks, strict=True)):
        assert own.position == sink.position
        alive = found.residual.secondary[row, own.onset : own.onset + own.lifetime]
        torch.testing.assert_close(alive, torch.full_like(alive, own.norm), rtol=0.05, atol=1)
    assert (found.ratio("residual") > 10).all()


def test_a_text_without_secondary_sinks(tmp_path):
    planted = ss.planted_model(secondary=())
    found = ss.norm_profiles(planted.load(), planted.tokens(40))
    assert found.sinks == ()
    assert found.ratio("key").shape == (0,)
    assert set(found.to_frame().kind) == {"primary", "ordinary"}
    found.plot()
    back = ss.NormProfiles.load(found.save(tmp_path / "norms.safetensors"))
    assert back.to_frame().equals(found.to_frame())


def test_qwen_sinks_have_short_keys_and_values(qwen):
    found = ss.norm_profiles(qwen, demo_messages())
    assert len(found.sinks) == 7
    assert (found.ratio("key") < 0.3).all()
    assert (found.ratio("value") < 0.4).all()
    assert (found.ratio("residual") > 5).all()
    life = slice(6, 22)
    secondary, primary = found.key.secondary[:, life], found.key.primary[life]
    assert ((secondary / primary).log().abs().mean(dim=1) < 0.5).all(), "keys as the primary's"
    figure = found.plot()
    drawn = [line for line in figure.axes[0].lines if line.get_gid() == "secondary"]
    shown = torch.tensor(drawn[0].get_ydata()).isfinite().nonzero().flatten().tolist()
    assert shown == list(range(6, 23)), "keys show a life one layer later"
    with pytest.raises(ss.InputError, match="panel"):
        found.plot(panel=0)
