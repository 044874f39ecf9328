"""Collectors of attention: how much each token receives, and how concentrated each query's is.

All of them read the site `attention`, so that they work without a pattern in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.collectors import Collector, Run

Convention = Literal["later", "all_later", "gu"]

_LEAST_TOTAL = 1e-4
"""Least sum of a query's weights. Streamed, the share that a learned sink logit leaves is exact to
about 1e-6."""


class SinkScores(Collector):
    """Attention that each token receives, by layer and head.

    Result: Float[Tensor, " layer head token"], a mean of A[i, t] over queries i. Which ones:

    * `convention="later"`, this library's sink score: the later queries i > t that see the token.
      A token's attention to itself says nothing of its importance to others, and a query beyond a
      sliding window, or in another chunk, cannot attend to it.
    * `convention="all_later"`: all later queries. The same in a layer without a window; with one,
      it falls with the length of the text, for want of queries that see the token.
    * `convention="gu"`: all i >= t, the importance score of Gu et al. (arXiv 2410.10781), for every
      token; see `sink_rate` for their thresholded rate.

    Except with "gu", tokens with fewer than `min_queries` such queries get NaN, because the last
    tokens of a text receive attention merely for being near.

    A large score is not evidence that the token's content is used: see the value norms, or ablate.

    Raises:
        InputError: an unknown convention, or `min_queries` below 1.
    """

    sites = (ATTENTION,)

    def __init__(
        self,
        convention: Convention = "later",
        *,
        min_queries: int = 8,
        name: str | None = None,
    ):
        if convention not in (choices := get_args(Convention)):
            raise InputError(
                f"no convention {convention!r} for sink scores; use one of {', '.join(choices)}"
            )
        if min_queries < 1:
            raise InputError(f"min_queries must be 1 or more, got {min_queries}")
        self.convention = convention
        self.min_queries = min_queries
        self.name = name or "SinkScores"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[Tensor] = []
        self._n_later = torch.arange(run.n_tokens - 1, -1, -1)

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Add the means of one layer."""
        received = activation.received.cpu()
        if self.convention == "gu":
            score = (received + activation.own.cpu()) / (self._n_later + 1)
        else:
            n_queries = activation.n_seeing if self.convention == "later" else self._n_later
            few = n_queries < self.min_queries
            score = (received / n_queries.clamp_min(1)).masked_fill(few, torch.nan)
        self._layers.append(score)

    def result(self) -> Float[Tensor, " layer head token"]:
        """Scores by layer and head."""
        return torch.stack(self._layers)


def sink_rate(
    score: Float[Tensor, " layer head token"], epsilon: float = 0.3
) -> Float[Tensor, " token"]:
    """Share of (layer, head) pairs in which a token's importance score exceeds `epsilon`.

    Definition of Gu et al. (arXiv 2410.10781), who use `SinkScores(convention="gu")` scores,
    epsilon 0.3 and the first token.

    Raises:
        InputError: `epsilon` outside [0, 1].
    """
    if not 0 <= epsilon <= 1:
        raise InputError(f"epsilon must lie in [0, 1], as attention weights do, got {epsilon}")
    return (score > epsilon).float().mean(dim=(0, 1))


@dataclass(frozen=True)
class Received:
    """Attention by layer and head, reduced over later queries i > t or over keys.

    What is reduced over later queries is NaN where none sees the token, as for the last one."""

    maximum: Float[Tensor, " layer head token"]
    """Largest weight that a later query gives the token."""
    thresholds: tuple[float, ...]
    share_above: Float[Tensor, " threshold layer head token"]
    """Share of the later queries that see the token that give it more weight than the threshold. A
    weight equal to the threshold can fall on either side by rounding."""
    entropy: Float[Tensor, " layer head query"]
    """Entropy of each query's weights, nats: 0 for attention to one token, log(i + 1) for uniform
    attention."""

    @property
    def mean_entropy(self) -> Float[Tensor, " layer head"]:
        """Mean entropy over queries. Later queries see more keys, so compare only texts of the same
        length."""
        return self.entropy.mean(dim=-1)


class ReceivedAttention(Collector):
    """Maximum, thresholded shares and entropy of attention. Result: `Received`.

    Means are collected by `SinkScores`. None of these is evidence that a token's content is used.

    Args:
        thresholds: weights above which a query counts as attending to a token.
        name: key of the result.

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

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Add the columns of one layer."""
        counts = activation.above or {}
        above = [counts[threshold].cpu() for threshold in self.attention.thresholds]
        maximum = cast(Tensor, activation.maximum).cpu()
        shape = (0, *maximum.shape)
        unseen = activation.n_seeing == 0
        n_seeing = activation.n_seeing.masked_fill(unseen, torch.nan)
        self._layers.append(
            (
                maximum.masked_fill(unseen, torch.nan),
                (torch.stack(above) if above else torch.empty(shape)) / n_seeing,
                cast(Tensor, activation.entropy).cpu(),
            )
        )

    def result(self) -> Received:
        """The statistics by layer and head."""
        maximum, above, entropy = zip(*self._layers, strict=True)
        return Received(
            maximum=torch.stack(maximum),
            thresholds=self.attention.thresholds,
            share_above=torch.stack(above, dim=1),
            entropy=torch.stack(entropy),
        )


@dataclass(frozen=True)
class Visible:
    """Which attention a token can receive at all: one entry for each layer and token."""

    n_seeing: Float[Tensor, " layer token"]
    """Number of later queries that see the token: all of them, or those within a sliding window, or
    in the same chunk."""
    uniform: Float[Tensor, " layer token"]
    """Its sink score if each query attended uniformly to the keys that it sees; NaN where no later
    query sees the token."""


class Visibility(Collector):
    """How many queries see each token, and its score under uniform attention. Result: `Visible`.

    Both follow from the masks alone: they are what a sink score is to be compared with.
    """

    sites = (ATTENTION,)

    def __init__(self, *, name: str | None = None):
        self.name = name or "Visibility"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._of_kind: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Add one layer, or the same as for another with as many visible keys."""
        same = (row for visible, row in self._of_kind if torch.equal(visible, activation.n_visible))
        row = next(same, None)
        if row is None:
            row = (activation.n_seeing, activation.uniform_score)
            self._of_kind.append((activation.n_visible, row))
        self._layers.append(row)

    def result(self) -> Visible:
        """Both by layer."""
        n_seeing, uniform = zip(*self._layers, strict=True)
        return Visible(torch.stack(n_seeing), torch.stack(uniform))


@dataclass(frozen=True)
class Entropies:
    """Entropy of the attention weights of one text, in nats."""

    by_head: Float[Tensor, " layer head"]
    """Mean over queries."""
    by_query: Float[Tensor, " layer query"]
    """Mean over heads."""
    normalized_by_head: Float[Tensor, " layer head"]
    """Entropy over the logarithm of the number of visible keys, mean over queries that see more
    than one: 0 for a single key, 1 for uniform attention."""
    normalized_by_query: Float[Tensor, " layer query"]
    """The same, mean over heads; NaN for queries that see one key."""


class AttentionEntropy(Collector):
    """Entropy of every query's attention. Result: `Entropies`.

    A head that attends to one sink has an entropy near 0, one that averages over all visible keys
    that of the uniform distribution, the logarithm of their number. With a sliding window a query
    sees fewer keys than all before it. Where a query's weights do not add up to 1, because of a
    learned sink logit, they are normalized first: it is the entropy among the keys. A query with
    less than a ten-thousandth left does not count in that head's means.

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
        """Add the entropies of one layer."""
        unnormalized, total = (
            cast(Tensor, column).cpu() for column in (activation.entropy, activation.total)
        )
        visible = activation.n_visible
        # For weights w with sum s: the entropy of w/s is the sum of -w log(w), over s, plus log(s).
        total = total.masked_fill(total < _LEAST_TOTAL, torch.nan)
        entropy = (unnormalized / total + total.log()).clamp_min(0)
        uniform = visible.masked_fill(visible < 2, torch.nan).log()
        self._entropy.append(entropy)
        self._normalized.append(entropy / uniform)

    def result(self) -> Entropies:
        """Means over queries and over heads."""
        entropy, normalized = torch.stack(self._entropy), torch.stack(self._normalized)
        return Entropies(
            by_head=entropy.nanmean(dim=2),
            by_query=entropy.nanmean(dim=1),
            normalized_by_head=normalized.nanmean(dim=2),
            normalized_by_query=normalized.nanmean(dim=1),
        )


class NoOpShare(Collector):
    """Share of attention that goes to no token. Result: Float[Tensor, " layer head"].

    Some models have a learned logit in every softmax (gpt-oss): what it takes is attention that a
    head does not spend on any token, where other models spend it on an attention sink. It is 1 less
    the sum of a query's weights, mean over queries; 0 in models without such logits, and NaN in
    layers without attention.
    """

    sites = (ATTENTION,)
    attention = ColumnRequest(entropy=True)  # the sums come with it

    def __init__(self, name: str | None = None):
        self.name = name or "NoOpShare"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Add the share of one layer."""
        total = cast(Tensor, activation.total)
        self._layers.append((1 - total).clamp(0, 1).mean(dim=1).cpu())

    def result(self) -> Float[Tensor, " layer head"]:
        """Shares by layer and head."""
        return torch.stack(self._layers)


class OutputGates(Collector):
    """How far gated attention is open. Result: Float[Tensor, " layer head token"].

    In gated attention (Qwen3-Next, Qwen3.5) each entry of a head's output is multiplied with a gate
    between 0 and 1, which a query computes for itself. A closed gate writes nothing, so a head
    needs no sink for that. It is the mean gate over the entries of a head; NaN in layers without
    gates. Only the eager pass shows it, so attention is not streamed with this collector.
    """

    sites = ("q_gate",)
    where_present = True

    def __init__(self, name: str | None = None):
        self.name = name or "OutputGates"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._gates = torch.full((run.n_layers, run.n_heads, run.n_tokens), torch.nan)

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Add the gates of one layer [token, head * d_head]."""
        gates = activation.float().sigmoid()
        by_head = rearrange(gates, "token (head d) -> head token d", head=self._gates.shape[1])
        self._gates[layer] = by_head.mean(dim=-1).cpu()

    def result(self) -> Float[Tensor, " layer head token"]:
        """Gates by layer and head."""
        return self._gates
