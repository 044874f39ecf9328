"""How few contributions make a sum."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from secondary_sinks.analyses.neuron_contributions import fewest, strongest_others

NUMBERS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)


def test_two_that_cancel_belong_together():
    assert fewest(torch.tensor([0.1, 200.0, -100.0, 0.2]), 100.3) == (1, 2)
    assert fewest(torch.tensor([0.1, 99.0, 0.2]), 99.3) == (1,)
    assert fewest(torch.tensor([50.0, 50.0]), 100.0) == (0, 1)
    assert fewest(torch.tensor([1.0, 5.0]), 106.0, bias=100.0) == ()


@given(NUMBERS, st.floats(0.1, 1), st.floats(-5, 5, width=32))
def test_they_and_all_further_ones_stay_near_the_whole(values, share, bias):
    contribution = torch.tensor(values)
    write = float(contribution.double().sum()) + bias
    found = fewest(contribution, write, bias=bias, share=share)
    order = contribution.abs().argsort(descending=True, stable=True).tolist()
    assert list(found) == order[: len(found)]
    allowed = max(1 - share, 1e-6) * abs(write) + 1e-9
    for n in range(len(found), len(values) + 1):
        left = bias + float(contribution[order[:n]].double().sum()) - write
        assert abs(left) <= allowed + 1e-9
    if found:
        n = len(found) - 1
        assert abs(bias + float(contribution[order[:n]].double().sum()) - write) > allowed - 2e-9


def test_the_strongest_others():
    size = torch.tensor([3.0, 9.0, 1.0, 5.0])
    assert strongest_others(size, [1], 2) == (3, 0)
    assert size.tolist() == [3, 9, 1, 5]
