"""Fused attention: two log-sum-exps give what plain products give, on every device."""

from __future__ import annotations

import subprocess
import sys

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


LENGTHS = [140, 130]  # beyond a block of its masks, 128 tokens; the second one is padded


def random_inputs(device, n_heads=6, n_kv_heads=2, d_head=16):
    shapes = [(2, n, max(LENGTHS), d_head) for n in (n_heads, n_kv_heads, n_kv_heads)]
    return [torch.randn(shape, device=device) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("window", "settings"),
    [
        (None, {}),
        (9, {"softcap": 5.0}),
        (133, {"sink_logits": 2 * torch.randn(6)}),
        (
            None,
            {"alibi": torch.randn(2, 6, 140), "softcap": 5.0, "sink_logits": torch.randn(6)},
        ),
    ],
)
def test_it_is_streamed_attention(device, window, settings):
    """Over blocks of its masks (128 tokens), with padding, and queries that see no later one."""
    settings = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in settings.items()
    }
    inputs = AttentionInputs(*random_inputs(device), 0.4, window, **settings)
    output, columns = FusedAttention(LENGTHS, KEEPS)(inputs)
    expected, expected_columns = StreamingAttention(LENGTHS, KEEPS)(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)
    assert (output[1, LENGTHS[1] :] == 0).all()
    for fused, streamed in zip(columns, expected_columns, strict=True):
        for name in ("received", "own", "log_sum_exp"):
            torch.testing.assert_close(
                getattr(fused, name), getattr(streamed, name), rtol=1e-4, atol=2e-5
            )
        assert (fused.received[:, -1] == 0).all()


def test_the_first_layer_is_compared_with_plain_products(monkeypatch):
    received = FusedAttention._received

    def wrong(self, text, log_sum):
        return received(self, text, log_sum + 0.01)

    monkeypatch.setattr(FusedAttention, "_received", wrong)
    with pytest.raises(ss.ModelError, match="differs from streamed attention by"):
        FusedAttention(LENGTHS)(AttentionInputs(*random_inputs("cpu"), 0.4))


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_a_fused_trace_is_the_streamed_one(tiny, tokens_of, monkeypatch, family):
    model, tokens = tiny(family), tokens_of(40)
    collectors = [ss.SinkScores(), ss.ResidualGeometry()]
    with pytest.raises(ss.ModelError, match="fused on a GPU"):
        ss.trace(model, tokens, collectors, attention="fused")
    monkeypatch.setattr(attention_path, "_no_accelerator", lambda _: None)
    fused = ss.trace(model, tokens, collectors, attention="fused")
    streamed = ss.trace(model, tokens, collectors, attention="streaming")
    assert (fused.attention, streamed.attention) == ("fused", "streaming")
    for value, expected in (
        (fused["SinkScores"], streamed["SinkScores"]),
        (fused["ResidualGeometry"].alignment, streamed["ResidualGeometry"].alignment),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    with pytest.raises(ss.InputError, match="no maxima"):
        ss.trace(model, tokens, [ss.ReceivedAttention()], attention="fused")


@pytest.mark.slow
def test_it_is_imported_only_on_request():
    code = (
        "import sys, secondary_sinks.sinks.detect_sinks\n"
        "print('secondary_sinks.observe.fused_attention' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
