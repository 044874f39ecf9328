"""Packed rows in a `HookedTransformer`, against full passes over the whole text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import secondary_sinks as ss
from secondary_sinks.intervene import run_rows
from secondary_sinks.intervene.hooked_rows import placed_at
from secondary_sinks.planted.planted_model import random_planted

N = 24
I = ss.Intervention  # noqa: E741
SETTINGS = {
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 64,
    "n_ctx": 32,  # shorter than text and rows together
    "d_vocab": 50,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "seed": 3,
    "initializer_range": 0.4,  # large enough that attention is not uniform
}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
KINDS = {
    "learned": {},
    "rotary": ROTARY,
    "partial rotary": ROTARY | {"rotary_dim": 4},
    "adjacent rotary": ROTARY | {"rotary_adjacent_pairs": True},
    "parallel": ROTARY | {"parallel_attn_mlp": True},
    "gated": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
    "grouped": ROTARY | {"n_key_value_heads": 2},
    "local": {"use_local_attn": True, "window_size": 8, "attn_types": ["global", "local", "local"]},
    "soft-capped": {"attn_scores_soft_cap": 5.0},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "normed queries": ROTARY | {"use_qk_norm": True},
}
NAMES = ("alignment", "centered_alignment", "norm", "centered_norm", "direct_score")


def hooked_model(kind: str) -> HookedTransformer:
    return HookedTransformer(HookedTransformerConfig(**(SETTINGS | KINDS[kind]))).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (N,), generator=torch.Generator().manual_seed(0))


def full_passes(model, sink_map, rows):
    return ss.counterfactuals(model, sink_map, rows, method="full", progress=False)


def interventions(kind: str) -> list[object]:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    rows = [
        I("mlp_out", 1, 5, ss.Zero()),
        I("attn_out", 0, 7, ss.Mean()),
        I("mlp_out", 0, 20, ss.Scale(2.0)),
        I("resid_pre", 2, 9, ss.Resample(3)),
        I("resid_post", 1, 11, ss.Add(direction)),
        I("z", 1, 6, ss.Zero(), head=2),
        I("k", 1, 6, ss.Scale(2.0)),
        I("v", 1, 12, ss.Scale(3.0), head=1),
        I("mlp_post", 1, 4, ss.Zero(), neuron=3),
        (I("mlp_out", 0, 13, ss.Zero()), I("attn_out", 2, 13, ss.Scale(-1.0))),
        I("mlp_out", 0, N - 1, ss.Zero()),
        I("attn_out", 1, 0, ss.Scale(0.5)),
    ]
    if kind != "parallel":
        rows.append(I("resid_mid", 1, 8, ss.Scale(0.5)))
    return rows


def assert_close(rows, expected_rows, tolerance=1e-4):
    for name in NAMES:
        expected = getattr(expected_rows, name)
        scale = float(expected.abs().nan_to_num(0).max())
        difference = (getattr(rows, name) - expected).abs()
        assert torch.equal(torch.isnan(difference), torch.isnan(expected)), name
        assert float(difference.nan_to_num(0).max()) < tolerance * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_full(kind):
    model, rows = hooked_model(kind), interventions(kind)
    sink_map = ss.detect_sinks(model, tokens())
    packed = ss.counterfactuals(model, sink_map, rows)
    full = full_passes(model, sink_map, rows)
    assert (packed.engine, full.engine) == ("packed", "full")
    assert packed.self_test < 1e-4
    assert_close(packed, full)
    assert torch.equal(packed.is_sink, full.is_sink)


@pytest.mark.parametrize("seed", range(3))
def test_planted_models_in_both_generations(seed):
    planted = random_planted(seed)
    text = planted.tokens(64, seed=seed)
    truth = planted.truth(text)
    depth = planted.plan.n_layers
    sweep = [
        I("mlp_out", layer, sink.position, ss.Zero())
        for sink in truth.sinks
        for layer in range(depth)
    ] or [I("mlp_out", layer, 0, ss.Zero()) for layer in range(depth)]
    hooked, bridge = (
        ss.counterfactuals(model, ss.detect_sinks(model, text), sweep)
        for model in (planted.load("hooked"), planted.load("bridge"))
    )
    assert (hooked.engine, bridge.engine) == ("packed", "cached")
    torch.testing.assert_close(hooked.norm, bridge.norm, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        hooked.direct_score, bridge.direct_score, rtol=1e-3, atol=1e-4, equal_nan=True
    )
    assert torch.equal(hooked.lifetime, bridge.lifetime)
    for number, sink in enumerate(truth.sinks):
        lifetime = hooked.lifetime[number * depth : (number + 1) * depth]
        assert {sink.writer, *sink.feeders} <= set((lifetime == 0).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi"])
def test_the_model_is_as_before_also_after_an_error(kind):
    model = hooked_model(kind)
    before = model(tokens()[None])
    attributes = [set(vars(module)) for module in model.modules()]

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    sink_map = ss.detect_sinks(model, tokens())
    ss.counterfactuals(model, sink_map, [I("mlp_out", 1, 5, ss.Zero())], method="packed")
    with pytest.raises(RuntimeError, match="broken edit"):
        ss.counterfactuals(model, sink_map, [I("mlp_out", 1, 5, broken)], method="packed")
    assert torch.equal(model(tokens()[None]), before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_attribute_that_was_set_on_the_instance_is_put_back():
    model = hooked_model("learned")
    own = model.blocks[0].attn.apply_causal_mask
    model.blocks[0].attn.apply_causal_mask = own
    with placed_at(model, torch.arange(4)):
        assert model.blocks[0].attn.apply_causal_mask is not own
    assert model.blocks[0].attn.apply_causal_mask is own


def test_a_users_hooks_on_embeddings_run_in_packed_passes():
    model = hooked_model("learned")
    model.add_hook("hook_pos_embed", lambda value, hook: value * 0.5)
    rows = interventions("learned")
    sink_map = ss.detect_sinks(model, tokens())
    packed = ss.counterfactuals(model, sink_map, rows)
    assert packed.engine == "packed"
    assert_close(packed, full_passes(model, sink_map, rows))


def test_positions_that_depend_on_the_length_are_not_packed():
    model = hooked_model("rotary")
    model.cfg.use_logn_attn = True
    model.cfg.train_seq_length = 16
    sink_map = ss.detect_sinks(model, tokens())
    result = ss.counterfactuals(model, sink_map, [I("mlp_out", 1, 5, ss.Zero())])
    assert result.engine != "packed"


def test_a_wrong_engine_is_not_believed(monkeypatch):
    model = hooked_model("grouped")
    real = run_rows.run_packed

    def blind(model, clean, rows, **kwargs):
        states = real(model, clean, rows, **kwargs)
        return dataclasses.replace(states, direct_score=states.direct_score * 1.01)

    monkeypatch.setattr(run_rows, "run_packed", blind)
    rows = [I("mlp_out", 1, 5, ss.Zero())]
    sink_map = ss.detect_sinks(model, tokens())
    result = ss.counterfactuals(model, sink_map, rows, progress=False)
    assert result.engine != "packed"
    with pytest.raises(ss.ModelError, match="packed rows are wrong"):
        ss.counterfactuals(model, sink_map, rows, method="packed")


def test_resid_mid_is_what_the_hook_of_that_name_edits():
    """In a HookedTransformer; in a bridge that hook reaches the MLP alone."""
    model = hooked_model("rotary")
    sink_map = ss.detect_sinks(model, tokens())
    vector = torch.linspace(-1, 1, model.cfg.d_model)
    rows = ss.counterfactuals(model, sink_map, [I("resid_mid", 1, 5, ss.Replace(vector))])

    def replace(value, hook):
        value[:, 5] = vector
        return value

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", replace)]):
        _, cache = model.run_with_cache(tokens()[None])
    expected = torch.stack([cache["resid_post", layer][0, 5].norm() for layer in range(3)])
    torch.testing.assert_close(rows.norm[0], expected, rtol=1e-4, atol=1e-4)


def test_rows_without_an_edit_have_the_lives_of_the_map():
    planted = random_planted(0)
    model = planted.load("hooked")
    sink_map = ss.detect_sinks(model, planted.tokens(64))
    alive = torch.zeros(sink_map.n_tokens, sink_map.n_layers, dtype=torch.bool)
    for sink in sink_map.sinks:
        alive[sink.position, list(sink.layers)] = True
    unedited = [I("resid_pre", 0, p, ss.Scale(1.0)) for p in range(sink_map.n_tokens)]
    rows = ss.counterfactuals(model, sink_map, unedited)
    assert rows.engine == "packed"
    assert torch.equal(rows.is_sink, alive)
