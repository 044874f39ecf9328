"""Fused attention: two log-sum-exps give what plain products give, wherever it runs."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.observe import attention_path
from secondary_sinks.observe.attention_columns import ColumnRequest
from secondary_sinks.observe.fused_attention import FusedAttention
from secondary_sinks.observe.streaming_attention import StreamingAttention

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()  # fused there alone
KEEPS = ColumnRequest(log_sum_exp=True)


def drawn(device, n_tokens=300, n_heads=6, n_kv_heads=2, d_head=32):
    shapes = [(2, n, n_tokens, d_head) for n in (n_heads, n_kv_heads, n_kv_heads)]
    return [torch.randn(shape, device=device) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 9, 150])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"softcap": 5.0},
        {"sink_logits": 2 * torch.randn(6)},
        {"alibi": torch.randn(2, 6, 300), "softcap": 5.0, "sink_logits": torch.randn(6)},
    ],
)
def test_it_is_streamed_attention(device, window, settings):
    """Over blocks of its masks (128 tokens), with padding, and queries that see no later one."""
    settings = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in settings.items()
    }
    inputs = AttentionInputs(*drawn(device), 0.4, window, **settings)
    output, columns = FusedAttention([300, 131], KEEPS)(inputs)
    expected, by_text = StreamingAttention([300, 131], KEEPS)(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)
    assert (output[1, 131:] == 0).all()
    for one, other in zip(columns, by_text, strict=True):
        for name in ("received", "own", "log_sum_exp"):
            found, wanted = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
        assert (one.received[:, -1] == 0).all()


def test_the_first_layer_is_compared_with_plain_products(monkeypatch):
    received = FusedAttention._received

    def wrong(self, text, log_sum):
        return received(self, text, log_sum + 0.01)

    monkeypatch.setattr(FusedAttention, "_received", wrong)
    with pytest.raises(ss.ModelError, match="differs from streamed attention by"):
        FusedAttention([300, 131])(AttentionInputs(*drawn("cpu"), 0.4))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_a_fused_trace_is_the_streamed_one(make_tiny, tokens_of, monkeypatch, family):
    model, tokens = make_tiny(family), tokens_of(100)
    collectors = [ss.SinkScores(), ss.ResidualGeometry()]
    with pytest.raises(ss.ModelError, match="fused on a GPU"):
        ss.trace(model, tokens, collectors, attention="fused")
    monkeypatch.setattr(attention_path, "_no_accelerator", lambda _: None)
    fused = ss.trace(model, tokens, collectors, attention="fused")
    streamed = ss.trace(model, tokens, collectors, attention="streaming")
    assert (fused.attention, streamed.attention) == ("fused", "streaming")
    pairs = [(one["SinkScores"], one["ResidualGeometry"].alignment) for one in (fused, streamed)]
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    with pytest.raises(ss.InputError, match="no maxima"):
        ss.trace(model, tokens, [ss.ReceivedAttention()], attention="fused")
