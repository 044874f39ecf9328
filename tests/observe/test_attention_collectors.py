"""Sink rates and entropies: those of the full pattern, and by hand on small ones."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.observe.attention_columns import AttentionColumns

N = 24


def columns(*heads):
    """What the collector gets for the patterns of a layer's heads."""
    return AttentionColumns.of_pattern(torch.stack(heads), ss.AttentionEntropy.attention)


class Pattern(ss.Collector):
    sites = ("pattern",)

    def start(self, run):
        self.layers = []

    def update(self, site, layer, activation):
        self.layers.append(activation.clone())

    def result(self):
        return torch.stack(self.layers)


def test_entropy_is_that_of_the_pattern(tiny, family, tokens_of):
    trace_result = ss.trace(tiny(family), tokens_of(N), [Pattern(), ss.AttentionEntropy()])
    pattern, entropies = trace_result["Pattern"].double(), trace_result["AttentionEntropy"]
    weight = pattern / pattern.sum(dim=-1, keepdim=True)
    entropy = torch.distributions.Categorical(probs=weight).entropy()
    torch.testing.assert_close(
        entropies.by_head.double(), entropy.mean(dim=2), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        entropies.by_query.double(), entropy.mean(dim=1), atol=1e-4, rtol=1e-4
    )
    assert torch.isnan(entropies.normalized_by_query[:, 0]).all()
    known = entropies.normalized_by_query[:, 1:]
    assert ((known >= 0) & (known <= 1 + 1e-5)).all()


def both_ways(model, tokens):
    """Streamed and eager entropies, which must agree; returned are the eager ones."""
    streamed, eager = (
        ss.trace(model, tokens, [ss.AttentionEntropy()], attention=way)["AttentionEntropy"]
        for way in ("streaming", "eager")
    )
    for name, expected in vars(eager).items():
        torch.testing.assert_close(
            getattr(streamed, name), expected, rtol=1e-3, atol=1e-4, equal_nan=True
        )
    return eager


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt-oss", "phi3"])
def test_streamed_entropy_is_the_eager_one(tiny, kind, tokens_of):
    """Beyond a sliding window as well, and with learned logits."""
    both_ways(tiny(kind), tokens_of(70))


def test_learned_logits_that_take_nearly_all(make_tiny, tokens_of):
    model, tokens = make_tiny("gpt-oss"), tokens_of(70)
    plain = both_ways(model, tokens)
    logits = model.blocks[1].attn.original_component.sinks
    with torch.no_grad():
        logits[:] = torch.tensor([0.0, 1.0, 2.0, 30.0])
    entropies = both_ways(model, tokens)
    torch.testing.assert_close(entropies.by_head[1, :3], plain.by_head[1, :3], rtol=1e-3, atol=1e-3)
    assert torch.isnan(entropies.by_head[1, 3])
    assert not torch.isnan(entropies.by_query).any()


def test_extremes():
    """A head that looks at one key has entropy 0, uniform attention 1, also within a window."""
    one, uniform = torch.zeros(8, 8), torch.ones(8, 8).tril()
    one[:, 0] = 1
    window = uniform.triu(-2)
    collector = ss.AttentionEntropy()
    collector.start(None)
    uniform, window = (part / part.sum(-1, keepdim=True) for part in (uniform, window))
    collector.update("attention", 0, columns(one, uniform))
    collector.update("attention", 1, columns(window, window))
    entropies = collector.result()
    torch.testing.assert_close(entropies.normalized_by_head[0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(entropies.normalized_by_head[1], torch.ones(2))
    torch.testing.assert_close(entropies.by_query[1, -1], torch.tensor(3.0).log())


def test_rows_that_leave_weight_out_are_normalized():
    half = torch.full((4, 4), 0.1).tril()
    collector = ss.AttentionEntropy()
    collector.start(None)
    collector.update("attention", 0, columns(half))
    torch.testing.assert_close(collector.result().normalized_by_head, torch.ones(1, 1))


def test_sink_rate_is_the_share_of_heads_above_epsilon():
    score = torch.tensor([[[0.5, 0.1], [0.2, 0.1]], [[0.4, 0.31], [0.29, 0.0]]])
    torch.testing.assert_close(ss.sink_rate(score), torch.tensor([0.5, 0.25]))
    with pytest.raises(ss.InputError):
        ss.sink_rate(score, 1.5)


@pytest.mark.parametrize("way", ["eager", "streaming"])
def test_attention_to_no_token(make_tiny, tokens_of, way):
    """A learned logit takes what the weights of the tokens leave; there is none in Llama."""
    model, tokens = make_tiny("gpt-oss"), tokens_of(24)
    request = [ss.NoOpShare()]
    sinks = [layer.self_attn.sinks for layer in model.original_model.model.layers]
    shares = []
    for logit in (-50.0, 0.0, 50.0):
        for sink in sinks:
            sink.data.fill_(logit)
        trace_result = ss.trace(model, tokens, request, attention=way)
        shares.append(trace_result["NoOpShare"])
    assert shares[0].shape == (3, 4)
    torch.testing.assert_close(shares[0], torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(shares[2], torch.ones(3, 4))
    # With equal logits of all keys and of the learned one, query i gives it 1 / (i + 2), or, with a
    # window of 8, 1 / 9 at least.
    for layer in model.original_model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
        layer.self_attn.q_proj.bias.data.zero_()
    for sink in sinks:
        sink.data.zero_()
    uniform = ss.trace(model, tokens, request, attention=way)["NoOpShare"]
    n_visible = torch.arange(1.0, 25.0)
    full, windowed = (1 / (n_visible.clamp_max(most) + 1) for most in (24, 8))
    kinds = model.original_model.config.layer_types
    for share, kind in zip(uniform, kinds, strict=True):
        expected = full if kind == "full_attention" else windowed
        torch.testing.assert_close(share, expected.mean().expand(4))
    assert ss.trace(make_tiny("llama"), tokens, request)["NoOpShare"].abs().max() < 1e-6
