"""What rounding may explain follows the coarsest of a model's weights."""

from __future__ import annotations

import pytest
import torch

from secondary_sinks.host.precision import attention_tolerance, tolerance
from secondary_sinks.observe.streaming_check import check_streaming


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, 1e-4), (torch.bfloat16, 6.25e-2), (torch.float16, 7.8125e-3)],
)
def test_of_one_precision(dtype, expected):
    assert tolerance(torch.nn.Linear(2, 2, dtype=dtype)) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, 1e-4), (torch.bfloat16, 0.25), (torch.float16, 0.03125)]
)
def test_of_attention_from_rounded_scores(dtype, expected):
    assert attention_tolerance(torch.nn.Linear(2, 2, dtype=dtype)) == expected


def test_large_logits_in_half_precision_are_streamed(make_tiny, tokens_of):
    """Rounding changes single weights by more than the tolerance, and no layer by as much."""
    model = make_tiny("llama")
    for layer in model.original_model.model.layers:
        layer.self_attn.k_proj.weight.data *= 2
    model.bfloat16()
    check = check_streaming(model, tokens_of(64))
    assert check.problem is None


def test_the_coarsest_decides_and_whole_numbers_do_not():
    mixed = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half()])
    assert tolerance(mixed) == 7.8125e-3
    whole = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert tolerance(torch.nn.ParameterList([whole])) == 1e-4
