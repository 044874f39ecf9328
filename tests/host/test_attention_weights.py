"""Heads through W_O: their sum is the attention's output, also behind a norm."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.attention_weights import check_head_sum, output_weights


def test_heads_add_up_to_the_attention_in_every_family(make_tiny, family, tokens_of):
    model = make_tiny(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    _, cache = model.run_with_cache(tokens_of(20)[None])
    post_norm = family in ("gemma2", "gemma3", "olmo2")
    for layer in range(3):
        weights = output_weights(model, layer)
        z, out = cache[f"blocks.{layer}.attn.hook_z"][0], cache[f"blocks.{layer}.hook_attn_out"][0]
        scale, error = weights.scale(z, out)
        assert error < 1e-5
        assert torch.equal(weights.gain, torch.ones(32)) != post_norm
        assert (family in ("gpt2", "neox", "gpt-oss")) == bool(weights.bias.any())
        if not post_norm:
            torch.testing.assert_close(scale, torch.ones(20))
        directions = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=-1)
        read, bias = weights.along(directions)
        parts = torch.einsum("thd,nhd->nth", z, read).sum(dim=-1) + bias[:, None]
        torch.testing.assert_close(parts * scale, directions @ out.T, rtol=1e-4, atol=1e-4)


def test_what_does_not_add_up_is_refused(tiny):
    check_head_sum(tiny("llama"), 1e-4, torch.float32)
    check_head_sum(tiny("llama"), 1e-2, torch.bfloat16)
    for error in (1e-2, float("nan")):
        with pytest.raises(ss.ModelError, match="do not add up"):
            check_head_sum(tiny("llama"), error, torch.float32)


def test_a_model_without_output_weights(make_tiny):
    class Bare:
        cfg = make_tiny("llama").cfg
        blocks = (type("Block", (), {"attn": object()})(),)
        run_with_hooks = to_tokens = unembed = None

    with pytest.raises(ss.ModelError, match="shows no output weights"):
        output_weights(Bare(), 0)
