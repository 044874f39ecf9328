"""How certain is an effect: intervals, permutation p-values, percentiles among controls.

Intervals are 95 % percentile intervals over `N_RESAMPLES` bootstrap resamples. Every random draw
has a seed.

>>> bootstrap_interval(torch.tensor([17.0, 17.0, 16.0, 17.0]), seed=0)
(16.25, 17.0)
>>> percentile_among(5.0, [1.0, 2.0, 3.0, 9.0])
75.0

None of them can say more than the sample holds: eight controls of one text speak for that text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from secondary_sinks.errors import InputError

CONFIDENCE = 0.95
"""Of every interval."""

N_RESAMPLES = 1000
"""Resamples of every interval."""

N_PERMUTATIONS = 9999
"""Sign flips of a p-value that is not exact."""

MAX_EXACT_PAIRS = 12
"""Up to this many pairs all sign flips are tried."""

Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % interval."""

    rho: float
    """In [-1, 1]; NaN where one of the two series does not vary."""
    low: float
    high: float


def bootstrap_interval(values: Float[Tensor, " example"], *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; (NaN, NaN) without examples.

    A sample that does not vary has an interval of no width, whatever its size: that describes the
    sample and is not evidence that the population does not vary.
    """
    if len(values) < 2:
        only = float(values[0]) if len(values) else math.nan
        return only, only
    interval = stats.bootstrap(
        (values.double().numpy(),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=N_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def grouped_interval(
    groups: Sequence[int], statistic: Callable[[Any], float], *, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval that resamples whole groups, such as texts.

    Points of one text share their queries, their length and their topic. Resampling them one by one
    would treat each as independent evidence, and give intervals that are far too narrow. (NaN, NaN)
    with fewer than two groups: one text says nothing about how texts differ.

    Args:
        groups: the group that each point belongs to.
        statistic: of the points with the given indices (an integer array, with repetitions).
        seed: of the resampling.
    """
    labels = np.asarray(groups)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(members) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(N_RESAMPLES):
        drawn = rng.integers(0, len(members), len(members))
        draws.append(statistic(np.concatenate([members[index] for index in drawn])))
    if np.isnan(draws).all():
        return math.nan, math.nan
    # A resample in which nothing varies has no correlation, and is left out.
    low, high = np.nanquantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def sign_flip_p_value(
    differences: Float[Tensor, " pair"],
    *,
    alternative: Alternative = "two-sided",
    seed: int = 0,
) -> float:
    """Probability of a mean paired difference this large if signs were random; NaN without pairs.

    Exact up to `MAX_EXACT_PAIRS` pairs, so that n pairs cannot give less than 2^-n (one-sided).

    Raises:
        InputError: an unknown alternative.
    """
    if alternative not in get_args(Alternative):
        raise InputError(f"no alternative {alternative!r}; use 'two-sided', 'greater' or 'less'")
    if len(differences) == 0:
        return math.nan
    if len(differences) == 1:  # scipy permutes two pairs or more
        difference = float(differences[0])
        signed = {"greater": difference, "less": -difference, "two-sided": 0.0}[alternative]
        return 0.5 if signed > 0 else 1.0
    # scipy takes infinity for "all of them", which its types do not say.
    n_resamples: Any = np.inf if len(differences) <= MAX_EXACT_PAIRS else N_PERMUTATIONS
    result = stats.permutation_test(
        (differences.double().numpy(),),
        np.mean,
        permutation_type="samples",
        n_resamples=n_resamples,
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def percentile_among(value: float, controls: Sequence[float]) -> float:
    """Percent of the controls that lie below `value`, ties counted half; NaN without controls."""
    known = [control for control in controls if not math.isnan(control)]
    if not known or math.isnan(value):
        return math.nan
    return min(100.0, float(stats.percentileofscore(known, value, kind="mean")))


def spearman(
    x: Float[Tensor, " point"],
    y: Float[Tensor, " point"],
    groups: Sequence[int] | None = None,
    *,
    within: Sequence[int] | None = None,
    given: Float[Tensor, " point"] | None = None,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation, with an interval that resamples points or groups of points.

    Ranks are those of the whole sample, also in the resamples. Where points are a grid that
    was chosen, such as doses, the interval shows how much the correlation depends on single
    points, not what other texts would give.

    Args:
        x: one value per point; points with a NaN are left out.
        y: the other value.
        groups: the group that each point belongs to, such as its text: the interval resamples whole
            groups (`grouped_interval`). None resamples points.
        within: labels; ranks are taken among the points of one label, so that differences between
            labels (the length of a text, the depth of a layer) have no influence. Labels with one
            point contribute nothing. None ranks all points together.
        given: partial correlation: what x and y share with the ranks of this is removed first.
        seed: of the resampling.

    Raises:
        InputError: lengths that differ.
    """
    groups = range(len(x)) if groups is None else groups
    series = [x, y] if given is None else [x, y, given]
    lengths = [len(values) for values in (*series, groups)]
    if len(set(lengths)) > 1:
        raise InputError(f"x, y, given and groups must be of one length, got lengths {lengths}")
    known = ~torch.stack([torch.isnan(values) for values in series]).any(dim=0)
    labels = (np.zeros(len(x)) if within is None else np.asarray(within))[known.numpy()]
    ranks = [_centered_ranks(values[known].double().numpy(), labels) for values in series]

    def statistic(index: Any) -> float:
        return _partial([values[index] for values in ranks])

    rho = statistic(np.arange(len(labels)))
    if math.isnan(rho):
        return Correlation(math.nan, math.nan, math.nan)
    low, high = grouped_interval(np.asarray(groups)[known.numpy()].tolist(), statistic, seed=seed)
    return Correlation(rho, low, high)


def _centered_ranks(values: Any, labels: Any) -> Any:
    """Rank of each point among those of its label, without the label's mean rank."""
    ranks = np.zeros(len(values))
    for label in np.unique(labels):
        members = labels == label
        ranks[members] = stats.rankdata(values[members]) - (members.sum() + 1) / 2
    return ranks


def _partial(series: list[Any]) -> float:
    """Correlation of the first two series, given the third if there is one."""
    if len(series[0]) < len(series) + 1:
        return math.nan
    centered = [values - values.mean() for values in series]
    x, y, *rest = centered
    for z in rest:
        square = float(z @ z)
        if square > 0:
            x, y = x - z * float(x @ z) / square, y - z * float(y @ z) / square
    # Rounding leaves a trace of what was removed, which must not count as a value that varies.
    left = [float(values @ values) for values in (x, y)]
    whole = [float(values @ values) for values in centered[:2]]
    if any(part <= 1e-12 * total for part, total in zip(left, whole, strict=True)):
        return math.nan
    return float(np.clip(float(x @ y) / math.sqrt(left[0] * left[1]), -1.0, 1.0))
