"""What attention does in one layer, without its pattern: a few numbers for each head and token.

The pattern A of a layer is [head, query, key]: 17 GB for 32 heads at 16,000 tokens. Nearly all that
is asked of it is a reduction over queries (how much attention does a *token* receive?) or over keys
(how sharp is a *query*?). `AttentionColumns` holds those. A collector that reads the site
`attention` is handed one for each layer, and says in `Collector.attention` what should be in it:

>>> class MostLookedAt(Collector):
...     sites = ("attention",)
...     attention = ColumnRequest(maximum=True)
...
...     def update(self, site, layer, columns):
...         self.layers.append(columns.maximum.amax(dim=0).cpu())

`of_pattern` computes them from a whole pattern; `observe.streaming_attention` computes the same
without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError

ATTENTION = "attention"
"""The site whose activation is an `AttentionColumns`, once a layer."""


@dataclass(frozen=True)
class ColumnRequest:
    """Which columns to compute. The sums are always there; the rest costs time when asked for."""

    maximum: bool = False
    """The largest weight that each token receives."""
    thresholds: tuple[float, ...] = ()
    """Count, for each of these, the queries that give a token more weight than it."""
    entropy: bool = False
    """The entropy of each query's weights."""

    def __post_init__(self) -> None:
        if not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise InputError(f"thresholds are {self.thresholds}; attention weights lie in [0, 1]")

    def __or__(self, other: ColumnRequest) -> ColumnRequest:
        """What either asks for."""
        return ColumnRequest(
            maximum=self.maximum or other.maximum,
            thresholds=tuple(sorted({*self.thresholds, *other.thresholds})),
            entropy=self.entropy or other.entropy,
        )


@dataclass(frozen=True)
class AttentionColumns:
    """Attention in one layer of one text, float32, on the device of the layer.

    "Later queries" of token t are those at i > t: its own look at itself is kept apart.
    """

    received: Float[Tensor, "head token"]
    """Sum over later queries of A[i, t]."""
    own: Float[Tensor, "head token"]
    """A[t, t]."""
    maximum: Float[Tensor, "head token"] | None = None
    """Largest A[i, t] of a later query; 0 for the last token, which has none."""
    above: Mapping[float, Float[Tensor, "head token"]] | None = None
    """For each threshold, how many later queries have A[i, t] above it."""
    entropy: Float[Tensor, "head query"] | None = None
    """Entropy of each query's weights, nats. A learned sink logit takes its share before."""

    @classmethod
    def of_pattern(
        cls, pattern: Float[Tensor, "head query key"], request: ColumnRequest
    ) -> AttentionColumns:
        """Reduce a whole pattern."""
        own = pattern.diagonal(dim1=1, dim2=2).float()
        entropy = None
        if request.entropy:
            entropy = torch.special.entr(pattern.float()).sum(dim=-1)
        later = pattern.float().tril(-1) if request.maximum or request.thresholds else None
        return cls(
            received=pattern.sum(dim=1, dtype=torch.float32) - own,
            own=own,
            maximum=None if later is None or not request.maximum else later.amax(dim=1),
            above=None
            if later is None or not request.thresholds
            else {
                threshold: (later > threshold).sum(dim=1).float()
                for threshold in request.thresholds
            },
            entropy=entropy,
        )
