"""How sure is an effect: intervals, permutation p-values, percentiles among controls.

Thin wrappers with seeds as arguments. TransformerLens has a bootstrap and a sign-flip test of its
own from version 4 on, and they are used where they are installed; otherwise numpy and scipy. The
two draw different resamples from one seed, so intervals agree within their own scatter, not bit for
bit.

>>> bootstrap_interval(torch.tensor([17.0, 17.0, 16.0, 17.0]), seed=0)
(16.25, 17.0)
>>> percentile_among(5.0, [1.0, 2.0, 3.0, 9.0])
75.0

None of them can say more than the sample holds: eight controls of one text speak for that text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from secondary_sinks.errors import InputError

try:
    from transformer_lens.utilities import statistics as host
except ImportError:  # TransformerLens 3
    host = None

Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with a bootstrap interval over the points."""

    rho: float
    """In [-1, 1]; NaN where one of the two does not vary."""
    low: float
    high: float


def bootstrap_interval(
    values: Float[Tensor, "example"],
    *,
    statistic: Literal["mean", "median"] = "mean",
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean or the median; (NaN, NaN) without examples.

    A sample that does not vary has an interval of no width, whatever its size: that is what the
    sample says, not evidence that the population does not vary.

    Raises:
        InputError: another statistic, or a confidence outside (0, 1).
    """
    if statistic not in ("mean", "median"):
        raise InputError(f"no statistic {statistic!r}; use 'mean' or 'median'")
    _check_confidence(confidence)
    if len(values) == 0:
        return math.nan, math.nan
    values = values.float()
    if host is not None:
        low, high = host.bootstrap_ci(
            values,
            statistic=statistic,
            confidence=confidence,
            n_resamples=n_resamples,
            generator=host.derive_generator(seed, "bootstrap"),
        )
        return float(low), float(high)
    reduce = np.mean if statistic == "mean" else np.median
    return _resampled_interval((values.numpy(),), reduce, confidence, n_resamples, seed)


def sign_flip_p_value(
    differences: Float[Tensor, "pair"],
    *,
    alternative: Alternative = "two-sided",
    n_permutations: int = 9999,
    seed: int = 0,
) -> float:
    """Probability of a mean paired difference this large if signs were random; NaN without pairs.

    Exact up to 12 pairs, so that n pairs cannot give less than 2^-n (one-sided).

    Raises:
        InputError: an unknown alternative.
    """
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"no alternative {alternative!r}; use 'two-sided', 'greater' or 'less'")
    if len(differences) == 0:
        return math.nan
    differences = differences.double()
    if host is not None:
        found = host.sign_flip_permutation_pvalue(
            differences,
            alternative=alternative,
            n_permutations=n_permutations,
            generator=host.derive_generator(seed, "sign flip"),
        )
        return float(found)
    result = stats.permutation_test(
        (differences.numpy(),),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if len(differences) <= 12 else n_permutations,
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def percentile_among(value: float, controls: Sequence[float]) -> float:
    """Percent of the controls that lie below `value`, ties counted half; NaN without controls."""
    kept = [control for control in controls if not math.isnan(control)]
    if not kept or math.isnan(value):
        return math.nan
    return min(100.0, float(stats.percentileofscore(kept, value, kind="mean")))


def spearman(
    x: Float[Tensor, "point"],
    y: Float[Tensor, "point"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation over the points where both are known.

    The interval resamples points. Where they are a grid that somebody chose, such as doses, it says
    how much the correlation hangs on single points, not what other texts would give.

    Raises:
        InputError: a confidence outside (0, 1), or `x` and `y` of different lengths.
    """
    _check_confidence(confidence)
    if len(x) != len(y):
        raise InputError(f"{len(x)} values of x and {len(y)} of y")
    known = ~(torch.isnan(x) | torch.isnan(y))
    pairs = x[known].double().numpy(), y[known].double().numpy()
    rho = _rank_correlation(*pairs)
    if math.isnan(rho):
        return Correlation(math.nan, math.nan, math.nan)
    low, high = _resampled_interval(pairs, _rank_correlation, confidence, n_resamples, seed)
    return Correlation(rho, low, high)


def _rank_correlation(x: Any, y: Any) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


def _resampled_interval(
    samples: tuple[Any, ...],
    statistic: Callable[..., Any],
    confidence: float,
    n_resamples: int,
    seed: int,
) -> tuple[float, float]:
    # Not `stats.bootstrap`'s own interval: one resample in which y does not vary makes it NaN.
    rng = np.random.default_rng(seed)
    n = len(samples[0])
    draws = []
    for _ in range(n_resamples):
        index = rng.integers(0, n, n)
        draws.append(float(statistic(*(sample[index] for sample in samples))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # every resample is NaN
        low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it lies between 0 and 1")


def grouped_interval(
    groups: Sequence[int],
    statistic: Callable[[Any], float],
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval that resamples whole groups, such as texts.

    Points of one text share their queries, their length and their topic. To draw them one by one
    would call each of them an independent witness, and give intervals that are far too narrow.
    (NaN, NaN) with fewer than two groups: one text says nothing about how texts differ.

    Args:
        groups: to which group each point belongs.
        statistic: of the points with the given indices (an integer array, with repetitions).
        confidence: of the interval.
        n_resamples: how many.
        seed: of the resampling.

    Raises:
        InputError: a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    labels = np.asarray(groups)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(members) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_resamples):
        drawn = rng.integers(0, len(members), len(members))
        draws.append(statistic(np.concatenate([members[index] for index in drawn])))
    if np.isnan(draws).all():
        return math.nan, math.nan
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def grouped_spearman(
    x: Float[Tensor, "point"],
    y: Float[Tensor, "point"],
    groups: Sequence[int],
    *,
    within: Sequence[int] | None = None,
    given: Float[Tensor, "point"] | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation of points in groups, with an interval that resamples the groups.

    Ranks are those of the whole sample, also in the resamples.

    Args:
        x: one value a point; points where something is NaN are left out.
        y: the other.
        groups: to which group each point belongs, for the interval.
        within: labels; ranks are taken among the points of one label, so that differences between
            labels (the length of a text, the depth of a layer) play no part. Labels with one point
            say nothing. None ranks all points together.
        given: partial correlation: what x and y share with the ranks of this is taken off first.
        confidence: of the interval.
        n_resamples: how many.
        seed: of the resampling.

    Raises:
        InputError: a confidence outside (0, 1), or lengths that differ.
    """
    series = [x, y] if given is None else [x, y, given]
    if len({len(groups), *map(len, series)}) > 1:
        raise InputError(f"{[len(one) for one in series]} values in {len(groups)} groups")
    known = ~torch.stack([torch.isnan(one) for one in series]).any(dim=0)
    labels = np.zeros(len(groups)) if within is None else np.asarray(within)
    labels = labels[known.numpy()]
    ranks = [_centered_ranks(one[known].double().numpy(), labels) for one in series]

    def statistic(index: Any) -> float:
        return _partial([one[index] for one in ranks])

    rho = statistic(np.arange(len(labels)))
    if math.isnan(rho):
        return Correlation(math.nan, math.nan, math.nan)
    kept = np.asarray(groups)[known.numpy()].tolist()
    low, high = grouped_interval(
        kept, statistic, confidence=confidence, n_resamples=n_resamples, seed=seed
    )
    return Correlation(rho, low, high)


def _centered_ranks(values: Any, labels: Any) -> Any:
    """Rank of each point among those of its label, with the label's mean rank taken off."""
    ranks = np.zeros(len(values))
    for label in np.unique(labels):
        own = labels == label
        ranks[own] = stats.rankdata(values[own]) - (own.sum() + 1) / 2
    return ranks


def _partial(series: list[Any]) -> float:
    """Correlation of the first two series, given the third if there is one."""
    if len(series[0]) < len(series) + 1:
        return math.nan
    centered = [one - one.mean() for one in series]
    x, y, *rest = centered
    for z in rest:
        square = float(z @ z)
        if square > 0:
            x, y = x - z * float(x @ z) / square, y - z * float(y @ z) / square
    # Rounding leaves a trace of what was taken off; a trace must not pass for a value that varies.
    left = [float(one @ one) for one in (x, y)]
    whole = [float(one @ one) for one in centered[:2]]
    if any(part <= 1e-12 * total for part, total in zip(left, whole, strict=True)):
        return math.nan
    return float(np.clip(float(x @ y) / math.sqrt(left[0] * left[1]), -1.0, 1.0))
