"""Attention that a token draws from all of the text after it, and not from some passages alone.

A mean over later queries does not tell an attention sink from a token that a few of them copy from,
or that is looked at for being near. So the queries after a token are divided into segments
(`attention_columns.segment_length`), and in each one the token's attention, averaged over all heads
and the queries of the segment, is divided by what uniform attention would give. The *steady
attention* of a token is the lower quartile of these values: three quarters of the segments give it
at least that much. It is 1 where attention is uniform.

Neither the residual stream nor the primary sink enters, so it can check a criterion that reads
both (`sinks.attention_check`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.observe.attention_columns import (
    ATTENTION,
    AttentionColumns,
    ColumnRequest,
    segment_length,
)
from secondary_sinks.observe.collectors import Collector, Run

MIN_SEGMENTS = 8
"""Fewest segments after a token, all of whose queries see it, of which a quartile is taken."""


class SteadyAttention(Collector):
    """Steady attention of each token. Result: Float[Tensor, " layer token"].

    NaN where fewer than `MIN_SEGMENTS` whole segments of later queries see the token, in layers
    without attention, and in every layer where attention is fused, which computes no segments.

    Not evidence for: that the token is a sink in the sense of the paper, which asks for the
    direction of its residual as well.
    """

    sites = (ATTENTION,)
    attention = ColumnRequest(segments=True)

    def __init__(self, *, name: str | None = None):
        self.name = name or "SteadyAttention"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Add one layer."""
        self._layers.append(_steady(activation))

    def result(self) -> Float[Tensor, " layer token"]:
        """Steady attention by layer."""
        return torch.stack(self._layers)


def _steady(columns: AttentionColumns) -> Float[Tensor, " token"]:
    n_heads, n_tokens = columns.received.shape
    unknown = torch.full((n_tokens,), torch.nan)
    if columns.by_segment is None:
        return unknown
    length = segment_length(columns.n_visible)
    n_whole = n_tokens // length
    if n_whole < MIN_SEGMENTS:
        return unknown
    visible = columns.n_visible[: n_whole * length].view(n_whole, length)
    expected = (1 / visible).sum(dim=1, keepdim=True)
    share = columns.by_segment[:n_whole].cpu() / n_heads / expected
    # A segment counts for the tokens before it that even its last query sees.
    token = torch.arange(n_tokens)
    start = torch.arange(n_whole)[:, None] * length
    last = start + length - 1
    counts = (token < start) & (token > last - visible[:, -1:])
    in_order = share.masked_fill(~counts, torch.inf).sort(dim=0).values
    n_segments = counts.sum(dim=0)
    quartile = in_order.gather(0, ((n_segments - 1).clamp_min(0) // 4)[None])[0]
    return quartile.masked_fill(n_segments < MIN_SEGMENTS, torch.nan)
