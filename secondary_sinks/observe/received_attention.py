"""More of what attention does than its mean: the largest look, how many look, how sharply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.collectors import Collector, Run


@dataclass(frozen=True)
class Received:
    """Attention by layer and head, reduced over later queries i > t or over keys."""

    maximum: Float[Tensor, "layer head token"]
    """Largest weight that a later query gives the token; NaN for the last token."""
    thresholds: tuple[float, ...]
    share_above: Float[Tensor, "threshold layer head token"]
    """Share of later queries that give the token more weight than the threshold; NaN for the last
    token. A query whose weight lies on the threshold can fall on either side by rounding."""
    entropy: Float[Tensor, "layer head query"]
    """Entropy of each query's weights, nats: 0 if it looks at one token, log(i + 1) if at all."""

    @property
    def mean_entropy(self) -> Float[Tensor, "layer head"]:
        """Mean entropy over queries. Later queries have more keys to look at, so compare texts of
        the same length."""
        return self.entropy.mean(dim=-1)


class ReceivedAttention(Collector):
    """Maximum, thresholded shares and entropy of attention. Result: `Received`.

    Means are collected by `SinkScores`. None of these is evidence that what is looked at is used.

    Args:
        thresholds: weights above which a query counts as looking at a token.
        name: under which the result is found.

    Raises:
        InputError: a threshold outside [0, 1].
    """

    sites = (ATTENTION,)

    def __init__(self, thresholds: Sequence[float] = (0.3,), *, name: str | None = None):
        self.attention = ColumnRequest(maximum=True, thresholds=tuple(thresholds), entropy=True)
        self.name = name or "ReceivedAttention"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[tuple[Tensor, Tensor, Tensor]] = []
        later = torch.arange(run.n_tokens - 1, -1, -1)
        self._n_later = later.float().masked_fill(later == 0, torch.nan)

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Take the columns of one layer."""
        counts = activation.above or {}
        above = [counts[threshold].cpu() for threshold in self.attention.thresholds]
        maximum = cast(Tensor, activation.maximum).cpu()
        shape = (0, *maximum.shape)
        self._layers.append(
            (
                maximum.masked_fill(torch.isnan(self._n_later), torch.nan),
                (torch.stack(above) if above else torch.empty(shape)) / self._n_later,
                cast(Tensor, activation.entropy).cpu(),
            )
        )

    def result(self) -> Received:
        """What was received, by layer and head."""
        maximum, above, entropy = zip(*self._layers, strict=True)
        return Received(
            maximum=torch.stack(maximum),
            thresholds=self.attention.thresholds,
            share_above=torch.stack(above, dim=1),
            entropy=torch.stack(entropy),
        )
