"""Contract with TransformerLens 3: heads and their logits are the same in both generations."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model, random_planted


@pytest.mark.parametrize("seed", [1, 3])
def test_erasers_and_heads_of_planted_models(seed):
    model = random_planted(seed)
    tokens = model.tokens(64)
    truth = model.truth(tokens)
    by_kind = {}
    for kind in ("hooked", "bridge"):
        host = model.load(kind)
        sinks = ss.detect_sinks(host, tokens)
        ends = ss.sink_decomposition(host, sinks, progress=False)
        reads = ss.head_reads(host, sinks)
        by_kind[kind] = ends, reads
        expected = {s.position: f"mlp {s.onset + s.lifetime}" for s in truth.sinks}
        last = model.plan.n_layers
        for sink in ends.sinks:
            assert sink.eraser == (None if sink.last_layer + 1 == last else expected[sink.position])
    (ends, reads), (bridge_ends, bridge_reads) = by_kind["hooked"], by_kind["bridge"]
    scale = float(bridge_ends.write.projection.abs().max())
    torch.testing.assert_close(
        ends.head_write.heads, bridge_ends.head_write.heads, rtol=1e-3, atol=1e-5 * scale
    )
    for name in ("logit", "key_norm", "cosine", "value_norm"):
        torch.testing.assert_close(
            getattr(reads.sink, name),
            getattr(bridge_reads.sink, name),
            equal_nan=True,
            rtol=1e-3,
            atol=1e-2,  # rounding of massive vectors is left where they were erased
        )
    assert torch.equal(reads.is_dormant, bridge_reads.is_dormant)
    logits = reads.sink
    parts = logits.content + logits.rotation + logits.query_bias + logits.key_bias
    torch.testing.assert_close(
        parts + logits.distance + logits.cap, logits.logit, rtol=1e-3, atol=1e-3
    )


def test_what_cannot_be_separated_is_noted():
    """`HookedTransformer` shows no angles, so a bias cannot be turned by one."""
    model = planted_model(architecture="qwen2")
    with torch.no_grad():
        for layer in model.hf.model.layers:
            layer.self_attn.q_proj.bias += 0.1
    host, tokens = model.load("hooked"), model.tokens(64)
    reads = ss.head_reads(host, ss.detect_sinks(host, tokens))
    assert "biases" in reads.notes[0]
    assert reads.sink.query_bias.abs().max() == 0
    torch.testing.assert_close(
        reads.sink.content + reads.sink.rotation, reads.sink.logit, rtol=1e-3, atol=1e-3
    )
