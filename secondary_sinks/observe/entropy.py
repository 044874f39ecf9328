"""How spread out is attention: the entropy of each query's weights.

A head that looks at one sink has an entropy near 0, one that averages over all it can see that of
the uniform distribution, the logarithm of the number of visible keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.observe.collectors import Collector, Run


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

    The visible keys of a query are those from the farthest key on that any head of the layer gives
    any weight; with a sliding window these are fewer than all. Where rows of weights do not add up
    to 1, because a model lets heads look at nothing, they are normalized first: it is the entropy
    among the keys.

    A low entropy is not evidence of a sink: attention to the preceding token has one as well.
    """

    sites = ("pattern",)

    def __init__(self, name: str | None = None):
        self.name = name or "AttentionEntropy"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._entropy: list[Tensor] = []
        self._normalized: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Reduce one layer's pattern [head, query, key] over keys."""
        weight = activation.float()
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        entropy = torch.special.entr(weight).sum(dim=-1)
        seen = (activation > 0).any(dim=0)
        farthest = seen.float().argmax(dim=-1)
        visible = torch.arange(1, len(farthest) + 1, device=farthest.device) - farthest
        most = visible.float().log()
        self._entropy.append(entropy.cpu())
        self._normalized.append((entropy / most.masked_fill(visible < 2, torch.nan)).cpu())

    def result(self) -> Entropies:
        """Means over queries and over heads."""
        entropy, normalized = torch.stack(self._entropy), torch.stack(self._normalized)
        return Entropies(
            by_head=entropy.mean(dim=2),
            by_query=entropy.mean(dim=1),
            normalized_by_head=normalized.nanmean(dim=2),
            normalized_by_query=normalized.mean(dim=1),
        )
