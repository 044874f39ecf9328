"""How spread out is attention: the entropy of each query's weights.

A head that looks at one sink has an entropy near 0, one that averages over all it can see that of
the uniform distribution, the logarithm of the number of visible keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.collectors import Collector, Run

_LEAST = 1e-4
"""Least sum of a query's weights. Streamed, what a learned logit leaves is known to about 1e-6."""


@dataclass(frozen=True)
class Entropies:
    """Entropy of the attention weights of one text, in nats."""

    by_head: Float[Tensor, "layer head"]
    """Mean over queries."""
    by_query: Float[Tensor, "layer query"]
    """Mean over heads."""
    normalized_by_head: Float[Tensor, "layer head"]
    """Entropy over the logarithm of the number of visible keys, mean over queries that see more
    than one: 0 for a single key, 1 for uniform attention."""
    normalized_by_query: Float[Tensor, "layer query"]
    """The same, mean over heads; NaN for queries that see one key."""


class AttentionEntropy(Collector):
    """Entropy of every query's attention. Result: `Entropies`.

    With a sliding window a query sees fewer keys than all before it. Where rows of weights do not
    add up to 1, because a model lets heads look at nothing, they are normalized first: it is the
    entropy among the keys. Where less than a ten-thousandth is left of a row there is no such
    entropy, and the query does not count in that head's means.

    A low entropy is not evidence of a sink: attention to the preceding token has one as well.
    """

    sites = (ATTENTION,)
    attention = ColumnRequest(entropy=True)

    def __init__(self, name: str | None = None):
        self.name = name or "AttentionEntropy"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._entropy: list[Tensor] = []
        self._normalized: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Take the entropies of one layer."""
        unnormalized, total, visible = (
            cast(Tensor, one).cpu()
            for one in (activation.entropy, activation.total, activation.n_visible)
        )
        # Of weights w that add up to s: the sum of -w/s log(w/s) is that of -w log w, over s, and
        # the logarithm of s more.
        total = total.masked_fill(total < _LEAST, torch.nan)
        entropy = (unnormalized / total + total.log()).clamp_min(0)
        most = visible.masked_fill(visible < 2, torch.nan).log()
        self._entropy.append(entropy)
        self._normalized.append(entropy / most)

    def result(self) -> Entropies:
        """Means over queries and over heads."""
        entropy, normalized = torch.stack(self._entropy), torch.stack(self._normalized)
        return Entropies(
            by_head=entropy.nanmean(dim=2),
            by_query=entropy.nanmean(dim=1),
            normalized_by_head=normalized.nanmean(dim=2),
            normalized_by_query=normalized.nanmean(dim=1),
        )
