"""One forward pass over a text, with any number of collectors.

`run_with_cache` keeps every activation (4 GB at 512 tokens of a 0.5B model), which is reduced to a
few statistics afterwards. `trace` gives each activation to the collectors as it appears and keeps
only their statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.identity import SUMMANDS, check_residual_identity
from secondary_sinks.host.model_info import ModelInfo, describe
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import attention_layers, missing_sites
from secondary_sinks.host.text_input import (
    Message,
    Text,
    is_many,
    plain_input,
    tokenize,
    warn_of_padding,
)
from secondary_sinks.observe.attention_columns import ATTENTION
from secondary_sinks.observe.attention_path import AttentionChoice, AttentionPath
from secondary_sinks.observe.batch import batches_of, name_of, read_sites, run_batch
from secondary_sinks.observe.collectors import Collector
from secondary_sinks.result import from_record, to_record
from secondary_sinks.storage import load_record, save_record

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class Trace(Mapping[str, Any]):
    """The results of the collectors for one text, by collector name."""

    tokens: Int[Tensor, " token"]
    token_strings: tuple[str, ...]
    provenance: Provenance
    results: dict[str, Any]
    chat: bool = False
    """Whether the tokens come from a chat template."""

    @property
    def attention(self) -> AttentionPath:
        """How attention was computed: "eager", with whole patterns, or "streaming" or "fused"."""
        return cast(AttentionPath, self.provenance.attention)

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        names = ", ".join(self.results)
        return f"Trace({self.provenance.model.name!r}, {len(self.tokens)} tokens: {names})"

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, token), with a column for every result that has both.

        Results by head are averaged over heads; fields of result objects become
        `name.field` columns.
        """
        import pandas as pd

        n_layers, n_tokens = int(self.provenance.model.n_layers or 0), len(self.tokens)
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
            "token_strings": self.token_strings,
            "provenance": to_record(self.provenance, "provenance", {}),
        }
        results = {f"results/{name}": tensor for name, tensor in _tensors(self.results)}
        tensors = {"tokens": self.tokens} | results
        return save_record(path, "Trace", tensors, record)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote; fields of result objects come back as `name.field` tensors."""
        tensors, record = load_record(path, "Trace")
        provenance = from_record(record["provenance"], Provenance, {})
        tokens = tensors.pop("tokens")
        strings = tuple(record["token_strings"])
        results = {name.removeprefix("results/"): tensor for name, tensor in tensors.items()}
        return cls(tokens, strings, provenance, results, record["chat"])


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
    model: Model,
    text: str | list[Message],
    collectors: Sequence[Collector],
    **options: Unpack[TraceOptions],
) -> Trace: ...
@overload
def trace(
    model: Any,
    text: list[str] | list[list[Message]] | list[Tensor],
    collectors: Sequence[Collector],
    **options: Unpack[TraceOptions],
) -> list[Trace]: ...
@overload
def trace(
    model: Any, text: Text, collectors: Sequence[Collector], **options: Unpack[TraceOptions]
) -> Trace | list[Trace]: ...
def trace(
    model: Model,
    text: Text,
    collectors: Sequence[Collector],
    *,
    chat: bool = False,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    attention_mask: Int[Tensor, " batch token"] | None = None,
    batch_size: int = 1,
    fwd_hooks: Sequence[UserHook] = (),
    attention: AttentionChoice = "auto",
    progress: bool | None = None,
) -> Trace | list[Trace]:
    """Run the model once over each text and collect statistics of its activations.

    Hooks that are already on the model stay in force, and collectors get what they changed. The
    hooks that this call adds are removed at the end, also after an error. The model's mode and
    weights do not change and no gradient is kept.

    Args:
        model: any TransformerLens model (`TransformerBridge`, `HookedTransformer`).
        text: a string, a list of strings, a conversation, token ids, or a list of token tensors;
            see `secondary_sinks.host.text_input.tokenize` for these and the next four arguments.
        collectors: what to keep; see `secondary_sinks.observe.collectors`. They are settings only:
            each text gets its own copy.
        chat: wrap each string in the model's chat template.
        prepend_bos: None keeps the model's own setting.
        max_tokens: cut each text after this many tokens.
        attention_mask: marks the padding of a padded token tensor.
        batch_size: largest number of texts in one forward pass, padded on the right; texts of very
            different lengths do not share one. It changes speed and memory, not the results.
        fwd_hooks: further `(hook name, function)` pairs for these passes, for example to intervene.
        attention: "eager" is TransformerLens' own computation; "streaming" computes attention a
            block of queries at a time and holds no pattern, so that memory grows with the text and
            not with its square; "fused" (experimental, never run on a GPU) does the same by
            compiled kernels on a GPU. They agree up to rounding. "auto" streams texts of 256 tokens
            and more, unless the model, a hook or a collector needs what only the eager pass shows
            (patterns, scores, rotated queries and keys). `Trace.attention` says which path was
            taken; see `observe.attention_path`.
        progress: show a progress bar; None shows one for more than one batch.

    Returns:
        One `Trace` for one text, a list of them, in order, for several.

    Raises:
        InputError: unusable text, collectors or arguments.
        ModelError: the model lacks a site, a hook did not fire exactly once, a collector reads
            `attn_out`, `mlp_out` or `resid_mid` and the residual stream is not their sum, an
            activation is NaN or infinite (the first such layer is named), memory does not suffice,
            or `attention="streaming"` is not possible.

    >>> trace_result = trace(model, "The cat sat on the mat.", [SinkScores(), Norms("mlp_out")])
    >>> trace_result["mlp_out_norm"].shape  # [layer, token]
    >>> trace_result.to_frame()
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    info = describe(model)
    collectors = _as_list(collectors)
    _check_collectors(model, collectors, info)
    text, attention_mask = plain_input(text, attention_mask)
    texts = tokenize(
        model,
        text,
        chat=chat,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
        attention_mask=attention_mask,
    )
    pad_id = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if isinstance(text, Tensor) and attention_mask is None and pad_id is not None:
        warn_of_padding(texts, pad_id)
    if any(site.name in SUMMANDS for one in collectors for site in read_sites(model, one)):
        check_residual_identity(model)
    provenance = Provenance.of(model, fwd_hooks=fwd_hooks)
    tokenizer = getattr(model, "tokenizer", None)
    batches = batches_of([len(tokenized) for tokenized in texts], batch_size)
    show = len(batches) > 1 if progress is None else progress
    traces: dict[int, Trace] = {}
    for batch in tqdm(batches, desc="forward passes", disable=not show):
        results_of_texts, path = run_batch(
            model, info, [texts[index] for index in batch], collectors, fwd_hooks, attention
        )
        for index, results in zip(batch, results_of_texts, strict=True):
            tokenized = texts[index]
            of_text = provenance.of_text(
                tokenizer, int(tokenized.tokens[0]), chat=tokenized.chat, attention=path
            )
            traces[index] = Trace(
                tokenized.tokens, tokenized.token_strings, of_text, results, tokenized.chat
            )
    in_order = [traces[index] for index in range(len(texts))]
    return in_order if is_many(text) else in_order[0]


def trace_tokens(
    model: Model,
    tokens: Int[Tensor, " token"],
    collectors: Sequence[Collector],
    *,
    fwd_hooks: Sequence[UserHook] = (),
    attention: AttentionChoice = "auto",
) -> Trace:
    """`trace` of one text that is given as token ids."""
    trace_result = trace(model, tokens, collectors, fwd_hooks=fwd_hooks, attention=attention)
    if isinstance(trace_result, list):
        raise InputError(f"expected the ids of one text, got {list(tokens.shape)}")
    return trace_result


def _as_list(collectors: Any) -> list[Collector]:
    if isinstance(collectors, Collector) or not isinstance(collectors, Iterable):
        raise InputError(f"expected a list of collectors, got {type(collectors).__name__}")
    listed = list(collectors)
    for collector in listed:
        if isinstance(collector, type) or not hasattr(collector, "update"):
            raise InputError(
                f"{collector!r} is not a collector; pass an instance, as in [SinkScores()]"
            )
        if isinstance(collector.sites, str):
            raise InputError(
                f"sites of {name_of(collector)} must be a tuple of names, as in "
                f"({collector.sites!r},)"
            )
    return listed


def _check_collectors(model: Model, collectors: Sequence[Collector], info: ModelInfo) -> None:
    if not collectors:
        raise InputError("no collectors: say what to keep, for example [SinkScores()]")
    names = [name_of(collector) for collector in collectors]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"two collectors are named {sorted(twice)[0]!r}; give one another `name`")
    shows_attention = bool(attention_layers(model))
    for collector in collectors:
        if ATTENTION in collector.sites and not shows_attention:
            raise ModelError(
                f"{type(collector).__name__} reads attention, and {info.name!r} shows none in any "
                "layer: it has none, or TransformerLens does not look into its blocks. Attention "
                "sinks cannot be detected in it; norms and alignment of its residual stream can be "
                "measured (ResidualNorms, ResidualGeometry, MassiveActivations)"
            )
        for site in missing_sites(model, read_sites(model, collector)):
            raise ModelError(
                f"{type(collector).__name__} reads {site.name!r}, which {info.name!r} does not "
                f"have in layer {site.layer}: leave this collector out for this model, or name the "
                "hook of a layer that has one"
            )


def _tensors(results: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in results.items():
        if isinstance(value, Tensor):
            yield name, value
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                entry = getattr(value, field.name)
                if isinstance(entry, Tensor):
                    yield f"{name}.{field.name}", entry
