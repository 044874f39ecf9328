"""A norm as a linear map: probes give its weight and bias, and parts add up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secondary_sinks.host.norm_map import NormMap


class Offset(nn.Module):
    """Gemma's convention: the weight is stored as its difference from 1."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (1 + self.weight)


def random_norm(kind, width):
    torch.manual_seed(0)
    weight, bias = torch.randn(width), torch.randn(width)
    if kind == "layer":
        norm = nn.LayerNorm(width, eps=1e-5)
        norm.weight.data, norm.bias.data = weight, bias
        return norm, weight, bias
    if kind == "rms":
        norm = nn.RMSNorm(width, eps=1e-5)
        norm.weight.data = weight
        return norm, weight, torch.zeros(width)
    return Offset(weight), 1 + weight, torch.zeros(width)


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("kind", ["layer", "rms", "offset"])
def test_the_parts_of_a_token_go_through_the_norm_one_by_one(kind, width):
    norm, weight, bias = random_norm(kind, width)
    with torch.no_grad():
        norm_map = NormMap.of(norm, torch.zeros(1, width))
        torch.testing.assert_close(norm_map.weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm_map.bias, bias, rtol=1e-4, atol=1e-5)
        assert norm_map.centers == (kind == "layer")
        parts = torch.randn(5, 3, width) + 2
        whole = parts.sum(dim=1)
        outputs = norm(whole)
    scale = norm_map.scale(whole, outputs)
    assert norm_map.error(whole, outputs) < 1e-5
    mapped = norm_map.linear(parts, scale[:, None]).sum(dim=1) + norm_map.bias
    torch.testing.assert_close(mapped, outputs, rtol=1e-4, atol=1e-5)
    directions = torch.randn(5, width)
    along = (norm_map.linear(whole, scale) * directions).sum(-1)
    back = (whole * norm_map.transposed(directions, scale)).sum(-1)
    torch.testing.assert_close(along, back, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_norm_has_an_error():
    torch.manual_seed(0)
    read = torch.randn(4, 16)
    norm_map = NormMap.of(nn.RMSNorm(16).requires_grad_(False), read)
    assert norm_map.error(read, torch.tanh(read)) > 0.01
    assert NormMap.identity(16).error(read, 3 * read) < 1e-6
    assert NormMap.identity(16).error(read, read.roll(1, dims=1)) > 0.1
