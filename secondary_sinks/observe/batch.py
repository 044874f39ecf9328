"""One padded batch of texts through the model, and which texts share one.

A batch is as long as its longest text, and what the others lack is computed for nothing. So texts
of similar length share one: they are sorted, and a batch ends where padding would be more than a
quarter of it, or where it is full. Fifteen texts of 20 tokens beside one of 900 would be 92 %
padding.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.forward import Observer, observe
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, layer_sites
from secondary_sinks.host.text_input import TokenizedText, pad
from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.attention_path import (
    AttentionChoice,
    AttentionPath,
    Receive,
    path_of_attention,
    streamed_attention,
)
from secondary_sinks.observe.collectors import Collector, Run

MOST_PADDING = 0.25
"""Share of a batch's tokens that padding may be."""


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Which texts run together: indices into `lengths`, the longest texts first.

    Args:
        lengths: number of tokens of each text.
        batch_size: at most so many texts in a batch.
    """
    batches: list[list[int]] = []
    n_tokens = 0  # of the texts of the last batch, without padding
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        n_tokens += lengths[index]
        if batches and len(batches[-1]) < batch_size:
            padded = lengths[batches[-1][0]] * (len(batches[-1]) + 1)
            if padded - n_tokens <= MOST_PADDING * padded:
                batches[-1].append(index)
                continue
        batches.append([index])
        n_tokens = lengths[index]
    return batches


def run_batch(
    model: Any,
    info: ModelInfo,
    texts: Sequence[TokenizedText],
    collectors: Sequence[Collector],
    fwd_hooks: Sequence[UserHook],
    attention: AttentionChoice,
) -> tuple[list[dict[str, Any]], AttentionPath]:
    """One forward pass over some texts.

    Args:
        model: any TransformerLens model.
        info: what is known of it.
        texts: what to run, padded on the right to the longest.
        collectors: what to keep; a copy of each works on each text.
        fwd_hooks: hooks of the user's own.
        attention: how it is to be computed; see `trace`.

    Returns:
        What the collectors found in each text, by name, and the way that attention took.
    """
    workers = [[copy.deepcopy(collector) for collector in collectors] for _ in texts]
    for text, own in zip(texts, workers, strict=True):
        run = Run(info.n_layers, info.n_heads, len(text), info.d_model, text.tokens)
        for collector in own:
            collector.start(run)
    readers: dict[Site, list[int]] = defaultdict(list)
    for site in layer_sites(["resid_post"], info.n_layers):
        readers[site] = []  # always read, so that a NaN is found where it arises
    for index, collector in enumerate(collectors):
        for site in layer_sites(hooked_sites(collector), info.n_layers):
            readers[site].append(index)

    def observer(site: Site, indices: list[int]) -> Observer:
        def take(activation: Tensor) -> None:
            for row, text in enumerate(texts):
                own = _without_padding(activation[row], site, len(text))
                if site.name == "resid_post":
                    _check_finite(own, info, site.layer)
                for index in indices:
                    _update(workers[row][index], site, own)

        return take

    observers = {site: observer(site, indices) for site, indices in readers.items()}
    lookers = [index for index, one in enumerate(collectors) if ATTENTION in one.sites]
    request = ColumnRequest()
    for index in lookers:
        request |= collectors[index].attention

    def receive(layer: int, columns: Sequence[AttentionColumns]) -> None:
        for row, own in enumerate(columns):
            for index in lookers:
                workers[row][index].update(ATTENTION, layer, own)

    tokens, mask = pad(texts)
    longest = max(texts, key=len)
    way = path_of_attention(
        model, longest.tokens, attention, sites=list(observers), fwd_hooks=fwd_hooks
    )
    lengths = [len(text) for text in texts]
    if way == "eager" and lookers:
        _read_patterns(observers, info.n_layers, lengths, request, receive)
    streamed = streamed_attention(model, lengths, request, receive, way)
    try:
        with nullcontext() if way == "eager" else streamed:
            observe(model, tokens, mask, observers, fwd_hooks=fwd_hooks)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{len(texts)} texts of {len(longest)} tokens do not fit into memory with {way} "
            f"attention{_why_eager(model, longest, way, observers, fwd_hooks)}; shorten the text, "
            "lower batch_size or keep less"
        ) from error
    return [{name_of(collector): collector.result() for collector in own} for own in workers], way


def _why_eager(
    model: Any,
    longest: TokenizedText,
    way: AttentionPath,
    sites: Iterable[Site],
    fwd_hooks: Sequence[UserHook],
) -> str:
    """What kept a pass that is too large from being streamed."""
    if way == "eager":
        try:
            path_of_attention(
                model, longest.tokens, "streaming", sites=list(sites), fwd_hooks=fwd_hooks
            )
        except ModelError as error:
            return f" ({error})"
    return ""


def _read_patterns(
    observers: dict[Site, Observer],
    n_layers: int,
    lengths: Sequence[int],
    request: ColumnRequest,
    receive: Receive,
) -> None:
    """Let the observers of the pattern reduce it to columns as well."""

    def reader(site: Site, others: Observer | None) -> Observer:
        def read(pattern: Tensor) -> None:
            if others is not None:
                others(pattern)
            rows = zip(pattern, lengths, strict=True)
            columns = [AttentionColumns.of_pattern(p[:, :n, :n], request) for p, n in rows]
            receive(cast(int, site.layer), columns)

        return read

    for site in layer_sites(["pattern"], n_layers):
        observers[site] = reader(site, observers.get(site))


def hooked_sites(collector: Collector) -> list[str]:
    """The sites of a collector that are activations of the host."""
    return [name for name in collector.sites if name != ATTENTION]


def _update(collector: Collector, site: Site, activation: Tensor) -> None:
    """Hand over an activation, and see that it comes back as it was."""
    if activation.is_inference():  # such tensors keep no count of their changes
        collector.update(site.name, site.layer, activation)
        return
    before = activation._version
    collector.update(site.name, site.layer, activation)
    if activation._version != before:
        raise InputError(
            f"the collector {name_of(collector)!r} changed the activation of {site.name!r} in "
            "place, and with it the rest of the forward pass; work on a copy"
        )


def _without_padding(activation: Tensor, site: Site, n_tokens: int) -> Tensor:
    if site.name in ("pattern", "attn_scores"):
        return activation[:, :n_tokens, :n_tokens]
    return activation[:n_tokens]


def _check_finite(residual: Tensor, info: ModelInfo, layer: int | None) -> None:
    # The sum is NaN or infinite if any entry is: one reduction instead of a mask.
    if not torch.isfinite(residual.float().sum()) and not torch.isfinite(residual).all():
        bad = (~torch.isfinite(residual)).any(dim=-1).nonzero()[0].item()
        raise ModelError(
            f"the residual stream of {info.name!r} is NaN or infinite after layer {layer}, first "
            f"at position {bad}; in float16 large residuals overflow (load with "
            "dtype=torch.bfloat16 or float32), otherwise the weights or a hook are broken"
        )


def name_of(collector: Collector) -> str:
    """Under which name the result of a collector is found."""
    return collector.name or type(collector).__name__
