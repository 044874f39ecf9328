"""Contract with TransformerLens 3: both generations of models are measured alike."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import secondary_sinks as ss
from secondary_sinks.host.fingerprint import weights_fingerprint
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.host.model_info import describe
from secondary_sinks.planted.planted_model import random_planted

COLLECTORS = [
    ss.SinkScores(min_queries=1),
    ss.ResidualGeometry(),
    ss.ResidualGeometry(final_norm=True, name="hf"),
    ss.Norms("k"),
    ss.Norms("mlp_out"),
    ss.MassiveActivations(),
]


def assert_same(first: ss.Trace, second: ss.Trace) -> None:
    for name in ("SinkScores", "k_norm", "mlp_out_norm"):
        torch.testing.assert_close(first[name], second[name], equal_nan=True, rtol=1e-3, atol=1e-4)
    for name in ("ResidualGeometry", "hf"):
        actual, expected = first[name], second[name]
        torch.testing.assert_close(actual.norm, expected.norm, rtol=1e-3, atol=1e-3)
        # A massive vector that was erased leaves its rounding, whose angle means nothing.
        size = expected.norm / expected.norm.cummax(dim=0).values
        for field in ("alignment", "centered_alignment"):
            difference = (getattr(actual, field) - getattr(expected, field)) * size
            assert difference.abs().max() < 1e-3
    torch.testing.assert_close(
        first["MassiveActivations"].value,
        second["MassiveActivations"].value,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("seed", range(4))
def test_planted_models_in_both_generations(seed):
    model = random_planted(seed)
    tokens = model.tokens(64, seed=seed)
    truth = model.truth(tokens)
    hooked, bridge = model.load("hooked"), model.load("bridge")
    assert (describe(hooked).generation, describe(bridge).generation) == ("hooked", "bridge")
    assert_same(ss.trace(hooked, tokens, COLLECTORS), ss.trace(bridge, tokens, COLLECTORS))
    for loaded in (hooked, bridge):
        sink_map = ss.detect_sinks(loaded, tokens)
        assert sink_map.phases == truth.phases
        assert {(s.position, *s.level) for s in sink_map.secondary} == {
            (s.position, s.onset, s.lifetime) for s in truth.sinks
        }


def hooked_model(**kwargs) -> HookedTransformer:
    settings = {
        "n_layers": 3,
        "d_model": 32,
        "n_heads": 4,
        "d_head": 8,
        "d_mlp": 64,
        "n_ctx": 64,
        "d_vocab": 50,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 3,
    }
    return HookedTransformer(HookedTransformerConfig(**(settings | kwargs)))


KINDS = {
    "plain": {},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 8},
    "parallel": {"parallel_attn_mlp": True},
    "gated": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
    "grouped": {"n_key_value_heads": 2},
    "local": {"use_local_attn": True, "window_size": 8, "attn_types": ["global", "local", "local"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_own_hooked_transformer(kind):
    model = hooked_model(**KINDS[kind])
    assert check_residual_identity(model) < 1e-5
    tokens = torch.randint(0, 50, (24,), generator=torch.Generator().manual_seed(0))
    trace_result = ss.trace(model, tokens, COLLECTORS)
    _, cache = model.run_with_cache(tokens[None])
    for layer in range(3):
        pattern = cache["pattern", layer][0]
        resid = cache["resid_post", layer][0]
        norm = trace_result["ResidualGeometry"].norm[layer]
        torch.testing.assert_close(norm, resid.norm(dim=-1))
        # Within the window of 8, for a local layer.
        end = 8 if kind == "local" and layer > 0 else 24
        later = [pattern[:, t + 1 : t + end, t].mean(dim=1) for t in range(23)]
        expected = torch.stack(later, dim=1)
        torch.testing.assert_close(trace_result["SinkScores"][layer, :, :23], expected)
    final = model.ln_final(cache["resid_post", 2])[0]
    torch.testing.assert_close(trace_result["hf"].norm[2], final.norm(dim=-1))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_batches_with_padding_equal_single_texts():
    model = hooked_model()
    texts = [torch.randint(0, 50, (n,)) for n in (24, 9, 17)]
    together = ss.trace(model, texts, COLLECTORS, batch_size=3, progress=False)
    for text, in_batch in zip(texts, together, strict=True):
        assert_same(in_batch, ss.trace(model, text, COLLECTORS))


def test_processed_weights_are_noticed():
    model = hooked_model()
    assert describe(model).processing == ()
    model.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    assert describe(model).processing == ("writing weights centered",)
    folded = hooked_model()
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    assert describe(folded).processing == ("layer norms folded into the weights",)
    tokens = torch.arange(12)
    assert "not raw" in ss.detect_sinks(folded, tokens).notes[0]


def test_an_unknown_hook_is_an_error_and_not_silence():
    """TransformerLens 3.9 ignores hook names that it does not know."""
    with pytest.raises(ss.ModelError, match="mlp_pre_linear"):
        ss.trace(hooked_model(), torch.arange(12), [ss.Norms("mlp_pre_linear")])
    with pytest.raises(ss.ModelError, match="resid_mid"):
        ss.trace(hooked_model(parallel_attn_mlp=True), torch.arange(12), [ss.Norms("resid_mid")])


def test_users_hooks_stay_and_are_seen():
    model, tokens = hooked_model(), torch.arange(12)
    model.add_hook("blocks.1.hook_mlp_out", lambda value, hook: value * 0)
    norm = ss.trace(model, tokens, [ss.Norms("mlp_out")])["mlp_out_norm"]
    assert (norm[1] == 0).all()
    assert (norm[0] > 0).all()
    assert len(model.hook_dict["blocks.1.hook_mlp_out"].fwd_hooks) == 1


def test_attention_of_a_hooked_transformer_cannot_be_streamed():
    model, tokens = hooked_model(), torch.arange(12)
    with pytest.raises(ss.ModelError, match="load the model as a TransformerBridge"):
        ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")
    assert ss.trace(model, tokens, [ss.SinkScores()]).attention == "eager"


def test_a_hook_of_one_layer_is_that_layer_of_the_site():
    model, tokens = hooked_model(), torch.arange(12)
    names = ("resid_post", "blocks.2.hook_resid_post", "mlp_in", "blocks.1.mlp.hook_in")
    trace_result = ss.trace(model, tokens, [ss.Norms(name) for name in names])
    for site, hook, layer in ((*names[:2], 2), (*names[2:], 1)):
        one_layer = trace_result[f"{hook}_norm"]
        assert torch.equal(one_layer, trace_result[f"{site}_norm"][layer : layer + 1])


def test_weights_of_both_generations_are_different_models():
    """Their parameters have other names, so that a sink map of one is refused by the other."""
    planted = random_planted(0)
    hooked, bridge = planted.load("hooked"), planted.load("bridge")
    assert weights_fingerprint(hooked) == weights_fingerprint(planted.load("hooked"))
    assert weights_fingerprint(hooked) != weights_fingerprint(bridge)
    random = hooked_model()
    before = weights_fingerprint(random)
    random.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    assert weights_fingerprint(random) != before
