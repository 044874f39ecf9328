"""What attention does in one layer, without its pattern: a few numbers for each head and token.

The pattern A of a layer is [head, query, key]: 17 GB for 32 heads at 16,000 tokens. Most questions
need only a reduction over queries (how much attention does a *token* receive?) or over keys (how
concentrated is the attention of a *query*?). `AttentionColumns` holds those. A collector that reads
the site `attention` gets one for each layer, and requests what it should contain in
`Collector.attention`:

>>> class LargestWeight(Collector):
...     sites = ("attention",)
...     attention = ColumnRequest(maximum=True)
...
...     def update(self, site, layer, columns):
...         self.layers.append(columns.maximum.amax(dim=0).cpu())

`AttentionColumns.of_pattern` computes them from a whole pattern; `observe.streaming_attention`
computes the same without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.host.forward import Observer
from secondary_sinks.host.sites import Site

ATTENTION = "attention"
"""The site whose activation is an `AttentionColumns`, one for each layer."""


@dataclass(frozen=True)
class ColumnRequest:
    """Which statistics to compute. The sums always are; the others take extra time."""

    maximum: bool = False
    """The largest weight that each token receives."""
    thresholds: tuple[float, ...] = ()
    """For each threshold, count the queries that give a token more weight than this."""
    entropy: bool = False
    """The entropy of each query's weights, and what normalizes it: their sum, and the number of
    keys that the query sees."""
    log_sum_exp: bool = False
    """The logarithm of each query's softmax denominator."""
    inputs: bool = False
    """Queries, keys and values themselves, which are as large as activations."""

    def __post_init__(self) -> None:
        if not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise InputError(
                f"thresholds must lie in [0, 1], as attention weights do, got {self.thresholds}"
            )

    def __or__(self, other: ColumnRequest) -> ColumnRequest:
        """A request for all that either asks for."""
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

    The "later queries" of token t are those at i > t; its attention to itself is separate.
    """

    received: Float[Tensor, " head token"]
    """Sum over later queries of A[i, t]."""
    own: Float[Tensor, " head token"]
    """A[t, t]."""
    maximum: Float[Tensor, " head token"] | None = None
    """Largest A[i, t] of a later query; 0 for the last token, which has none."""
    above: Mapping[float, Float[Tensor, " head token"]] | None = None
    """For each threshold, how many later queries have A[i, t] above it."""
    entropy: Float[Tensor, " head query"] | None = None
    """Entropy of each query's weights, nats, which a learned sink logit has reduced."""
    log_sum_exp: Float[Tensor, " head query"] | None = None
    """Logarithm of the sum of exponentials of each query's logits, including a learned sink logit.
    Only of streamed attention: a pattern does not determine it."""
    inputs: AttentionInputs | None = None
    """Queries, keys and values, with a batch of this text alone. Only of streamed attention."""
    total: Float[Tensor, " head query"] | None = None
    """Sum of each query's weights: 1, less the share of a learned sink logit."""
    n_visible: Float[Tensor, " query"] | None = None
    """Number of keys that each query sees; in a pattern, from the farthest key with any weight in
    any head to the query itself."""

    @classmethod
    def zeros(
        cls, n_heads: int, n_tokens: int, request: ColumnRequest, device: torch.device
    ) -> AttentionColumns:
        """The columns before any query was added."""

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

    @classmethod
    def of_no_attention(
        cls, n_heads: int, n_tokens: int, request: ColumnRequest
    ) -> AttentionColumns:
        """NaN everywhere: the columns of a layer without attention."""
        nan = torch.full((n_heads, n_tokens), torch.nan)
        return cls(
            received=nan,
            own=nan,
            maximum=nan,
            above=dict.fromkeys(request.thresholds, nan),
            entropy=nan,
            total=nan,
            n_visible=nan[0],
        )

    def add(self, other: AttentionColumns) -> None:
        """Add the columns of other queries, or other heads, of the same text, in place."""
        for total, addend in zip(self._sums(), other._sums(), strict=True):
            total += addend
        if self.maximum is not None and other.maximum is not None:
            torch.maximum(self.maximum, other.maximum, out=self.maximum)

    def _sums(self) -> list[Tensor]:
        """Everything that adds up over queries; values of one query are 0 in columns of others."""
        always = (self.received, self.own, self.entropy, self.log_sum_exp)
        return [part for part in (*always, *(self.above or {}).values()) if part is not None]

    def measured(
        self, window: int | None, sink_logits: Float[Tensor, " head"] | None
    ) -> AttentionColumns:
        """The same columns, of causal attention, with `total` and `n_visible` beside entropies.

        Args:
            window: how many keys a query sees, itself included; None: all.
            sink_logits: a learned logit for each head that joins every softmax.
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
        cls, pattern: Float[Tensor, " head query key"], request: ColumnRequest
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


def pattern_readers(
    layers: Iterable[int],
    lengths: Sequence[int],
    request: ColumnRequest,
    receive: Callable[[int, list[AttentionColumns]], None],
) -> list[tuple[Site, Observer]]:
    """Observers that reduce the patterns of an eager pass to columns.

    Args:
        layers: those that have attention.
        lengths: number of tokens of every text of the batch, without the padding on its right.
        request: which columns to compute.
        receive: called once for each layer, with one `AttentionColumns` for each text.
    """

    def reader(layer: int) -> Observer:
        def read(patterns: Float[Tensor, " text head query key"]) -> None:
            of_texts = zip(patterns, lengths, strict=True)
            receive(
                layer, [AttentionColumns.of_pattern(p[:, :n, :n], request) for p, n in of_texts]
            )

        return read

    return [(Site("pattern", layer), reader(layer)) for layer in layers]
