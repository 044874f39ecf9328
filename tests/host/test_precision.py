"""What rounding may explain follows the coarsest of a model's weights."""

from __future__ import annotations

import pytest
import torch

from secondary_sinks.host.precision import tolerance


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, 1e-4), (torch.bfloat16, 6.25e-2), (torch.float16, 7.8125e-3)],
)
def test_of_one_precision(dtype, expected):
    assert tolerance(torch.nn.Linear(2, 2, dtype=dtype)) == expected


def test_the_coarsest_decides_and_whole_numbers_do_not():
    mixed = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half()])
    assert tolerance(mixed) == 7.8125e-3
    whole = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert tolerance(torch.nn.ParameterList([whole])) == 1e-4
