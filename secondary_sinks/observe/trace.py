"""One streaming forward pass, any number of collectors.

`run_with_cache` keeps every activation (4 GB at 512 tokens of a 0.5B model) and is reduced to a few
statistics afterwards. `trace` hands each activation to the collectors when it appears and lets it
go: nothing is kept that is not a statistic.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.models.host import (
    HostInfo,
    Observer,
    Site,
    UserHook,
    describe,
    has_site,
    layer_sites,
    observe,
)
from secondary_sinks.models.identity import check_residual_identity
from secondary_sinks.models.memory import is_out_of_memory
from secondary_sinks.models.text import Message, Text, TokenizedText, is_many, pad, tokenize
from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.attention_path import (
    AttentionChoice,
    AttentionPath,
    Receive,
    path_of_attention,
    streamed_attention,
)
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.storage import load_record, save_record

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class Trace(Mapping[str, Any]):
    """What the collectors found in one text, by collector name."""

    tokens: Int[Tensor, "token"]
    token_strings: tuple[str, ...]
    host: HostInfo
    results: dict[str, Any]
    chat: bool = False
    """Whether the tokens came out of a chat template."""
    attention: AttentionPath = "eager"
    """How attention was computed: whole patterns, or streamed without them."""

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        found = ", ".join(self.results)
        return f"Trace({self.host.name!r}, {len(self.tokens)} tokens: {found})"

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, token), with a column for every result that has both.

        Results by head are averaged over heads; fields of result objects become
        `name.field` columns.
        """
        import pandas as pd

        n_layers, n_tokens = self.host.n_layers, len(self.tokens)
        layer, token = torch.meshgrid(torch.arange(n_layers), torch.arange(n_tokens), indexing="ij")
        columns: dict[str, Any] = {
            "layer": layer.flatten().numpy(),
            "position": token.flatten().numpy(),
            "token": list(self.token_strings) * n_layers,
        }
        for name, value in _tensors(self.results):
            # Only a collector's own result has heads in the middle; a field may have anything.
            if (
                value.ndim == 3
                and value.shape[::2] == (n_layers, n_tokens)
                and name in self.results
            ):
                value = value.float().mean(dim=1)
            if value.shape == (n_layers, n_tokens):
                columns[name] = value.flatten().numpy()
        return pd.DataFrame(columns)

    def save(self, path: str | Path) -> Path:
        """Write every tensor result to one safetensors file; see `load`."""
        record = {
            "chat": self.chat,
            "attention": self.attention,
            "token_strings": self.token_strings,
            "host": dataclasses.asdict(self.host),
        }
        results = {f"results/{name}": tensor for name, tensor in _tensors(self.results)}
        tensors = {"tokens": self.tokens} | results
        return save_record(path, "Trace", tensors, record)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote; fields of result objects come back as `name.field` tensors."""
        tensors, record = load_record(path, "Trace")
        host = record["host"] | {"processing": tuple(record["host"]["processing"])}
        tokens = tensors.pop("tokens")
        strings = tuple(record["token_strings"])
        results = {name.removeprefix("results/"): tensor for name, tensor in tensors.items()}
        attention = record.get("attention", "eager")  # files of before knew no other
        return cls(tokens, strings, HostInfo(**host), results, record["chat"], attention)


class TraceOptions(TypedDict, total=False):
    """The keyword arguments of `trace`, which `detect_sinks` passes on."""

    chat: bool
    prepend_bos: bool | None
    max_tokens: int | None
    attention_mask: Tensor | None
    batch_size: int
    fwd_hooks: Sequence[UserHook]
    attention: AttentionChoice
    progress: bool | None


@overload
def trace(
    model: Any,
    text: str | list[Message],
    collectors: Sequence[Collector],
    **options: Unpack[TraceOptions],
) -> Trace: ...
@overload
def trace(
    model: Any, text: list[str], collectors: Sequence[Collector], **options: Unpack[TraceOptions]
) -> list[Trace]: ...
@overload
def trace(
    model: Any, text: Text, collectors: Sequence[Collector], **options: Unpack[TraceOptions]
) -> Trace | list[Trace]: ...
def trace(
    model: Any,
    text: Text,
    collectors: Sequence[Collector],
    *,
    chat: bool = False,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    attention_mask: Int[Tensor, "batch token"] | None = None,
    batch_size: int = 1,
    fwd_hooks: Sequence[UserHook] = (),
    attention: AttentionChoice = "auto",
    progress: bool | None = None,
) -> Trace | list[Trace]:
    """Run the model once over each text and collect statistics of its activations.

    Hooks that are already on the model stay, and what they change is what the collectors see; the
    hooks that this call adds are gone when it ends, also when it raises. The model's mode and
    weights are not touched and no gradient is kept.

    Args:
        model: any TransformerLens model (`TransformerBridge`, `HookedTransformer`).
        text: a string, a list of strings, a conversation, token ids, or a list of token tensors;
            see `secondary_sinks.models.text.tokenize` for these and the next four arguments.
        collectors: what to keep; see `secondary_sinks.observe.collectors`. They are settings only:
            a copy of each works on each text.
        chat: wrap each string in the model's chat template.
        prepend_bos: None keeps the tokenizer's own convention.
        max_tokens: cut each text after this many tokens.
        attention_mask: marks the padding of a padded token tensor.
        batch_size: texts in one forward pass, padded on the right. It changes speed and memory,
            not the results.
        fwd_hooks: further `(hook name, function)` pairs for these passes, for example to intervene.
        attention: "streaming" computes it a block of queries at a time and holds no pattern, so
            that memory grows with the text and not with its square; "eager" is the host's own way.
            They agree up to rounding. "auto" streams texts of some length, unless the model, a hook
            or a collector needs what only the eager pass shows (patterns, scores, rotated queries
            and keys). `Trace.attention` says which way was taken; see `observe.attention_path`.
        progress: show a progress bar; None shows one for more than one batch.

    Returns:
        One `Trace` for one text, a list of them, in order, for several.

    Raises:
        InputError: unusable text, collectors or arguments.
        ModelError: the model lacks a site, a hook did not fire as it should, the residual identity
            does not hold, an activation is NaN or infinite (the first such layer is named),
            memory does not suffice, or `attention="streaming"` is not possible.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; a whole number from 1 on is meant")
    info = describe(model)
    collectors = _as_list(collectors)
    _check_collectors(model, collectors, info)
    texts = tokenize(
        model,
        text,
        chat=chat,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
        attention_mask=attention_mask,
    )
    check_residual_identity(model)
    # Texts of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    show = len(batches) > 1 if progress is None else progress
    traces: dict[int, Trace] = {}
    for batch in tqdm(batches, desc="forward passes", disable=not show):
        own = [texts[index] for index in batch]
        found = _trace_batch(model, info, own, collectors, fwd_hooks, attention)
        traces.update(zip(batch, found, strict=True))
    in_order = [traces[index] for index in range(len(texts))]
    return in_order if is_many(text) else in_order[0]


def _trace_batch(
    model: Any,
    info: HostInfo,
    texts: Sequence[TokenizedText],
    collectors: Sequence[Collector],
    fwd_hooks: Sequence[UserHook],
    attention: AttentionChoice,
) -> list[Trace]:
    workers = [[copy.deepcopy(collector) for collector in collectors] for _ in texts]
    for text, own in zip(texts, workers, strict=True):
        run = Run(info.n_layers, info.n_heads, len(text), info.d_model, text.tokens)
        for collector in own:
            collector.start(run)
    readers: dict[Site, list[int]] = defaultdict(list)
    for site in layer_sites(["resid_post"], info.n_layers):
        readers[site] = []  # always read, so that a NaN is found where it arises
    for index, collector in enumerate(collectors):
        for site in layer_sites(_hooked_sites(collector), info.n_layers):
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
    streamed = way == "streaming"
    try:
        with streamed_attention(model, lengths, request, receive) if streamed else nullcontext():
            observe(model, tokens, mask, observers, fwd_hooks=fwd_hooks)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{len(texts)} texts of {len(longest)} tokens do not fit into memory with {way} "
            f"attention{_why_eager(model, longest, way, observers, fwd_hooks)}; shorten the text, "
            "lower batch_size or keep less"
        ) from error
    return [
        Trace(
            tokens=text.tokens,
            token_strings=text.token_strings,
            host=info,
            results={_name(collector): collector.result() for collector in own},
            chat=text.chat,
            attention=way,
        )
        for text, own in zip(texts, workers, strict=True)
    ]


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


def _hooked_sites(collector: Collector) -> list[str]:
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
            f"the collector {_name(collector)!r} changed the activation of {site.name!r} in place, "
            "and with it the rest of the forward pass; work on a copy"
        )


def _as_list(collectors: Any) -> list[Collector]:
    if isinstance(collectors, Collector) or not isinstance(collectors, Iterable):
        raise InputError(f"a list of collectors is meant, not {type(collectors).__name__}")
    listed = list(collectors)
    for collector in listed:
        if isinstance(collector, type) or not hasattr(collector, "update"):
            raise InputError(
                f"{collector!r} is no collector; pass an instance, as in [SinkScores()]"
            )
    return listed


def _without_padding(activation: Tensor, site: Site, n_tokens: int) -> Tensor:
    if site.name in ("pattern", "attn_scores"):
        return activation[:, :n_tokens, :n_tokens]
    return activation[:n_tokens]


def _check_finite(residual: Tensor, info: HostInfo, layer: int | None) -> None:
    # The sum is NaN or infinite if any entry is: one reduction instead of a mask.
    if not torch.isfinite(residual.float().sum()) and not torch.isfinite(residual).all():
        bad = (~torch.isfinite(residual)).any(dim=-1).nonzero()[0].item()
        raise ModelError(
            f"the residual stream of {info.name!r} is NaN or infinite after layer {layer}, first "
            f"at position {bad}; in float16 large residuals overflow (load with "
            "dtype=torch.bfloat16 or float32), otherwise the weights or a hook are broken"
        )


def _check_collectors(model: Any, collectors: Sequence[Collector], info: HostInfo) -> None:
    if not collectors:
        raise InputError("no collectors: say what to keep, for example [SinkScores()]")
    names = [_name(collector) for collector in collectors]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"two collectors are named {sorted(twice)[0]!r}; give one another `name`")
    for collector in collectors:
        needed = _hooked_sites(collector) + ["pattern"] * (ATTENTION in collector.sites)
        for site in layer_sites(needed, info.n_layers):
            if not has_site(model, site):
                raise ModelError(
                    f"{_name(collector)} reads {site.name!r}, which {info.name!r} does not have "
                    f"in layer {site.layer}: leave this collector out for this model"
                )


def _name(collector: Collector) -> str:
    return collector.name or type(collector).__name__


def _tensors(results: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in results.items():
        if isinstance(value, Tensor):
            yield name, value
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                entry = getattr(value, field.name)
                if isinstance(entry, Tensor):
                    yield f"{name}.{field.name}", entry
