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

With a sliding window of w keys, a token is seen by w - 1 later queries, however long the text. A
mean over *all* later queries would fall with the length of the text although no query attends less,
so means are taken over the later queries that see the token (`AttentionColumns.n_seeing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.host.forward import Observer
from secondary_sinks.host.sites import Site, attention_layers
from secondary_sinks.host.visible_keys import n_visible_within, visible_keys_read

ATTENTION = "attention"
"""The site whose activation is an `AttentionColumns`, one for each layer."""

MAX_SEGMENT = 64
"""Most queries of a segment."""


def segment_length(n_visible: Float[Tensor, " query"]) -> int:
    """Queries of a segment: from 8 to `MAX_SEGMENT`, a 32nd of the text or of a sliding window."""
    return min(max(int(n_visible.max()) // 32, 8), MAX_SEGMENT)


def segments_of(queries: slice, length: int) -> Iterator[tuple[int, slice]]:
    """The segments that a run of queries touches, each with the part of the run that is in it."""
    for segment in range(queries.start // length, (queries.stop - 1) // length + 1):
        start = max(queries.start, segment * length)
        stop = min(queries.stop, (segment + 1) * length)
        yield segment, slice(start, stop)


@dataclass(frozen=True)
class ColumnRequest:
    """Which statistics to compute. The sums always are; the others take extra time."""

    maximum: bool = False
    """The largest weight that each token receives."""
    thresholds: tuple[float, ...] = ()
    """For each threshold, count the queries that give a token more weight than this."""
    entropy: bool = False
    """The entropy of each query's weights, and their sum."""
    log_sum_exp: bool = False
    """The logarithm of each query's softmax denominator."""
    segments: bool = False
    """The sums of each segment of queries (`segment_length`), over all heads."""
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
            segments=self.segments or other.segments,
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
    n_visible: Float[Tensor, " query"]
    """Number of keys that each query sees, itself and those right before it; 0 in a layer without
    attention; on the CPU."""
    maximum: Float[Tensor, " head token"] | None = None
    """Largest A[i, t] of a later query; 0 for the last token, which has none."""
    above: Mapping[float, Float[Tensor, " head token"]] | None = None
    """For each threshold, how many later queries have A[i, t] above it."""
    entropy: Float[Tensor, " head query"] | None = None
    """Entropy of each query's weights, nats, which a learned sink logit has reduced."""
    log_sum_exp: Float[Tensor, " head query"] | None = None
    """Logarithm of the sum of exponentials of each query's logits, including a learned sink logit.
    Only of streamed attention: a pattern does not determine it."""
    by_segment: Float[Tensor, " segment token"] | None = None
    """Sum over all heads and the later queries of each segment of A[i, t]. None as well in a layer
    without attention, and where attention is fused."""
    inputs: AttentionInputs | None = None
    """Queries, keys and values, with a batch of this text alone. Only of streamed attention."""
    total: Float[Tensor, " head query"] | None = None
    """Sum of each query's weights: 1, less the share of a learned sink logit."""

    @property
    def n_seeing(self) -> Float[Tensor, " token"]:
        """Number of later queries that see each token; on the CPU."""
        return _sum_over_seeing(self.n_visible, torch.ones_like(self.n_visible))

    @property
    def uniform_score(self) -> Float[Tensor, " token"]:
        """Mean weight that a token would receive from the later queries that see it if each query
        attended uniformly to the keys that it sees; NaN for a token that none sees; on the CPU."""
        received = _sum_over_seeing(self.n_visible, 1 / self.n_visible.double())
        n_seeing = self.n_seeing
        return received / n_seeing.masked_fill(n_seeing == 0, torch.nan)

    @classmethod
    def zeros(
        cls,
        n_heads: int,
        n_tokens: int,
        window: int | None,
        request: ColumnRequest,
        device: torch.device,
    ) -> AttentionColumns:
        """The columns before any query was added, where a query sees `window` keys (None: all)."""

        def zeros() -> Tensor:
            return torch.zeros(n_heads, n_tokens, device=device)

        n_visible = n_visible_within(n_tokens, window)
        n_segments = -(-n_tokens // segment_length(n_visible))
        return cls(
            received=zeros(),
            own=zeros(),
            n_visible=n_visible,
            maximum=zeros() if request.maximum else None,
            above={threshold: zeros() for threshold in request.thresholds} or None,
            entropy=zeros() if request.entropy else None,
            log_sum_exp=zeros() if request.log_sum_exp else None,
            by_segment=torch.zeros(n_segments, n_tokens, device=device)
            if request.segments
            else None,
        )

    @classmethod
    def of_no_attention(
        cls, n_heads: int, n_tokens: int, request: ColumnRequest
    ) -> AttentionColumns:
        """The columns of a layer without attention: no query sees a token, and all else is NaN."""
        nan = torch.full((n_heads, n_tokens), torch.nan)
        return cls(
            received=nan,
            own=nan,
            maximum=nan,
            above=dict.fromkeys(request.thresholds, nan),
            entropy=nan,
            total=nan,
            n_visible=torch.zeros(n_tokens),
        )

    def add(self, other: AttentionColumns) -> None:
        """Add the columns of other queries, or other heads, of the same text, in place."""
        for total, addend in zip(self._sums(), other._sums(), strict=True):
            total += addend
        if self.maximum is not None and other.maximum is not None:
            torch.maximum(self.maximum, other.maximum, out=self.maximum)

    def _sums(self) -> list[Tensor]:
        """Everything that adds up over queries; values of one query are 0 in columns of others."""
        always = (self.received, self.own, self.entropy, self.log_sum_exp, self.by_segment)
        return [part for part in (*always, *(self.above or {}).values()) if part is not None]

    def with_total(self, sink_logits: Float[Tensor, " head"] | None) -> AttentionColumns:
        """The same columns with `total` beside entropies.

        Args:
            sink_logits: a learned logit for each head that joins every softmax.
        """
        if self.entropy is None or self.log_sum_exp is None:
            return self
        total = torch.ones_like(self.entropy)
        if sink_logits is not None:
            total -= (sink_logits.float()[:, None] - self.log_sum_exp).exp()
        return replace(self, total=total)

    @classmethod
    def of_pattern(
        cls,
        pattern: Float[Tensor, " head query key"],
        request: ColumnRequest,
        n_visible: Float[Tensor, " query"] | None = None,
    ) -> AttentionColumns:
        """Reduce a whole pattern.

        Args:
            pattern: weights.
            request: which columns to compute.
            n_visible: number of keys that each query sees. If it is not known, every query is taken
                to see as far back as the one that gives weight to the farthest key, in any head.
        """
        own = pattern.diagonal(dim1=1, dim2=2).float()
        entropy = total = None
        if request.entropy:
            entropy = torch.special.entr(pattern.float()).sum(dim=-1)
            total = pattern.sum(dim=-1, dtype=torch.float32)
        if n_visible is None:
            n_visible = _n_visible_in(pattern)
        later = pattern.float().tril(-1) if request.maximum or request.thresholds else None
        return cls(
            received=pattern.sum(dim=1, dtype=torch.float32) - own,
            own=own,
            n_visible=n_visible,
            maximum=None if later is None or not request.maximum else later.amax(dim=1),
            above=None
            if later is None or not request.thresholds
            else {
                threshold: (later > threshold).sum(dim=1).float()
                for threshold in request.thresholds
            },
            entropy=entropy,
            total=total,
            by_segment=_by_segment(pattern, n_visible) if request.segments else None,
        )


@contextmanager
def eager_columns(
    model: Any,
    lengths: Sequence[int],
    request: ColumnRequest,
    receive: Callable[[int, list[AttentionColumns]], None],
) -> Iterator[list[tuple[Site, Observer]]]:
    """Observers that reduce the patterns of an eager pass to columns.

    Args:
        model: the model, which must run within the context.
        lengths: number of tokens of every text of the batch, without the padding on its right.
        request: which columns to compute.
        receive: called once for each layer with attention, with one `AttentionColumns` for each
            text.

    Yields:
        One observer for each layer with attention.
    """

    def reader(layer: int) -> Observer:
        def read(patterns: Float[Tensor, " text head query key"]) -> None:
            counts = n_visible.get(layer)
            receive(
                layer,
                [
                    AttentionColumns.of_pattern(
                        pattern[:, :n, :n], request, None if counts is None else counts[:n]
                    )
                    for pattern, n in zip(patterns, lengths, strict=True)
                ],
            )

        return read

    with visible_keys_read(model, lengths) as n_visible:
        yield [(Site("pattern", layer), reader(layer)) for layer in attention_layers(model)]


def _n_visible_in(pattern: Float[Tensor, " head query key"]) -> Float[Tensor, " query"]:
    """How many keys each query sees, as far as a pattern shows."""
    farthest = (pattern > 0).any(dim=0).float().argmax(dim=-1).cpu()
    reach = torch.arange(1, len(farthest) + 1) - farthest
    return n_visible_within(len(reach), int(reach.max()))


def _by_segment(
    pattern: Float[Tensor, " head query key"], n_visible: Float[Tensor, " query"]
) -> Float[Tensor, " segment token"]:
    over_heads = pattern.sum(dim=0, dtype=torch.float32).fill_diagonal_(0)
    parts = segments_of(slice(0, len(n_visible)), segment_length(n_visible))
    return torch.stack([over_heads[queries].sum(dim=0) for _, queries in parts])


def _sum_over_seeing(
    n_visible: Float[Tensor, " query"], value: Float[Tensor, " query"]
) -> Float[Tensor, " token"]:
    """Sum of a value of each query over the later queries that see a token."""
    query = torch.arange(len(n_visible))
    # Query i adds to tokens i + 1 - n_visible[i] ... i - 1: up at the first, down at i. One that
    # sees itself alone, or nothing, adds to none.
    first = (query + 1 - n_visible.long()).minimum(query)
    change = torch.zeros(len(n_visible) + 1, dtype=torch.float64)
    change.index_add_(0, first, value.double())
    change.index_add_(0, query, -value.double())
    return change.cumsum(dim=0)[:-1].float()
