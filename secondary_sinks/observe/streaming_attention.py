"""Attention and its column statistics, exactly, with no [query, key] pattern in memory.

Queries are taken a block at a time. A block's weights are complete (they see all their keys), so
their softmax is the ordinary one, and every column statistic is a sum or a maximum over blocks:

    for each block of queries:
        weights = softmax(queries @ keys[up to the block's end] * scale)
        output[block] = weights @ values
        received += weights.sum(over queries)       # likewise maximum and counts

The query heads that share a key-value head are folded into rows of one product, so that keys are
not repeated. Only the diagonal part of a block needs a causal mask; in a layer with a sliding
window, keys before the window are never touched. Queries and keys are raised to float32 *before*
their product: rounding the scores to bfloat16 costs a hundredth of a weight. What a block needs
lives in buffers that all blocks and layers share: with fresh tensors for each block, allocation
takes several times as long as the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest

_ROWS = 384
"""Folded queries of a block on a CPU: enough for fast products, few enough to stay in cache."""

_LONGEST_BLOCK = 128
"""Queries of a block on a CPU at most: half a block of keys is computed to be masked."""

_ACCELERATOR_SCORES = 1 << 26
"""Weights of a block on an accelerator, all heads together (256 MB)."""


class StreamingAttention:
    """Computes attention layer after layer, with the same buffers.

    Args:
        lengths: number of tokens of every text of the batch, without the padding on its right.
            Padding is neither query nor key; its output is 0.
        request: which column statistics to compute.
        block: queries in a block; by default what the device likes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        request: ColumnRequest | None = None,
        *,
        block: int | None = None,
    ):
        self._lengths = list(lengths)
        self._request = request or ColumnRequest()
        self._block = block
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(
        self,
        query: Float[Tensor, "batch head token d_head"],
        key: Float[Tensor, "batch kv_head token d_head"],
        value: Float[Tensor, "batch kv_head token d_value"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Float[Tensor, "head"] | None = None,
    ) -> tuple[Float[Tensor, "batch token head d_value"], list[AttentionColumns]]:
        """Attention of one layer.

        Args:
            query: queries, positions applied.
            key: keys, positions applied; each serves `head / kv_head` query heads in order.
            value: values.
            scale: what the products of queries and keys are multiplied with.
            window: a query sees so many keys, itself included; None: all.
            softcap: scores s become `softcap * tanh(s / softcap)`.
            sink_logits: a logit a head that joins each softmax and whose weight goes nowhere.

        Returns:
            The output, and the column statistics of each text.
        """
        n_batch, n_heads, n_tokens, _ = query.shape
        output = query.new_zeros(n_batch, n_tokens, n_heads, value.shape[-1])
        columns = []
        for row, length in enumerate(self._lengths):
            text = _Text(self._request, n_heads, length, query.device)
            self._one_text(
                query[row, :, :length],
                key[row, :, :length].float().contiguous(),
                value[row, :, :length].float().contiguous(),
                output[row],
                text,
                (scale, window, softcap, sink_logits),
            )
            columns.append(text.columns())
        return output, columns

    def _one_text(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        text: _Text,
        settings: tuple[float, int | None, float | None, Tensor | None],
    ) -> None:
        scale, window, softcap, sink_logits = settings
        n_heads, n_tokens, _ = query.shape
        n_kv_heads = key.shape[0]
        group = n_heads // n_kv_heads
        # A CPU works on one kv head at a time, in its cache; an accelerator wants all at once.
        at_once = 1 if query.device.type == "cpu" else n_kv_heads
        block = self._block or _block_size(query.device, n_heads, group, n_tokens)
        for start in range(0, n_tokens, block):
            end = min(start + block, n_tokens)
            first = 0 if window is None else max(0, start - window + 1)
            n_queries, n_keys = end - start, end - first
            hidden = _Hidden(start, end, first, window, query.device)
            for kv_head in range(0, n_kv_heads, at_once):
                kv_heads = slice(kv_head, kv_head + at_once)
                heads = slice(kv_head * group, (kv_head + at_once) * group)
                rows = (at_once, group * n_queries)
                weights = self._buffer("weights", (*rows, n_keys), query.device)
                folded = query[heads, start:end].float().reshape(*rows, -1)
                torch.baddbmm(
                    weights, folded, key[kv_heads, first:end].mT, beta=0, alpha=scale, out=weights
                )
                if softcap is not None:
                    weights.div_(softcap).tanh_().mul_(softcap)
                by_head = weights.view(at_once * group, n_queries, n_keys)
                hidden.mask(by_head)
                sinks = None if sink_logits is None else sink_logits[heads]
                _softmax_in_place(by_head, sinks)
                found = self._buffer("output", (*rows, value.shape[-1]), query.device)
                torch.bmm(weights, value[kv_heads, first:end], out=found)
                unfolded = found.view(at_once * group, n_queries, -1).transpose(0, 1)
                output[start:end, heads] = unfolded.to(output.dtype)
                self._reduce(by_head, text, heads, (start, end, first))

    def _reduce(
        self, weights: Tensor, text: _Text, heads: slice, place: tuple[int, int, int]
    ) -> None:
        """Add one block's weights [head, query, key] to the statistics, and use them up."""
        start, end, first = place
        n_heads, n_queries, n_keys = weights.shape
        keys = slice(first, end)
        request = self._request
        if request.entropy or request.thresholds:
            spare = self._buffer("spare", weights.shape, weights.device)
        if request.entropy:
            # The smallest number in place of 0, whose logarithm would make the product NaN.
            torch.clamp_min(weights, torch.finfo(torch.float32).tiny, out=spare)
            text.entropy[heads, start:end] = -spare.log_().mul_(weights).sum(dim=-1)
        diagonal = weights[:, :, n_keys - n_queries :].diagonal(dim1=1, dim2=2)
        text.own[heads, start:end] = diagonal
        diagonal.zero_()
        line = self._buffer("line", (n_heads, n_keys), weights.device)
        text.received[heads, keys] += torch.sum(weights, dim=1, out=line)
        if request.maximum:
            largest = text.maximum[heads, keys]
            torch.maximum(largest, torch.amax(weights, dim=1, out=line), out=largest)
        for threshold in request.thresholds:
            # Compared into floats: a sum of booleans takes five times as long.
            torch.gt(weights, threshold, out=spare)
            text.above[threshold][heads, keys] += torch.sum(spare, dim=1, out=line)

    def _buffer(self, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """A piece of a buffer that all blocks and layers share."""
        size = math.prod(shape)
        if (name, device) not in self._buffers or len(self._buffers[name, device]) < size:
            longest = max(self._lengths)
            whole = size if name == "output" else -(-size // shape[-1]) * longest
            self._buffers[name, device] = torch.empty(max(size, whole), device=device)
        return self._buffers[name, device][:size].view(*shape)


class _Text:
    """The statistics of one text in one layer while they grow."""

    def __init__(self, request: ColumnRequest, n_heads: int, n_tokens: int, device: torch.device):
        def zeros() -> Tensor:
            return torch.zeros(n_heads, n_tokens, device=device)

        self._request = request
        self.received, self.own = zeros(), zeros()
        self.maximum = zeros() if request.maximum else torch.empty(0)
        self.entropy = zeros() if request.entropy else torch.empty(0)
        self.above = {threshold: zeros() for threshold in request.thresholds}

    def columns(self) -> AttentionColumns:
        return AttentionColumns(
            received=self.received,
            own=self.own,
            maximum=self.maximum if self._request.maximum else None,
            above=self.above or None,
            entropy=self.entropy if self._request.entropy else None,
        )


class _Hidden:
    """Which keys a block's queries must not see: later ones, and those before their window.

    Only the last keys can be later than a query, and only the first before the window of one, so
    each mask is as wide as there are queries.
    """

    def __init__(self, start: int, end: int, first: int, window: int | None, device: torch.device):
        n_queries = end - start
        query = torch.arange(start, end, device=device)[:, None]
        self._n_queries = n_queries
        self._later = _minus_infinity_where(query < query.T)
        self._before: Tensor | None = None
        if window is not None and end - first > window:
            early = torch.arange(first, min(first + n_queries, end), device=device)
            self._before = _minus_infinity_where(early <= query - window)

    def mask(self, scores: Float[Tensor, "head query key"]) -> None:
        """Set the scores of hidden keys to minus infinity."""
        scores[:, :, scores.shape[-1] - self._n_queries :].add_(self._later)
        if self._before is not None:
            scores[:, :, : self._before.shape[1]].add_(self._before)


def _minus_infinity_where(hidden: Tensor) -> Tensor:
    """A mask to add, which is faster than filling where a mask says so."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)


def _softmax_in_place(
    scores: Float[Tensor, "head query key"], sink_logits: Float[Tensor, "head"] | None
) -> None:
    """Turn scores into weights, to which a learned logit leaves only a share."""
    if sink_logits is None:
        torch.softmax(scores, dim=-1, out=scores)
        return
    largest = scores.amax(dim=-1, keepdim=True)
    torch.softmax(scores, dim=-1, out=scores)
    # The weight of the largest score is exp(largest - log of the sum of exponentials).
    log_sum = largest - scores.amax(dim=-1, keepdim=True).log()
    scores.mul_(torch.sigmoid(log_sum - sink_logits.float()[:, None, None]))


def _block_size(device: torch.device, n_heads: int, group: int, n_tokens: int) -> int:
    if device.type == "cpu":
        return max(16, min(_LONGEST_BLOCK, _ROWS // group // 16 * 16))
    return max(16, min(n_tokens, _ACCELERATOR_SCORES // (n_heads * n_tokens)))
