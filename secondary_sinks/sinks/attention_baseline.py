"""Attention drawn by a token, over what comparable tokens nearby draw.

A sink score alone says little. The attention that a token draws falls with the length of the text,
the first tokens are seen by queries with few other keys, the last ones by their neighbors, and a
sliding window hides whatever is far away. So a token is compared, head by head, with *baseline
tokens* near its position: those that are not aligned with the primary in any run of layers in which
it is massive. Only the heads that attend to the primary count: the direction that a secondary sink
shares with it is read by some heads, and the others would hide them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

N_NEIGHBORS = 32
"""Number of baseline tokens near a token that it is compared with."""


@dataclass(frozen=True)
class AttentionBaseline:
    """Attention that the baseline tokens of one text draw, by layer, head and position."""

    weight: Float[Tensor, " layer head"]
    """Attention that the primary draws beyond its own baseline. All heads weigh alike in a layer in
    which none attends to it."""
    median: Float[Tensor, " layer head block"]
    """Median relative score of each block of baseline tokens."""
    examples: Int[Tensor, " example"]
    """Positions of the baseline tokens, in order; every `block_size` of them are a block."""
    block_size: int
    uniform: Float[Tensor, " token"]
    """`uniform_score` of the text."""

    @property
    def n_tokens(self) -> int:
        """Length of the text."""
        return len(self.uniform)

    @classmethod
    def of(
        cls,
        score: Float[Tensor, " layer head token"],
        primary: int,
        *,
        examples: Bool[Tensor, " token"],
        min_queries: int,
    ) -> AttentionBaseline:
        """Measure the baseline of a text.

        Args:
            score: mean attention from later queries, for every token that has at least one.
            primary: position of the primary sink.
            examples: which tokens are baseline tokens.
            min_queries: fewest later queries of an example.
        """
        n_tokens = score.shape[2]
        uniform = uniform_score(n_tokens)
        n_queries = torch.arange(n_tokens - 1, -1, -1)
        places = (examples & (n_queries >= min_queries)).nonzero().flatten()
        if len(places) == 0:  # a very short text: any token with a later query
            places = (n_queries >= 1).nonzero().flatten()
        size = min(N_NEIGHBORS, len(places))
        n_blocks = len(places) // size
        relative = (score / uniform)[:, :, places[: n_blocks * size]]
        blocks = rearrange(relative, "layer head (block item) -> layer head block item", item=size)
        median = blocks.median(dim=-1).values
        # Uniform weights first: what the primary draws beyond its baseline needs the baseline.
        plain = cls(torch.ones(score.shape[:2]), median, places, size, uniform)
        here = torch.tensor([primary])
        beyond = score[:, :, primary] - plain._expected(here)[:, :, 0] * uniform[primary]
        weight = beyond.clamp_min(0)
        unread = weight.sum(dim=1, keepdim=True) == 0
        return cls(weight.masked_fill(unread, 1.0), median, places, size, uniform)

    def ratio(
        self,
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> Float[Tensor, " layer item"]:
        """Attention drawn over the baseline, by layer.

        Scores are first divided by what uniform attention would give at that position; scores and
        baselines are averaged over heads with `weight`, then divided.

        Args:
            score: mean attention from later queries.
            positions: where each item stands; by default item t is token t. The last token, which
                no later query can see, has NaN.
        """
        if positions is None:
            positions = torch.arange(score.shape[2])
        expected = self._over_heads(self._expected(positions))
        # Clamped: where baseline tokens draw no attention at all, a token without any has ratio 0.
        return self.drawn(score, positions) / expected.clamp_min(torch.finfo(torch.float32).tiny)

    def drawn(
        self,
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> Float[Tensor, " layer item"]:
        """Attention drawn over what uniform attention would give, averaged over heads with
        `weight`; the arguments are those of `ratio`."""
        uniform = self.uniform if positions is None else self.uniform[positions]
        return self._over_heads(score / uniform)

    def _over_heads(
        self, values: Float[Tensor, " layer head item"]
    ) -> Float[Tensor, " layer item"]:
        share = self.weight / self.weight.sum(dim=1, keepdim=True)
        return einsum(share, values, "layer head, layer head item -> layer item")

    def _expected(self, positions: Int[Tensor, " item"]) -> Float[Tensor, " layer head item"]:
        # Examples are in order, so a token's place among them tells its block.
        block = torch.searchsorted(self.examples, positions) // self.block_size
        return self.median[:, :, block.clamp_max(self.median.shape[2] - 1)]


def uniform_score(n_tokens: int) -> Float[Tensor, " token"]:
    """Sink score of every token under uniform attention; NaN for the last."""
    weight = 1 / torch.arange(1, n_tokens + 1, dtype=torch.float64)
    later = weight.flip(0).cumsum(0).flip(0) - weight
    return (later / torch.arange(n_tokens - 1, -1, -1)).float()
