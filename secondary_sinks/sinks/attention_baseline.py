"""Attention drawn by a token, over what comparable tokens nearby draw.

A sink score alone says little. The attention that a token draws falls with the length of the text,
the first tokens are seen by queries with few other keys, the last ones by their neighbors, and a
sliding window hides whatever is far away. Two measures do not depend on these:

* the *attention ratio* compares a token, head by head, with *baseline tokens* near its position:
  those that are not aligned with the primary in any run of layers in which it is massive. Only the
  heads that attend to the primary count: the direction that a secondary sink shares with it is read
  by some heads, and the others would hide them. Near the end, where the last tokens are attended to
  for being recent, a token is compared with those that about as many queries see;
* the *strength* asks whether anybody would notice. Where the heads that read the primary leave the
  other tokens nothing, a token can draw a hundred times as much as its neighbors and still next to
  nothing. In a longer text a sink draws a smaller share of attention, but a larger multiple of
  uniform attention; the geometric mean of the two, with all heads alike, hardly changes.

Where many tokens are sinks, they share the attention that one of them would draw. So the strength
divides by what tokens aligned with the primary leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.observe.attention_collectors import Visible

N_NEIGHBORS = 32
"""Number of baseline tokens near a token that it is compared with; near the end of a text fewer,
but at least `LEAST_NEIGHBORS`."""
LEAST_NEIGHBORS = 4
LEAST_LEFT = 0.1
"""Least share of attention that aligned tokens are taken to leave."""


@dataclass(frozen=True)
class AttentionBaseline:
    """Attention that the baseline tokens of one text draw, by layer, head and position."""

    weight: Float[Tensor, " layer head"]
    """Attention that the primary draws beyond its own baseline. All heads weigh alike in a layer in
    which none attends to it."""
    median: Float[Tensor, " layer head block"]
    """Median relative score of each block of baseline tokens; NaN in layers without attention."""
    starts: Int[Tensor, " block"]
    """Position at which each block begins; the first counts from the beginning of the text."""
    left: Float[Tensor, " layer"]
    """Share of attention that tokens aligned with the primary, the primary itself aside, leave."""
    uniform: Float[Tensor, " layer token"]
    """Score of each token under uniform attention (`observe.Visible`)."""

    @property
    def has_attention(self) -> Bool[Tensor, " layer"]:
        """Which blocks have attention; in a hybrid model some have another mixer of tokens."""
        return ~self.uniform.isnan().all(dim=1)

    @classmethod
    def of(
        cls,
        score: Float[Tensor, " layer head token"],
        primary: int,
        *,
        examples: Bool[Tensor, " token"],
        visible: Visible,
        min_queries: int,
    ) -> AttentionBaseline:
        """Measure the baseline of a text.

        Args:
            score: mean attention from the later queries that see a token.
            primary: position of the primary sink.
            examples: which tokens are baseline tokens.
            visible: how many queries see each token.
            min_queries: fewest later queries of an example.
        """
        n_tokens = score.shape[2]
        n_later = torch.arange(n_tokens - 1, -1, -1)
        places = (examples & (n_later >= min_queries)).nonzero().flatten()
        if len(places) == 0:  # a very short text: any token with a later query
            places = (n_later >= 1).nonzero().flatten()
        blocks = _blocks(places, n_later)
        relative = score / visible.uniform[:, None]
        medians = [relative[:, :, block].nanmedian(dim=-1).values for block in blocks]
        median, starts = torch.stack(medians, dim=-1), torch.stack([b[0] for b in blocks])
        aligned = ~examples
        aligned[primary] = False
        received = score.mean(dim=1)[:, aligned] * visible.n_seeing[:, aligned]
        left = (1 - received.nansum(dim=1) / max(n_tokens - 1, 1)).clamp_min(LEAST_LEFT)
        # Uniform weights first: what the primary draws beyond its baseline needs the baseline.
        plain = cls(torch.ones(score.shape[:2]), median, starts, left, visible.uniform)
        here = torch.tensor([primary])
        expected = plain._expected(here)[:, :, 0] * visible.uniform[:, primary, None]
        weight = (score[:, :, primary] - expected).clamp_min(0)
        unread = weight.sum(dim=1, keepdim=True) == 0
        weight = weight.masked_fill(unread, 1.0)
        return cls(weight, median, starts, left, visible.uniform)

    def ratio(
        self,
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> Float[Tensor, " layer item"]:
        """Attention drawn over the baseline, by layer.

        Scores are first divided by what uniform attention would give at that position; scores and
        baselines are averaged over heads with `weight`, then divided.

        Args:
            score: mean attention from the later queries that see a token.
            positions: where each item stands; by default item t is token t. A token that no later
                query can see, as the last one, has NaN.
        """
        if positions is None:
            positions = torch.arange(score.shape[2])
        drawn = self._over_heads(score / self.uniform[:, None, positions])
        expected = self._over_heads(self._expected(positions))
        # Clamped: where baseline tokens draw no attention at all, a token without any has ratio 0.
        return drawn / expected.clamp_min(torch.finfo(torch.float32).tiny)

    def strength(
        self,
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> Float[Tensor, " layer item"]:
        """Geometric mean of the share of attention drawn and its multiple of uniform attention, all
        heads alike, over the share that aligned tokens leave. The arguments are those of `ratio`.
        """
        uniform = self.uniform if positions is None else self.uniform[:, positions]
        return score.mean(dim=1) / uniform.sqrt() / self.left[:, None]

    def _over_heads(
        self, values: Float[Tensor, " layer head item"]
    ) -> Float[Tensor, " layer item"]:
        share = self.weight / self.weight.sum(dim=1, keepdim=True)
        return einsum(share, values, "layer head, layer head item -> layer item")

    def _expected(self, positions: Int[Tensor, " item"]) -> Float[Tensor, " layer head item"]:
        block = torch.searchsorted(self.starts, positions, right=True) - 1
        return self.median[:, :, block.clamp_min(0)]


def _blocks(
    places: Int[Tensor, " example"], n_later: Int[Tensor, " token"]
) -> list[Int[Tensor, " member"]]:
    """Baseline tokens in blocks of neighbors, in the order of the text.

    A block is full with `N_NEIGHBORS`, or, from `LEAST_NEIGHBORS` on, when its first token is seen
    by twice as many queries as its last.
    """
    blocks: list[list[int]] = [[]]
    later = n_later.tolist()
    for place in reversed(places.tolist()):
        last = blocks[-1][0] if blocks[-1] else place
        is_far = later[place] >= 2 * later[last] and len(blocks[-1]) >= LEAST_NEIGHBORS
        if is_far or len(blocks[-1]) == N_NEIGHBORS:
            blocks.append([])
        blocks[-1].append(place)
    if len(blocks) > 1 and len(blocks[-1]) < N_NEIGHBORS:  # the rest, at the beginning of the text
        rest = blocks.pop()
        blocks[-1].extend(rest)
    return [torch.tensor(block[::-1]) for block in reversed(blocks)]
