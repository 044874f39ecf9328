"""Attention and its column statistics, exactly, with no [query, key] pattern in memory.

Queries are processed in blocks. A block has the weights of all keys that its queries see, so the
softmax is the ordinary one, and every column statistic is a sum or a maximum over blocks:

    for each block of queries:
        weights = softmax(queries @ keys[up to the block's end] * scale)
        output[block] = weights @ values
        received += weights.sum(over queries)       # likewise maximum and counts

The query heads that share a key-value head are folded into rows of one product, so that keys are
not repeated. Only the diagonal part of a block needs a causal mask; in a layer with a sliding
window, keys before the window are never read. Queries and keys are raised to float32 *before*
their product: rounding the scores to bfloat16 changes a weight by up to a hundredth. All blocks and
layers share the same buffers: with fresh tensors for each block, allocation takes several times as
long as the arithmetic.

On a CPU torch divides every operation among its threads, which for a long text moves a block
between the cores' caches. So the blocks of a long text are distributed over threads instead, and
operations within a thread are not divided. On two cores, as measured within models, dividing
operations is faster up to a thousand tokens, distributing blocks from two thousand on.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.observe.attention_columns import (
    AttentionColumns,
    ColumnRequest,
    segment_length,
    segments_of,
)

_DISTRIBUTED_FROM = 1025
"""Tokens of a text from which on its blocks are distributed over threads."""

_ROWS = 384
"""Folded queries of a block in one thread: enough for fast products, few enough for its cache."""

_DIVIDED_ROWS = 768
"""Folded queries of a block whose operations are divided among threads."""

_LEAST_GROUP = 3
"""A block has no more queries than with this many query heads for each key-value head: the more
queries, the more keys after them are computed only to be masked."""

_MOST_THREADS = 16
"""Each has its own buffers, which grow with the text."""

_ACCELERATOR_SCORES = 1 << 26
"""Weights of a block on an accelerator, in all heads (256 MB)."""


class StreamingAttention:
    """Compute attention layer after layer, in the same buffers.

    Args:
        lengths: number of tokens of every text of the batch, without the padding on its right.
            Padding is neither query nor key; its output is 0.
        request: which column statistics to compute.
        block: queries in a block; by default what suits the device.
        threads: number of threads for the blocks of a long text on a CPU; by default torch's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        request: ColumnRequest | None = None,
        *,
        block: int | None = None,
        threads: int | None = None,
    ):
        self._lengths = list(lengths)
        self._block = block
        n_threads = min(threads or torch.get_num_threads(), _MOST_THREADS)
        self._workers = [_Worker(request or ColumnRequest()) for _ in range(n_threads)]
        self._pool: ThreadPoolExecutor | None = None

    def __call__(
        self, inputs: AttentionInputs
    ) -> tuple[Float[Tensor, " batch token head d_value"], list[AttentionColumns]]:
        """The output of one layer's attention, and the column statistics of each text."""
        output, columns = inputs.zero_output(), []
        for row, length in enumerate(self._lengths):
            part = inputs.of_text(row, length)
            text = _Text(
                part.query[0],
                part.key[0].float().contiguous(),
                part.value[0].float().contiguous(),
                output[row],
                part.scale,
                part.window,
                part.softcap,
                None if part.sink_logits is None else part.sink_logits.float(),
                None if part.alibi is None else part.alibi[0].float(),
            )
            columns.append(self._run(text))
        return output, columns

    def _run(self, text: _Text) -> AttentionColumns:
        device, n_tokens = text.query.device, text.query.shape[1]
        one_thread = len(self._workers) == 1
        if device.type != "cpu" or one_thread or n_tokens < _DISTRIBUTED_FROM:
            size = self._block or _block_size(text, _ROWS if one_thread else _DIVIDED_ROWS)
            return self._workers[0].run(text, text.blocks(size))
        with _undivided_operations():
            return self._distribute(text, text.blocks(self._block or _block_size(text, _ROWS)))

    def _distribute(self, text: _Text, blocks: Sequence[_Block]) -> AttentionColumns:
        """Run blocks in this thread and in others."""
        n_workers = len(self._workers)
        self._pool = self._pool or _threads(n_workers - 1)
        # Back and forth, so that no thread gets all the larger blocks. Assigned in advance, not to
        # whichever thread is free, because rounding must not depend on timing.
        turns = [*range(n_workers), *reversed(range(n_workers))]
        shares: list[list[_Block]] = [[] for _ in range(n_workers)]
        for block, turn in zip(blocks, itertools.cycle(turns)):
            shares[turn].append(block)
        inference = torch.is_inference_mode_enabled()  # set separately in each thread

        def run(worker: _Worker, share: list[_Block]) -> AttentionColumns:
            with torch.inference_mode(inference), torch.no_grad():
                return worker.run(text, share)

        others = self._pool.map(run, self._workers[1:], shares[1:])  # starts at once
        columns = run(self._workers[0], shares[0])
        for other in others:
            columns.add(other)
        return columns


@contextmanager
def _undivided_operations() -> Iterator[None]:
    """Within the context torch does not divide an operation among threads.

    Torch's own operations follow the setting of their thread, but MKL's products follow the last
    setting made in the process, so it is not enough to set each thread once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(n_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch does not divide an operation, all of them started."""
    pool = ThreadPoolExecutor(n_threads, "streaming_attention")
    all_started = threading.Barrier(n_threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        all_started.wait()

    list(pool.map(start, range(n_threads)))
    return pool


@dataclass(frozen=True)
class _Block:
    """Some adjacent queries, in the query heads of some adjacent key-value heads."""

    queries: slice
    keys: slice
    """All keys that any of the queries sees."""
    kv_heads: slice
    heads: slice


@dataclass(frozen=True)
class _Text:
    """The inputs and the output of attention for one text in one layer."""

    query: Float[Tensor, " head token d_head"]
    key: Float[Tensor, " kv_head token d_head"]
    value: Float[Tensor, " kv_head token d_value"]
    output: Float[Tensor, " token head d_value"]
    """Filled block by block."""
    scale: float
    window: int | None
    softcap: float | None
    sink_logits: Float[Tensor, " head"] | None
    alibi: Float[Tensor, " head token"] | None

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return len(self.query) // len(self.key)

    def blocks(self, size: int) -> list[_Block]:
        """All blocks, of `size` queries each, those with the most keys first."""
        n_tokens, n_kv_heads, group = self.query.shape[1], len(self.key), self.group
        # A CPU processes one kv head at a time, in its cache; an accelerator all at once.
        at_once = 1 if self.query.device.type == "cpu" else n_kv_heads
        blocks = []
        for start in range(0, n_tokens, size):
            end = min(start + size, n_tokens)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            for kv_head in range(0, n_kv_heads, at_once):
                kv_heads = slice(kv_head, kv_head + at_once)
                heads = slice(kv_head * group, (kv_head + at_once) * group)
                blocks.append(_Block(slice(start, end), slice(first, end), kv_heads, heads))
        return sorted(blocks, key=lambda block: block.keys.start - block.keys.stop)


class _Worker:
    """Runs blocks one after the other, in its own buffers."""

    def __init__(self, request: ColumnRequest):
        self._request = request
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def run(self, text: _Text, blocks: Sequence[_Block]) -> AttentionColumns:
        """Fill the output of these blocks, and sum their columns."""
        n_heads, n_tokens, _ = text.query.shape
        device = text.query.device
        columns = AttentionColumns.zeros(n_heads, n_tokens, text.window, self._request, device)
        for block in blocks:
            weights, log_sum = self._attend(text, block)
            self._reduce(weights, block, columns)
            if columns.log_sum_exp is not None and log_sum is not None:
                columns.log_sum_exp[block.heads, block.queries] = log_sum
        return columns

    def _attend(
        self, text: _Text, block: _Block
    ) -> tuple[Float[Tensor, " head query key"], Float[Tensor, " head query"] | None]:
        """Write the block's output; return its weights and the log-sum-exps, if requested."""
        query = text.query[block.heads, block.queries].float()
        key, value = (part[block.kv_heads, block.keys] for part in (text.key, text.value))
        n_heads, n_queries, d_head = query.shape
        rows = (len(key), n_heads // len(key) * n_queries)
        folded = query.reshape(*rows, d_head)
        scores = self._buffer("weights", (*rows, key.shape[1]), key)
        torch.baddbmm(scores, folded, key.mT, beta=0, alpha=text.scale, out=scores)
        if text.softcap is not None:
            scores.div_(text.softcap).tanh_().mul_(text.softcap)
        by_head = scores.view(n_heads, n_queries, -1)
        if text.alibi is not None:
            by_head.add_(text.alibi[block.heads, None, block.keys])
        _hide(by_head, block, text.window)
        sinks = None if text.sink_logits is None else text.sink_logits[block.heads, None]
        log_sum = _softmax_in_place(by_head, sinks, self._request.log_sum_exp)
        output = self._buffer("output", (*rows, value.shape[-1]), value)
        torch.bmm(scores, value, out=output)
        unfolded = output.view(n_heads, n_queries, -1).transpose(0, 1)
        text.output[block.queries, block.heads] = unfolded.to(text.output.dtype)
        return by_head, log_sum

    def _reduce(
        self, weights: Float[Tensor, " head query key"], block: _Block, columns: AttentionColumns
    ) -> None:
        """Add one block's weights to the statistics, and overwrite them."""
        request, (n_heads, n_queries, n_keys) = self._request, weights.shape
        heads, queries, keys = block.heads, block.queries, block.keys
        spare = weights
        if request.entropy or request.thresholds:
            spare = self._buffer("spare", weights.shape, weights)
        if columns.entropy is not None:
            # The smallest number in place of 0, whose logarithm would make the product NaN.
            torch.clamp_min(weights, torch.finfo(torch.float32).tiny, out=spare)
            columns.entropy[heads, queries] = -spare.log_().mul_(weights).sum(dim=-1)
        diagonal = weights[:, :, n_keys - n_queries :].diagonal(dim1=1, dim2=2)
        columns.own[heads, queries] = diagonal
        diagonal.zero_()
        line = self._buffer("line", (n_heads, n_keys), weights)
        if columns.by_segment is None:
            columns.received[heads, keys] += torch.sum(weights, dim=1, out=line)
        else:
            length = segment_length(columns.n_visible)
            for segment, part in segments_of(queries, length):
                inside = slice(part.start - queries.start, part.stop - queries.start)
                columns.received[heads, keys] += torch.sum(weights[:, inside], dim=1, out=line)
                columns.by_segment[segment, keys] += line.sum(dim=0)
        if columns.maximum is not None:
            largest = columns.maximum[heads, keys]
            torch.maximum(largest, torch.amax(weights, dim=1, out=line), out=largest)
        for threshold, count in (columns.above or {}).items():
            # Compared into floats: a sum of booleans takes five times as long.
            torch.gt(weights, threshold, out=spare)
            count[heads, keys] += torch.sum(spare, dim=1, out=line)

    def _buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A piece of a buffer that all blocks and layers share."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, like.device))
        if buffer is None or len(buffer) < size:
            # The largest block comes first, so that a layer's buffers are made once.
            buffer = torch.empty(size, device=like.device)
            self._buffers[name, like.device] = buffer
        return buffer[:size].view(*shape)


def _hide(scores: Float[Tensor, " head query key"], block: _Block, window: int | None) -> None:
    """Set scores of keys after the query, and of those before its window, to minus infinity.

    Only a block's last keys can be after one of its queries, and only its first before a window, so
    each mask is as wide as there are queries. A mask is added, which is faster than filling.
    """
    _, n_queries, n_keys = scores.shape
    scores[:, :, n_keys - n_queries :].add_(_above_diagonal(n_queries, scores.device))
    if window is not None and n_keys > window:
        last_hidden = block.queries.start - window - block.keys.start  # from the first query
        hidden = _up_to_diagonal(n_queries, last_hidden, scores.device)
        scores[:, :, :n_queries].add_(hidden)


@functools.lru_cache(maxsize=8)
def _above_diagonal(size: int, device: torch.device) -> Float[Tensor, " query key"]:
    return torch.full((size, size), -math.inf, device=device).triu_(1)


@functools.lru_cache(maxsize=8)
def _up_to_diagonal(size: int, diagonal: int, device: torch.device) -> Float[Tensor, " query key"]:
    return torch.full((size, size), -math.inf, device=device).tril_(diagonal)


def _softmax_in_place(
    scores: Float[Tensor, " head query key"],
    sink_logits: Float[Tensor, " head 1"] | None,
    return_log_sum: bool,
) -> Float[Tensor, " head query"] | None:
    """Turn scores into weights, reduced by the share of a learned logit.

    Returns the logarithm of the softmax denominator, if requested.
    """
    if sink_logits is None and not return_log_sum:
        torch.softmax(scores, dim=-1, out=scores)
        return None
    largest = scores.amax(dim=-1)
    torch.softmax(scores, dim=-1, out=scores)
    # The weight of the largest score is exp(largest - log of the sum of exponentials).
    log_sum = largest - scores.amax(dim=-1).log()
    if sink_logits is not None:
        scores.mul_(torch.sigmoid(log_sum - sink_logits)[..., None])
        log_sum = torch.logaddexp(log_sum, sink_logits)
    return log_sum


def _block_size(text: _Text, rows: int) -> int:
    """Number of queries of a block that has `rows` rows after folding its query heads."""
    if text.query.device.type == "cpu":
        return max(16, rows // max(text.group, _LEAST_GROUP) // 16 * 16)
    n_heads, n_tokens, _ = text.query.shape
    return max(16, min(n_tokens, _ACCELERATOR_SCORES // (n_heads * n_tokens)))
