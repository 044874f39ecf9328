"""What `check_model` says of models that work, that lack something, and that are broken."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss

ORDER = [
    "model",
    "sites",
    "other sites",
    "residual identity",
    "weights",
    "tokenizer",
    "streamed attention",
    "detection",
    "attention-only check",
    "full passes",
    "cached rows",
    "packed rows",
    "memory",
]


def by_name(check):
    return {line.what: line for line in check.checks}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_everything_works_on_a_usual_model(tiny, name, tmp_path):
    model = tiny(name)
    before = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    check = ss.check_model(model)
    assert [line.what for line in check.checks] == ORDER
    assert check.passed
    # Attention alone judges nothing within a window of 8 tokens.
    refused = ["attention-only check"] if name == "gemma3" else []
    assert [line.what for line in check.checks if line.outcome == "refused"] == refused
    n_ok = f"{13 - len(refused)} of 13 ok"
    assert repr(check).startswith(f"ModelCheck('{model.cfg.model_name}', {n_ok}")
    assert check.to_frame().columns.tolist() == ["what", "outcome", "detail"]
    assert "allowed 1e-04" in by_name(check)["cached rows"].detail
    assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == before
    assert ss.ModelCheck.load(check.save(tmp_path / "check.safetensors")) == check


def test_a_fast_path_that_does_not_exist_is_refused_and_the_model_passes(make_tiny):
    # GPT-J ignores edits of its scores, so rows cannot be masked.
    check = ss.check_model(make_tiny("gptj"))
    lines = by_name(check)
    assert check.passed
    assert lines["packed rows"].outcome == "refused"
    assert "packed rows are wrong" in lines["packed rows"].detail
    assert lines["other sites"].outcome == "refused"
    assert "resid_mid (3 layers)" in lines["other sites"].detail


def test_blocks_that_add_something_else_fail(make_tiny):
    model = make_tiny("llama")
    model.blocks[1].original_component.register_forward_hook(
        lambda module, inputs, out: out * 1.1 if torch.is_tensor(out) else (out[0] * 1.1, *out[1:])
    )
    check = ss.check_model(model)
    lines = by_name(check)
    assert not check.passed
    assert lines["residual identity"].outcome == "failed"
    assert "layer 1" in lines["residual identity"].detail
    assert "memory" in lines, "the other checks follow"
    assert "failed: residual identity" in repr(check)


def test_a_bos_that_the_tokenizer_does_not_add_fails(make_tiny):
    model = make_tiny("llama")
    model.cfg.default_prepend_bos = True
    line = by_name(ss.check_model(model))["tokenizer"]
    assert line.outcome == "failed"
    assert line.detail.startswith("TransformerLens puts '<bos>' before a text and the tokenizer")
    model.tokenizer = None
    assert by_name(ss.check_model(model))["tokenizer"].outcome == "refused"


def test_processed_weights_and_overflow_fail(make_tiny):
    model = make_tiny("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    assert by_name(ss.check_model(model))["weights"].outcome == "failed"
    model = make_tiny("llama")
    with torch.no_grad():
        model.original_model.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    lines = by_name(ss.check_model(model))
    assert lines["detection"].outcome == "failed"
    assert "NaN or infinite" in lines["detection"].detail
    assert "full passes" not in lines


def test_memory_is_that_of_the_length_asked_for(tiny):
    short, long = (
        by_name(ss.check_model(tiny("llama"), n_tokens=n))["memory"] for n in (100, 1000)
    )
    assert (short.outcome, long.outcome) == ("ok", "failed")
    assert "with 100 tokens" in short.detail
    assert long.detail == "the context holds 128 tokens, not 1,000"
    with pytest.raises(ss.InputError, match="positive integer, got 0"):
        ss.check_model(tiny("llama"), n_tokens=0)


def test_what_is_no_model_fails_with_the_reason():
    check = ss.check_model(torch.nn.Linear(2, 2))
    assert not check.passed
    assert [line.what for line in check.checks] == ["model"]
    assert "pass a TransformerLens model" in check.checks[0].detail
