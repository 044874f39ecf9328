"""The fit finds the law that was put in, and says so where there is none to find."""

from __future__ import annotations

import math

import pytest
import torch

from secondary_sinks.analyses.norm_law import power_law


def test_the_exponent_that_was_put_in_comes_out_whatever_the_texts_factors():
    generator = torch.Generator().manual_seed(0)
    text = torch.arange(40) // 5
    x = torch.rand(40, generator=generator) * 300 + 20
    factor = torch.rand(8, generator=generator) + 0.1
    law = power_law(x, factor[text] * x**0.6, text.tolist())
    assert law.exponent == pytest.approx(0.6, abs=1e-4)
    assert (law.low, law.high) == pytest.approx((0.6, 0.6), abs=1e-4)
    assert law.factor == pytest.approx(float(factor.log().mean().exp()), rel=1e-3)
    assert law.explained == pytest.approx(1)
    assert law.residual.abs().max() < 1e-4


def test_noise_is_left_over():
    generator = torch.Generator().manual_seed(1)
    text = torch.arange(200) // 10
    x = torch.rand(200, generator=generator) * 300 + 20
    noise = 0.3 * torch.randn(200, generator=generator)
    law = power_law(x, x**0.6 * noise.exp(), text.tolist())
    assert law.low < 0.6 < law.high
    assert 0.3 < law.explained < 0.9
    assert law.residual.std() == pytest.approx(0.3, abs=0.05)


def test_degenerate_outcomes_are_nan():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for y, text in (
        (torch.full((4,), 7.0), [0, 0, 1, 1]),  # nothing varies
        (x, [0, 1, 2, 3]),  # every sink alone in its text
        (torch.zeros(4), [0, 0, 1, 1]),  # no logarithms
    ):
        law = power_law(x, y, text)
        assert math.isnan(law.exponent)
        assert math.isnan(law.explained)
        assert torch.isnan(law.residual).all()
    one = power_law(x, x**2, [0, 0, 0, 0])
    assert one.exponent == pytest.approx(2)
    assert math.isnan(one.low), "one text has no interval"
