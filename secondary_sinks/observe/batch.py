"""One padded batch of texts through the model, and which texts share one.

A batch is as long as its longest text, and the padding of the others is computed for nothing. So
texts of similar length share one: they are sorted, and a batch ends where it is full or where more
than a quarter of it would be padding. Fifteen texts of 20 tokens beside one of 900 would be 92 %
padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.forward import Observer, forward
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, attention_layers, layer_sites, missing_sites
from secondary_sinks.host.text_input import TokenizedText, pad
from secondary_sinks.observe.attention_columns import (
    ATTENTION,
    AttentionColumns,
    ColumnRequest,
)
from secondary_sinks.observe.attention_path import (
    AttentionChoice,
    AttentionPath,
    measured_attention,
    path_of_attention,
)
from secondary_sinks.observe.collectors import Collector, Run

MOST_PADDING = 0.25
"""Largest share of padding among the tokens of a batch."""


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Which texts run together: indices into `lengths`, the longest texts first.

    Args:
        lengths: number of tokens of each text.
        batch_size: largest number of texts in a batch.
    """
    batches: list[list[int]] = []
    n_tokens = 0  # of the texts of the last batch, without padding
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
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
    """Run one forward pass over some texts.

    Args:
        model: any TransformerLens model.
        info: its size and name.
        texts: padded on the right to the longest.
        collectors: what to keep; each text gets its own copy of each.
        fwd_hooks: the user's hooks.
        attention: how it is computed; see `trace`.

    Returns:
        The results of the collectors for each text, by name, and the path that attention took.
    """
    n_layers = int(model.cfg.n_layers)
    workers = [[copy.deepcopy(collector) for collector in collectors] for _ in texts]
    for text, of_text in zip(texts, workers, strict=True):
        run = Run(n_layers, int(model.cfg.n_heads), len(text), int(model.cfg.d_model), text.tokens)
        for collector in of_text:
            collector.start(run)
    # The residual stream is always read, so that a NaN is reported where it first occurs.
    indices_at: dict[Site, list[int]] = {site: [] for site in layer_sites(["resid_post"], n_layers)}
    for index, collector in enumerate(collectors):
        for site in read_sites(model, collector):
            indices_at.setdefault(site, []).append(index)

    def observer(site: Site, indices: list[int]) -> Observer:
        def read(activation: Tensor) -> None:
            for row, text in enumerate(texts):
                of_text = _without_padding(activation[row], site, len(text))
                if site.name == "resid_post":
                    _check_finite(of_text, info, site.layer)
                for index in indices:
                    _update(workers[row][index], site, of_text)

        return read

    attention_readers = [index for index, one in enumerate(collectors) if ATTENTION in one.sites]
    request = ColumnRequest()
    for index in attention_readers:
        request |= collectors[index].attention

    def receive(layer: int, columns: Sequence[AttentionColumns]) -> None:
        for row, of_text in enumerate(columns):
            for index in attention_readers:
                workers[row][index].update(ATTENTION, layer, of_text)

    def receive_nothing(layer: int) -> Observer:
        """Called in a layer without attention, in the order of the layers."""

        def read(_: Tensor) -> None:
            n_heads = int(model.cfg.n_heads)
            receive(
                layer, [AttentionColumns.of_no_attention(n_heads, len(t), request) for t in texts]
            )

        return read

    longest = max(texts, key=len)
    path = path_of_attention(
        model, longest.tokens, attention, sites=indices_at, fwd_hooks=fwd_hooks
    )
    lengths = [len(text) for text in texts]
    observers = [(site, observer(site, indices)) for site, indices in indices_at.items()]
    if attention_readers:
        with_attention = attention_layers(model)
        observers += [
            (Site("resid_post", layer), receive_nothing(layer))
            for layer in range(n_layers)
            if layer not in with_attention
        ]
    tokens, mask = pad(texts)
    try:
        with ExitStack() as stack:
            if attention_readers or path != "eager":
                measured = measured_attention(model, lengths, request, receive, path)
                observers += stack.enter_context(measured)
            forward(model, tokens, observers, fwd_hooks=fwd_hooks, attention_mask=mask)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = ""
        if path == "eager":
            reason = _why_not_streamed(model, longest.tokens, list(indices_at), fwd_hooks)
        raise ModelError(
            f"{len(texts)} texts of {len(longest)} tokens do not fit into memory with {path} "
            f"attention{reason}; shorten the text, lower batch_size or keep less"
        ) from error
    results = [{name_of(worker): worker.result() for worker in of_text} for of_text in workers]
    return results, path


def _why_not_streamed(
    model: Any, tokens: Tensor, sites: Sequence[Site], fwd_hooks: Sequence[UserHook]
) -> str:
    """Why a pass that is too large for memory is not streamed, in parentheses."""
    try:
        path_of_attention(model, tokens, "streaming", sites=sites, fwd_hooks=fwd_hooks)
    except ModelError as error:
        return f" ({error})"
    return ""


def read_sites(model: Any, collector: Collector) -> list[Site]:
    """The activations that a collector reads in a model."""
    names = [name for name in collector.sites if name != ATTENTION]
    sites = layer_sites(names, int(model.cfg.n_layers))
    if not collector.where_present:
        return sites
    missing = missing_sites(model, sites)
    # With none at all, it is better refused than given nothing.
    return [site for site in sites if site not in missing] or sites


def _update(collector: Collector, site: Site, activation: Tensor) -> None:
    """Give a collector an activation, and check that it did not change it."""
    if activation.is_inference():  # such tensors do not count their changes
        collector.update(site.name, site.layer, activation)
        return
    before = activation._version
    collector.update(site.name, site.layer, activation)
    if activation._version != before:
        raise InputError(
            f"the collector {name_of(collector)!r} changed the activation of {site.name!r} in "
            "place, which changes the rest of the forward pass; work on a copy"
        )


def _without_padding(activation: Tensor, site: Site, n_tokens: int) -> Tensor:
    if site.name in ("pattern", "attn_scores"):
        return activation[:, :n_tokens, :n_tokens]
    return activation[:n_tokens]


def _check_finite(residual: Tensor, info: ModelInfo, layer: int | None) -> None:
    # The sum is NaN or infinite if any entry is, and needs one reduction only.
    if not torch.isfinite(residual.float().sum()) and not torch.isfinite(residual).all():
        bad = (~torch.isfinite(residual)).any(dim=-1).nonzero()[0].item()
        raise ModelError(
            f"the residual stream of {info.name!r} is NaN or infinite after layer {layer}, first "
            f"at position {bad}; in float16 large residuals overflow (load with "
            "dtype=torch.bfloat16 or float32), otherwise the weights or a hook are broken"
        )


def name_of(collector: Collector) -> str:
    """The key of a collector's result."""
    return collector.name or type(collector).__name__
