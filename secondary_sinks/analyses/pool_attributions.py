"""Which MLPs write the sinks of many texts, how often, and how sure is that?

Sinks of one text are not independent: they share the text, its primary and often their token. So
the bootstrap resamples texts, and the permutation test flips the signs of texts. A text with many
sinks moves a mean more, and the interval accounts for that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from secondary_sinks.analyses.attribute_to_mlps import MlpAttribution, spell_writers
from secondary_sinks.errors import InputError
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.writers import gains_over_random
from secondary_sinks.statistics import grouped_interval, sign_flip_p_value

if TYPE_CHECKING:
    import pandas as pd


def pool_attributions(
    attributions: Sequence[MlpAttribution], *, seed: int = 0
) -> PooledAttribution:
    """Which MLPs write the sinks of several texts of one model, and how sure is that?

    >>> sink_maps = ss.detect_sinks(model, texts)
    >>> attributions = [ss.attribute_to_mlps(model, s) for s in sink_maps if s.secondary]
    >>> ss.pool_attributions(attributions).to_frame()

    Not evidence for: anything beyond texts of the kind that was given. Texts without secondary
    sinks have no attribution and are not counted; tokens that are not sinks are left out.

    Args:
        attributions: from `attribute_to_mlps`, each of another text.
        seed: of the bootstrap and of the permutations.

    Raises:
        InputError: no attributions, something else in their place, attributions of different
            models, or none of a sink.
    """
    for entry in attributions:
        if not isinstance(entry, MlpAttribution):
            raise InputError(f"expected results of attribute_to_mlps, got {type(entry).__name__}")
    models = {(a.provenance.model.name, a.provenance.weights) for a in attributions}
    if len(models) != 1:
        raise InputError(
            f"attributions of {len(models)} models; pass those of several texts of one model"
        )
    every = [
        _PooledSink(
            text,
            sink.writer,
            sink.verdict.length_left,
            sink.verdict.transplant_share,
            _mean(gains_over_random(c for c in attribution.controls if c.sink == index)),
            sink.feeders,
        )
        for text, attribution in enumerate(attributions)
        for index, sink in enumerate(attribution.sinks)
        if sink.kind != "chosen"
    ]
    if not every:
        raise InputError("these attributions are of tokens that are not sinks")
    layers = {sink.writer for sink in every}
    writers = [_pooled(every, layer, seed) for layer in layers]
    writers.sort(key=lambda w: (-w.n_sinks, math.inf if w.layer is None else w.layer))
    return PooledAttribution(
        writers=tuple(writers),
        n_sinks=len(every),
        n_texts=len(attributions),
        provenance=attributions[0].provenance.extended(seed=seed),
    )


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
    """Share of all sinks that this MLP wrote."""
    length_left: Estimate
    """Share of a sink's length along the sink direction that is left without the output of its
    candidate."""
    transplant_share: Estimate
    """Share of the ordinary tokens that the candidate's output makes sinks of."""
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
    provenance: Provenance
    """Of the first text."""

    def __repr__(self) -> str:
        writers = spell_writers(w.layer for w in self.writers for _ in range(w.n_sinks))
        name, n_texts = self.provenance.model.name, counted(self.n_texts, "text")
        return f"PooledAttribution({name!r}, {n_texts}, {writers})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each writer."""
        import pandas as pd

        rows = []
        for writer in self.writers:
            row: dict[str, object] = {
                "writer": writer.layer,
                "n_sinks": writer.n_sinks,
                "n_texts": writer.n_texts,
            }
            for name in ("share", "length_left", "transplant_share", "gain_over_random"):
                estimate = getattr(writer, name)
                row |= {
                    name: estimate.value,
                    f"{name}_low": estimate.low,
                    f"{name}_high": estimate.high,
                }
            row |= {"p_value": writer.p_value, "feeders": writer.feeders}
            rows.append(row)
        return pd.DataFrame(rows).astype({"writer": "Int64"})


class _PooledSink(NamedTuple):
    text: int
    writer: int | None
    length_left: float
    transplant_share: float
    gain_over_random: float
    feeders: tuple[int, ...]


def _pooled(every: Sequence[_PooledSink], layer: int | None, seed: int) -> PooledWriter:
    written = [sink for sink in every if sink.writer == layer]
    gains = [(sink.text, sink.gain_over_random) for sink in written]
    feeders = Counter(feeder for sink in written for feeder in sink.feeders)
    return PooledWriter(
        layer=layer,
        n_sinks=len(written),
        n_texts=len({sink.text for sink in written}),
        share=_estimate([(sink.text, float(sink.writer == layer)) for sink in every], seed),
        length_left=_estimate([(sink.text, sink.length_left) for sink in written], seed),
        transplant_share=_estimate([(sink.text, sink.transplant_share) for sink in written], seed),
        gain_over_random=_estimate(gains, seed),
        p_value=sign_flip_p_value(_text_means(gains), alternative="greater", seed=seed),
        feeders=dict(sorted(feeders.items())),
    )


def _estimate(by_text: Sequence[tuple[int, float]], seed: int) -> Estimate:
    """The mean of (text, value) pairs; NaN values are left out."""
    known = [(text, value) for text, value in by_text if not math.isnan(value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan)
    values = np.array([value for _, value in known])
    low, high = grouped_interval(
        [text for text, _ in known], lambda index: float(values[index].mean()), seed=seed
    )
    return Estimate(float(values.mean()), low, high)


def _text_means(by_text: Sequence[tuple[int, float]]) -> torch.Tensor:
    values: dict[int, list[float]] = {}
    for text, value in by_text:
        if not math.isnan(value):
            values.setdefault(text, []).append(value)
    return torch.tensor([_mean(values[text]) for text in sorted(values)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
