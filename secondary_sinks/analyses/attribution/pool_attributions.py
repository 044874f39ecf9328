"""Attributions of many texts put together: how often which MLP writes, and how surely.

Sinks of one text are not independent: they share the text, its primary and often their token. So
what is resampled, and whose signs are flipped, is texts; a text with many sinks moves a mean more,
and the interval knows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from secondary_sinks.analyses.attribution.attribution_result import MlpAttribution
from secondary_sinks.errors import InputError
from secondary_sinks.result import Result
from secondary_sinks.statistics import grouped_interval, sign_flip_p_value

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Estimate:
    """A mean over sinks, with a 95 % interval from resampled texts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class PooledWriter:
    """What all sinks that one MLP wrote have in common."""

    layer: int | None
    """The writer; None for sinks whose tests disagree."""
    n_sinks: int
    n_texts: int
    share: Estimate
    """Share of all sinks that are its."""
    length_left: Estimate
    """Share of a sink's length along the sink direction that is left without this MLP's output."""
    transplant_share: Estimate
    """Share of the ordinary tokens that its output makes sinks of."""
    gain_over_random: Estimate
    """Length along the sink direction that a transplant gains, minus what a random direction of the
    same norm gains in the same tokens."""
    p_value: float
    """Sign-flip p-value of that difference, one-sided, over the means of texts. n texts cannot give
    less than 2^-n."""
    feeders: dict[int, int]
    """How many of the sinks need each earlier layer."""


@dataclass(frozen=True)
class PooledAttribution(Result):
    """Writers over many texts of one model; see `pool_attributions`."""

    writers: tuple[PooledWriter, ...]
    """By number of sinks, largest first."""
    n_sinks: int
    n_texts: int
    model: str
    seed: int

    def __repr__(self) -> str:
        found = ", ".join(
            f"{'no writer' if one.layer is None else f'MLP {one.layer}'} of {one.n_sinks}"
            for one in self.writers
        )
        return (
            f"PooledAttribution({self.model!r}, {self.n_sinks} sinks of {self.n_texts} texts, "
            f"writers: {found})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each writer."""
        import pandas as pd

        rows = []
        for one in self.writers:
            row: dict[str, object] = {
                "writer": one.layer,
                "n_sinks": one.n_sinks,
                "n_texts": one.n_texts,
            }
            for name in ("share", "length_left", "transplant_share", "gain_over_random"):
                estimate = getattr(one, name)
                row |= {
                    name: estimate.value,
                    f"{name}_low": estimate.low,
                    f"{name}_high": estimate.high,
                }
            row |= {"p_value": one.p_value, "feeders": one.feeders}
            rows.append(row)
        return pd.DataFrame(rows).astype({"writer": "Int64"})


def pool_attributions(
    attributions: Sequence[MlpAttribution], *, seed: int = 0
) -> PooledAttribution:
    """Put the attributions of several texts of one model together.

    Args:
        attributions: of one text each.
        seed: of the bootstrap and of the permutations.

    What it is not evidence for: anything beyond texts of the kind that was given. Texts without
    secondary sinks have no attribution and are not counted.

    Raises:
        InputError: no attributions, or of different models.
    """
    models = {(one.model.get("name"), one.n_layers) for one in attributions}
    if len(models) != 1:
        raise InputError(
            f"attributions of {len(models)} models; pass those of several texts of one model"
        )
    layers = {sink.writer for one in attributions for sink in one.sinks}
    writers = [_pooled(attributions, layer, seed) for layer in layers]
    writers.sort(key=lambda one: (-one.n_sinks, math.inf if one.layer is None else one.layer))
    return PooledAttribution(
        writers=tuple(writers),
        n_sinks=sum(len(one.sinks) for one in attributions),
        n_texts=len(attributions),
        model=str(models.pop()[0]),
        seed=seed,
    )


def _pooled(attributions: Sequence[MlpAttribution], layer: int | None, seed: int) -> PooledWriter:
    own = [
        (text, index)
        for text, one in enumerate(attributions)
        for index, sink in enumerate(one.sinks)
        if sink.writer == layer
    ]
    every = [(text, i) for text, one in enumerate(attributions) for i in range(len(one.sinks))]
    mine = set(own)

    def estimate(
        of: Callable[[MlpAttribution, int], float], sinks: Sequence[tuple[int, int]] = own
    ) -> Estimate:
        return _estimate([(text, of(attributions[text], index)) for text, index in sinks], seed)

    gains = [(text, _gain_over_random(attributions[text], index)) for text, index in own]
    feeders = [f for text, index in own for f in attributions[text].sinks[index].feeders]
    return PooledWriter(
        layer=layer,
        n_sinks=len(own),
        n_texts=len({text for text, _ in own}),
        share=_estimate([(pair[0], float(pair in mine)) for pair in every], seed),
        length_left=estimate(_length_left),
        transplant_share=estimate(_transplant_share),
        gain_over_random=_estimate(gains, seed),
        p_value=sign_flip_p_value(_means_of_texts(gains), alternative="greater", seed=seed),
        feeders={one: feeders.count(one) for one in sorted(set(feeders))},
    )


def _length_left(attribution: MlpAttribution, index: int) -> float:
    sink = attribution.sinks[index]
    left = attribution.mlp_zero.length[index, sink.verdict.candidate]
    return float(left) / sink.length


def _transplant_share(attribution: MlpAttribution, index: int) -> float:
    return float(attribution.transplant.share[index, attribution.sinks[index].verdict.candidate])


def _gain_over_random(attribution: MlpAttribution, index: int) -> float:
    """Mean over the tokens that got both the candidate's output and a random direction."""
    effects: dict[str, dict[int, float]] = {"writer": {}, "random_direction": {}}
    for one in attribution.controls:
        if (one.sink, one.test) == (index, "sufficiency") and one.kind in effects:
            effects[one.kind][one.position] = one.effect
    both = effects["writer"].keys() & effects["random_direction"].keys()
    gains = [effects["writer"][p] - effects["random_direction"][p] for p in both]
    return sum(gains) / len(gains) if gains else math.nan


def _means_of_texts(values: Sequence[tuple[int, float]]) -> torch.Tensor:
    known = [(text, value) for text, value in values if not math.isnan(value)]
    texts = sorted({text for text, _ in known})
    means = [np.mean([value for other, value in known if other == text]) for text in texts]
    return torch.tensor([float(mean) for mean in means])


def _estimate(values: Sequence[tuple[int, float]], seed: int) -> Estimate:
    known = [(text, value) for text, value in values if not math.isnan(value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan)
    numbers = np.array([value for _, value in known])

    def mean(index: np.ndarray) -> float:
        return float(numbers[index].mean())

    low, high = grouped_interval([text for text, _ in known], mean, seed=seed)
    return Estimate(float(numbers.mean()), low, high)
