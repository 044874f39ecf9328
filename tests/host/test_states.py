"""Models in other states than freshly loaded ones: right, or refused with the reason."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host import identity
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.host.precision import tolerance
from secondary_sinks.intervene import self_test
from secondary_sinks.observe import streaming_check
from secondary_sinks.planted.planted_model import planted_model

N = 24
ROWS = [ss.Intervention("mlp_out", 1, 5, ss.Zero()), ss.Intervention("z", 2, 9, ss.Scale(2.0))]


def numbers(model, tokens):
    """Residual norms and sink scores both ways, and rows of every engine."""
    values = {}
    for path in ("eager", "streaming"):
        collectors = [ss.ResidualNorms(), ss.SinkScores(min_queries=1)]
        traced = ss.trace(model, tokens, collectors, attention=path)
        values |= {f"{path} {name}": traced[name] for name in ("ResidualNorms", "SinkScores")}
    sink_map = ss.detect_sinks(model, tokens, primary=0)
    for method in ("cached", "packed", "full"):
        rows = ss.counterfactuals(model, sink_map, ROWS, method=method, progress=False)
        values |= {f"{method} norm": rows.norm, f"{method} score": rows.direct_score}
    assert not any(value.requires_grad for value in values.values())
    return values


def assert_same(values, expected, rtol=1e-5):
    assert values.keys() == expected.keys()
    for name, value in values.items():
        size = float(expected[name].nan_to_num(0).abs().max())
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=0,
            atol=rtol * size,
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.fixture(scope="module")
def expected(make_tiny, tokens_of):
    return numbers(make_tiny("llama"), tokens_of(N))


def test_within_inference_mode(make_tiny, tokens_of, expected):
    model = make_tiny("llama")
    with torch.inference_mode():
        assert_same(numbers(model, tokens_of(N)), expected)
    assert_same(numbers(model, tokens_of(N)), expected)  # what it left behind is usable


def test_loaded_under_inference_mode(make_tiny, tokens_of, expected):
    with torch.inference_mode():
        model = make_tiny("llama")
    assert_same(numbers(model, tokens_of(N)), expected)


def test_trainable_weights_in_training_mode_get_no_gradient(make_tiny, tokens_of, expected):
    model = make_tiny("llama").requires_grad_(True)
    model.train()
    with torch.enable_grad():
        assert_same(numbers(model, tokens_of(N)), expected)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_and_inference_mode():
    planted = planted_model(n_layers=8)

    def scan(model):
        clean, corrupted = (ss.detect_sinks(model, planted.tokens(32, seed=n)) for n in (0, 5))
        sink = clean.secondary[0]
        return ss.patch_activations(model, clean, corrupted, sink, scan="attribution").value

    model = planted.load()
    expected = scan(model)
    with torch.inference_mode():
        torch.testing.assert_close(scan(model), expected)
        loaded_within = planted.load()
    with pytest.raises(ss.ModelError, match=r"loaded within torch\.inference_mode.*scan exactly"):
        scan(loaded_within)


@pytest.mark.slow
def test_compiled_modules(hf_model, wrap, tokens_of, expected):
    """Compiled, and run once without hooks, before it is measured."""
    hf = hf_model("llama")
    for layer in hf.model.layers:
        layer.self_attn.compile(backend="eager")
    hf(tokens_of(N)[None])
    assert_same(numbers(wrap(hf), tokens_of(N)), expected)


def test_what_torch_compile_wraps_is_refused(hf_model, make_tiny, tokens_of):
    with pytest.raises(ss.ModelError, match=r"torch\.compile.*model\._orig_mod"):
        ss.trace(torch.compile(make_tiny("llama")), tokens_of(N), [ss.ResidualNorms()])
    with pytest.raises(ss.LoadError, match=r"torch\.compile.*model\._orig_mod"):
        ss.load_model(torch.compile(hf_model("llama")))


def test_checks_are_repeated_where_the_precision_has_changed(make_tiny, tokens_of, expected):
    model = make_tiny("llama")
    numbers(model, tokens_of(N))
    identity.check_residual_identity(model)
    model.half()
    assert_same(numbers(model, tokens_of(N)), expected, rtol=tolerance(model))
    identity.check_residual_identity(model)
    for checks, n in (
        (identity._largest_errors, 2),
        (streaming_check._checks, 2),
        (self_test._tested, 4),
    ):
        assert len(checks[model]) == n
        assert {torch.float32, torch.float16} == {
            key[-1] if isinstance(key, tuple) else key for key in checks[model]
        }
    sink_map = ss.detect_sinks(model, tokens_of(N), primary=0)
    assert sink_map.provenance.model.dtype == "float16"


def test_an_overflow_does_not_hide_a_broken_identity(make_tiny):
    model = make_tiny("llama")
    layers = model.original_model.model.layers
    with torch.no_grad():
        layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    assert check_residual_identity(model) == torch.inf
    assert model not in identity._largest_errors or not identity._largest_errors[model]
    model.blocks[1].original_component.register_forward_hook(
        lambda module, inputs, out: out * 1.1 if torch.is_tensor(out) else (out[0] * 1.1, *out[1:])
    )
    with pytest.raises(ss.ModelError, match="layer 1"):
        check_residual_identity(model)
