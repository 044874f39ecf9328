from __future__ import annotations

import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.statistics import (
    bootstrap_interval,
    grouped_interval,
    percentile_among,
    sign_flip_p_value,
    spearman,
)


def sample(n, seed=0, mean=0.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) + mean


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(100):
        low, high = bootstrap_interval(sample(40, seed, 3.0), seed=seed)
        inside += low <= 3.0 <= high
    assert 86 <= inside <= 99


def test_the_interval_is_as_wide_as_the_normal_one():
    values = sample(200)
    low, high = bootstrap_interval(values)
    expected = 2 * 1.96 * float(values.std()) / 200**0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    assert (low + high) / 2 == pytest.approx(float(values.mean()), abs=0.02)


def test_seeds_decide():
    values = sample(20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert sign_flip_p_value(values, seed=1) == sign_flip_p_value(values, seed=1)


def test_samples_that_say_nothing():
    assert bootstrap_interval(torch.full((5,), 4.0)) == (4.0, 4.0)
    assert bootstrap_interval(torch.tensor([4.0])) == (4.0, 4.0)
    assert all(math.isnan(value) for value in bootstrap_interval(torch.zeros(0)))
    assert math.isnan(sign_flip_p_value(torch.zeros(0)))
    assert math.isnan(percentile_among(1.0, []))
    assert math.isnan(percentile_among(math.nan, [1.0]))


def test_one_pair_has_two_signs():
    for value, alternative, expected in (
        (2.0, "greater", 0.5),
        (-2.0, "greater", 1.0),
        (-2.0, "less", 0.5),
        (2.0, "two-sided", 1.0),
    ):
        assert sign_flip_p_value(torch.tensor([value]), alternative=alternative) == expected


def test_sign_flips_are_exact_for_few_pairs():
    assert sign_flip_p_value(torch.arange(1.0, 9.0), alternative="greater") == 2**-8
    assert sign_flip_p_value(torch.arange(1.0, 9.0)) == 2**-7
    assert sign_flip_p_value(-torch.arange(1.0, 9.0), alternative="less") == 2**-8


def test_sign_flips_of_many_pairs():
    assert sign_flip_p_value(sample(60, mean=1.0)) < 0.001
    assert sign_flip_p_value(sample(60) - sample(60).mean()) > 0.9


def test_percentiles_count_ties_half():
    assert percentile_among(5.0, [1.0, 2.0, 3.0, 9.0]) == 75.0
    assert percentile_among(2.0, [1.0, 2.0, 2.0, 3.0]) == 50.0
    assert percentile_among(9.0, [1.0, math.nan, 2.0]) == 100.0


def test_spearman_knows_order_only():
    x = torch.arange(20.0)
    exact = spearman(x, x.exp())
    assert (exact.rho, exact.low, exact.high) == pytest.approx((1, 1, 1))
    noisy = spearman(x, x + 6 * sample(20), seed=3)
    assert noisy.low < noisy.rho < noisy.high < 1
    assert spearman(x, x + 6 * sample(20), seed=3) == noisy


def test_spearman_leaves_out_what_is_unknown():
    x, y = torch.arange(6.0), torch.tensor([0.0, 1.0, math.nan, 3.0, 4.0, 5.0])
    assert spearman(x, y).rho == pytest.approx(1)
    assert math.isnan(spearman(x, torch.ones(6)).rho)
    assert math.isnan(spearman(x[:2], x[:2]).rho)


def test_bad_input():
    with pytest.raises(ss.InputError, match="alternative"):
        sign_flip_p_value(sample(4), alternative="more")
    with pytest.raises(ss.InputError, match=r"one length, got lengths \[4, 5, 4\]"):
        spearman(sample(4), sample(5))


def test_whole_groups_are_resampled():
    """Points repeated within their text are no new witnesses: the interval stays what it was."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    once = grouped_interval(range(6), lambda index: float(x[index].mean()), seed=3)
    many = grouped_interval(
        torch.arange(6).repeat_interleave(50).tolist(),
        lambda index: float(x.repeat_interleave(50)[index].mean()),
        seed=3,
    )
    assert many == pytest.approx(once, abs=1e-6)
    assert once[1] - once[0] > 2
    assert all(math.isnan(end) for end in grouped_interval([0, 0], lambda index: 1.0))


def test_ranks_within_labels_ignore_what_differs_between_them():
    """In each text y falls with x; between texts both rise (Simpson's paradox)."""
    text = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    x = torch.tensor([1.0, 2, 3, 11, 12, 13, 21, 22, 23])
    y = torch.tensor([3.0, 2, 1, 13, 12, 11, 23, 22, 21])
    assert spearman(x, y, text).rho > 0.7
    within = spearman(x, y, text, within=text)
    assert (within.rho, within.low, within.high) == pytest.approx((-1, -1, -1))
    assert spearman(x, y, range(9)).rho == pytest.approx(spearman(x, y).rho)


def test_what_both_share_with_a_third_is_taken_off():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, generator=generator)
    x, y = (z + 0.2 * torch.randn(200, generator=generator) for _ in range(2))
    groups = list(range(200))
    assert spearman(x, y, groups).rho > 0.9
    assert abs(spearman(x, y, groups, given=z).rho) < 0.25
    assert math.isnan(spearman(x, y, groups, given=x).rho)
    assert math.isnan(spearman(x, torch.ones(200), groups).rho)
    with pytest.raises(ss.InputError, match="groups"):
        spearman(x, y[:5], groups)
