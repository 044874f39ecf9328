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
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.attention_replaced import AttentionInputs

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
    """The entropy of each query's weights, and what it is measured by: their sum, and how many keys
    the query sees."""
    log_sum_exp: bool = False
    """The logarithm of what each query's weights were divided by."""
    inputs: bool = False
    """Queries, keys and values themselves: as large as activations, to be kept with care."""

    def __post_init__(self) -> None:
        if not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise InputError(f"thresholds are {self.thresholds}; attention weights lie in [0, 1]")

    def __or__(self, other: ColumnRequest) -> ColumnRequest:
        """What either asks for."""
        return ColumnRequest(
            maximum=self.maximum or other.maximum,
            thresholds=tuple(sorted({*self.thresholds, *other.thresholds})),
            entropy=self.entropy or other.entropy,
            log_sum_exp=self.log_sum_exp or other.log_sum_exp,
            inputs=self.inputs or other.inputs,
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
    log_sum_exp: Float[Tensor, "head query"] | None = None
    """Logarithm of the sum of exponentials of each query's logits, a learned sink logit's among
    them. A pattern does not tell it: of streamed attention only."""
    inputs: AttentionInputs | None = None
    """What it was computed from, with a batch of this text alone: of streamed attention only."""
    total: Float[Tensor, "head query"] | None = None
    """Sum of each query's weights: 1, less what a learned sink logit takes."""
    n_visible: Float[Tensor, "query"] | None = None
    """How many keys each query sees. In a pattern those from the farthest on that any head gives
    any weight."""

    @classmethod
    def zeros(
        cls, n_heads: int, n_tokens: int, request: ColumnRequest, device: torch.device
    ) -> AttentionColumns:
        """Of no queries yet."""

        def zeros() -> Tensor:
            return torch.zeros(n_heads, n_tokens, device=device)

        return cls(
            received=zeros(),
            own=zeros(),
            maximum=zeros() if request.maximum else None,
            above={threshold: zeros() for threshold in request.thresholds} or None,
            entropy=zeros() if request.entropy else None,
            log_sum_exp=zeros() if request.log_sum_exp else None,
        )

    def add(self, other: AttentionColumns) -> None:
        """Take in the columns of other queries, or other heads, of the same text, in place."""
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs
        if self.maximum is not None and other.maximum is not None:
            torch.maximum(self.maximum, other.maximum, out=self.maximum)

    def _sums(self) -> list[Tensor]:
        """All that adds up over queries; what belongs to one query is 0 in the others' columns."""
        found = (self.received, self.own, self.entropy, self.log_sum_exp)
        return [one for one in (*found, *(self.above or {}).values()) if one is not None]

    def measured(
        self, window: int | None, sink_logits: Float[Tensor, "head"] | None
    ) -> AttentionColumns:
        """These columns of causal attention, if they hold entropies, with `total` and `n_visible`.

        Args:
            window: how many keys a query sees, itself included; None: all.
            sink_logits: a logit a head that joins each softmax and whose weight goes nowhere.
        """
        if self.entropy is None or self.log_sum_exp is None:
            return self
        n_tokens = self.entropy.shape[1]
        n_visible = torch.arange(1.0, n_tokens + 1, device=self.entropy.device)
        total = torch.ones_like(self.entropy)
        if sink_logits is not None:
            total -= (sink_logits.float()[:, None] - self.log_sum_exp).exp()
        return replace(self, total=total, n_visible=n_visible.clamp_max(window or n_tokens))

    @classmethod
    def of_pattern(
        cls, pattern: Float[Tensor, "head query key"], request: ColumnRequest
    ) -> AttentionColumns:
        """Reduce a whole pattern."""
        own = pattern.diagonal(dim1=1, dim2=2).float()
        entropy = total = n_visible = None
        if request.entropy:
            entropy = torch.special.entr(pattern.float()).sum(dim=-1)
            total = pattern.sum(dim=-1, dtype=torch.float32)
            farthest = (pattern > 0).any(dim=0).float().argmax(dim=-1)
            n_visible = torch.arange(1.0, len(farthest) + 1, device=pattern.device) - farthest
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
            total=total,
            n_visible=n_visible,
        )
