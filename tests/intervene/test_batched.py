"""Batched rows against full passes, also where a model cannot be masked from outside."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

import secondary_sinks as ss
from secondary_sinks.intervene import batched as engine
from secondary_sinks.intervene import chunks as module

N = 24
I = ss.Intervention  # noqa: E741
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
UNMASKABLE = ["gptj", "opt", "gpt-neo", "bloom", "mpt", "falcon-alibi"]
NOT_STREAMED = ["mpt", "falcon-alibi"]


def interventions(parallel):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    rows = [
        I("mlp_out", 1, 5, ss.Zero()),
        I("mlp_out", 2, 5, ss.Zero()),
        I("attn_out", 0, 6, ss.Mean()),
        I("mlp_out", 0, 20, ss.Scale(2.0)),
        I("resid_pre", 2, 9, ss.Resample(3)),
        I("resid_post", 1, 11, ss.Add(direction)),
        I("z", 1, 6, ss.Zero(), head=2),
        I("k", 1, 6, ss.Scale(2.0)),
        I("v", 1, 12, ss.Mean()),
        (I("mlp_out", 0, 13, ss.Zero()), I("attn_out", 2, 13, ss.Scale(-1.0))),
        I("mlp_out", 0, N - 1, ss.Zero()),
        I("attn_out", 1, 0, ss.Scale(0.5)),
        I("mlp_out", 1, 1, ss.Zero()),
    ]
    return rows if parallel else [*rows, I("resid_mid", 1, 8, ss.Resample(2))]


def assert_close(one, other, tolerance=1e-4):
    for name in ("alignment", "centered_alignment", "norm", "centered_norm", "direct_score"):
        found, expected = getattr(one, name), getattr(other, name)
        assert torch.equal(torch.isnan(found), torch.isnan(expected)), name
        difference = float((found - expected).abs().nan_to_num(0).max())
        assert difference < tolerance * float(expected.abs().nan_to_num(0).max()), name


def assert_batched_is_full(model, tokens, rows):
    batched = ss.counterfactuals(model, tokens, rows, method="batched")
    full = ss.counterfactuals(model, tokens, rows, method="full", progress=False)
    assert batched.engine == "batched"
    assert batched.self_test < 1e-4
    assert_close(batched, full)
    assert torch.equal(batched.is_sink, full.is_sink)


def test_batched_equals_full(tiny, family, tokens_of):
    assert_batched_is_full(tiny(family), tokens_of(N), interventions(family == "neox"))


@pytest.mark.parametrize("kind", UNMASKABLE)
def test_models_that_cannot_be_masked_run_without_the_text(tiny, tokens_of, kind):
    model, rows = tiny(kind), interventions(kind == "gptj")
    assert_batched_is_full(model, tokens_of(N), rows)
    cached = ss.counterfactuals(model, tokens_of(N), rows)
    assert cached.engine == ("batched" if kind in NOT_STREAMED else "cached")
    assert_close(cached, ss.counterfactuals(model, tokens_of(N), rows, method="batched"))
    with pytest.raises(ss.ModelError, match="packed rows are wrong"):
        ss.counterfactuals(model, tokens_of(N), rows[:1], method="packed")


def test_results_do_not_depend_on_the_chunks(tiny, tokens_of):
    model, tokens = tiny("gemma2"), tokens_of(N)
    rows = [I("mlp_out", layer, p, ss.Zero()) for layer in range(3) for p in range(N)]
    at_once = ss.counterfactuals(model, tokens, rows, method="batched")
    small = ss.counterfactuals(
        model, tokens, rows, method="batched", memory_budget=60_000, progress=False
    )
    assert module.chunk_size("batched", model, N, 60_000) < 10
    assert_close(small, at_once, tolerance=1e-5)
    assert_close(at_once, ss.counterfactuals(model, tokens, rows, method="packed"))


def test_copies_of_the_text_are_shared_by_tokens_that_do_not_touch():
    copies = list(engine._shared_copies([3, 4, 9, 3, 6, 9], n_tokens=10))
    assert copies == [[0, 4], [1], [3]]


def test_several_keys_in_one_softmax_are_told_apart():
    torch.manual_seed(0)
    hidden = torch.ones(8, 8).triu(1).bool()
    scores = torch.randn(2, 8, 8, dtype=torch.float64) * 3
    edited, alone = scores.clone(), scores.clone()
    edited[..., [1, 4]] += 5 * torch.randn(2, 8, 2, dtype=torch.float64)
    alone[..., 4] = edited[..., 4]
    patterns = [s.masked_fill(hidden, -torch.inf).softmax(-1) for s in (scores, edited, alone)]
    found = engine._scores_of(*(p.float() for p in patterns[:2]), torch.tensor([1, 4]))
    torch.testing.assert_close(found[1], patterns[2][:, 5:, 4].mean(dim=1).float())


def test_hooks_that_see_the_sequence_are_refused_or_run_in_full(tiny, tokens_of):
    model = tiny("gptj")
    hooks = [("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)]
    row = [I("mlp_out", 1, 5, ss.Zero())]
    with pytest.raises(ss.InputError, match="fwd_hooks"):
        ss.counterfactuals(model, tokens_of(N), row, method="batched", fwd_hooks=hooks)
    assert ss.counterfactuals(model, tokens_of(N), row, fwd_hooks=hooks).engine == "full"


def test_the_last_resort_is_the_full_pass(make_tiny, tokens_of, monkeypatch):
    model, row = make_tiny("llama"), [I("mlp_out", 1, 5, ss.Zero())]
    for name, factor in (("run_cached", 1.02), ("run_batched", 1.01)):
        real = getattr(module, name)

        def wrong(*args, real=real, factor=factor, **kwargs):
            states = real(*args, **kwargs)
            return dataclasses.replace(states, norm=states.norm * factor)

        monkeypatch.setattr(module, name, wrong)
    result = ss.counterfactuals(model, tokens_of(N), row, progress=False)
    assert result.engine == "full"
    assert result.self_test == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("length", [2, 3])
def test_very_short_texts_do_not_spoil_the_self_test(make_tiny, tokens_of, length):
    model = make_tiny("llama")
    row = [I("mlp_out", 1, 0, ss.Zero())]
    for method in ("cached", "packed", "batched"):
        short = ss.counterfactuals(model, tokens_of(length), row, method=method)
        assert short.self_test < 1e-4


def test_no_hook_is_left_when_an_edit_raises(make_tiny, tokens_of):
    model = make_tiny("llama")

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        ss.counterfactuals(model, tokens_of(N), [I("mlp_out", 1, 5, broken)], method="batched")
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("method", ["packed", "batched"])
def test_bfloat16(tiny, tokens_of, method):
    """Residuals agree to rounding; direct scores, which add up rounded weights, to a hundredth."""
    config = transformers.LlamaConfig(
        **SIZE, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=128
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    hf = hf.to(torch.bfloat16).eval()
    model = ss.load_model(hf, tokenizer=tiny("gpt2").tokenizer, progress=False)
    fast = ss.counterfactuals(model, tokens_of(N), interventions(False), method=method)
    full = ss.counterfactuals(
        model, tokens_of(N), interventions(False), method="full", progress=False
    )
    assert fast.self_test < 0.06
    torch.testing.assert_close(fast.norm, full.norm, rtol=0.03, atol=0.03)
    torch.testing.assert_close(
        fast.direct_score, full.direct_score, rtol=0.03, atol=0.003, equal_nan=True
    )
