"""Which path attention takes in a pass: streamed, fused (on a GPU), or eager.

All give the same numbers. Streaming never holds a pattern and is faster on all but short texts, but
hooks between the projections and the heads' outputs do not fire there, and a model's attention may
include steps that its hooks do not expose. So `observe.streaming_check` compares the paths once in
each model. A pass that needs another hook, and a model that differs, takes the eager path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

from jaxtyping import Int
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.attention_replaced import (
    AttentionInputs,
    has_module_hooks,
    replaced_attention,
)
from secondary_sinks.host.forward import Observer
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import FINAL_NORM, Site, attention_layers, hook_names
from secondary_sinks.observe.attention_columns import (
    AttentionColumns,
    ColumnRequest,
    eager_columns,
)
from secondary_sinks.observe.streaming_attention import StreamingAttention
from secondary_sinks.observe.streaming_check import StreamingCheck, check_streaming

AttentionChoice = Literal["auto", "streaming", "fused", "eager"]
AttentionPath = Literal["streaming", "fused", "eager"]
Receive = Callable[[int, list[AttentionColumns]], None]

SHORTEST = 256
"""Tokens from which on `auto` streams. Shorter texts gain nothing from it (measured on SmolLM2-135M
alone), and the first of them would pay for the comparison."""


def path_of_attention(
    model: Any,
    tokens: Int[Tensor, " token"],
    choice: AttentionChoice,
    *,
    sites: Iterable[Site] = (),
    fwd_hooks: Sequence[UserHook] = (),
) -> AttentionPath:
    """Which path attention takes in a pass over a text.

    Args:
        model: any TransformerLens model.
        tokens: the longest text of the pass.
        choice: what the caller wants; "auto" streams long texts where it can.
        sites: what will be read or edited.
        fwd_hooks: the user's hooks in this pass; those on the model are considered as well.

    Raises:
        InputError: an unknown choice.
        ModelError: the chosen path is not possible; the message says why.
    """
    if choice not in (choices := get_args(AttentionChoice)):
        raise InputError(f"no attention {choice!r}; use one of {', '.join(choices)}")
    if choice == "eager" or (choice == "auto" and len(tokens) < SHORTEST):
        return "eager"
    problem = _problem(model, tokens, sites, fwd_hooks)
    if choice == "fused":
        problem = problem or _no_accelerator(model)
    if problem is None:
        return "fused" if choice == "fused" else "streaming"
    if choice == "auto":
        return "eager"
    done = "fused" if choice == "fused" else "streamed"
    raise ModelError(f"attention cannot be {done} here: {problem}")


@contextmanager
def measured_attention(
    model: Any,
    lengths: Sequence[int],
    request: ColumnRequest,
    receive: Receive,
    path: AttentionPath,
) -> Iterator[list[tuple[Site, Observer]]]:
    """Within the context attention takes a path, and `receive` gets its columns.

    Args:
        model: a model for which `path_of_attention` returned this path.
        lengths: number of tokens of every text of the batch, without the padding on its right.
        request: which column statistics to compute.
        receive: called once for each layer with attention, with one `AttentionColumns` for each
            text.
        path: as `path_of_attention` returned it.

    Yields:
        Observers that the pass needs.

    Raises:
        ModelError: at the end, if a layer of another path than "eager" did not run its attention
            exactly once.
    """
    if path == "eager":
        with eager_columns(model, lengths, request, receive) as observers:
            yield observers
    else:
        with _streamed(model, lengths, request, receive, path):
            yield []


@contextmanager
def _streamed(
    model: Any,
    lengths: Sequence[int],
    request: ColumnRequest,
    receive: Receive,
    path: AttentionPath,
) -> Iterator[None]:
    # The share of a learned sink logit follows from the softmax denominator.
    log_sum_exp = request.log_sum_exp or request.entropy
    kernel = _kernel(model, path, lengths, replace(request, log_sum_exp=log_sum_exp))
    calls: dict[int, int] = defaultdict(int)

    def attend(layer: int, inputs: AttentionInputs) -> Tensor:
        calls[layer] += 1
        output, columns = kernel(inputs)
        columns = [part.with_total(inputs.sink_logits) for part in columns]
        if request.inputs:
            columns = [
                replace(part, inputs=inputs.of_text(row, length))
                for row, (part, length) in enumerate(zip(columns, lengths, strict=True))
            ]
        receive(layer, columns)
        return output

    with replaced_attention(model, attend):
        yield
    for layer in attention_layers(model):
        if calls[layer] != 1:
            raise ModelError(
                f"the attention of layer {layer} ran {calls[layer]} times in one streamed pass; "
                "use attention='eager'"
            )


def _kernel(
    model: Any, path: AttentionPath, lengths: Sequence[int], request: ColumnRequest
) -> Callable[[AttentionInputs], tuple[Tensor, list[AttentionColumns]]]:
    if path != "fused":
        return StreamingAttention(lengths, request)
    # Imported on demand, because it is experimental and of no use without a GPU.
    from secondary_sinks.observe.fused_attention import FusedAttention

    return FusedAttention(lengths, request, tolerance=tolerance(model))


def _problem(
    model: Any,
    tokens: Int[Tensor, " token"],
    sites: Iterable[Site],
    fwd_hooks: Sequence[UserHook],
) -> str | None:
    """Why a pass over a text cannot be streamed; None if it can."""
    try:
        check = check_streaming(model, tokens)
        return check.problem or _silent_hook(model, check, sites, fwd_hooks)
    except ModelError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return "there is not enough memory to compare it with the eager pass first"


def _silent_hook(
    model: Any, check: StreamingCheck, sites: Iterable[Site], fwd_hooks: Sequence[UserHook]
) -> str | None:
    """A site or hook of this pass that does not fire while attention is streamed, in words."""
    if has_module_hooks(model):
        return "an attention module has PyTorch hooks, which would see another output"
    points = model.hook_dict
    canonical = {name: str(point.name) for name, point in points.items()}
    # The final norm is read by a module hook, after all attention.
    hooked = [site for site in sites if site.name != FINAL_NORM]
    for site, name in zip(hooked, hook_names(model, hooked), strict=True):
        if name not in check.same_hooks:
            return f"{site.name!r} is requested, whose hook does not fire then"
    for wanted, _ in fwd_hooks:
        names = [wanted] if isinstance(wanted, str) else filter(wanted, canonical)
        for name in names:
            if canonical.get(name, name) not in check.same_hooks:
                return f"there is a hook for {name!r}, which does not fire then"
    for name, point in points.items():
        # All hooks on the model, whichever way they were added.
        if point._forward_hooks and canonical[name] not in check.same_hooks:
            return f"the model has a hook at {name!r}, which does not fire then"
    return None


def _no_accelerator(model: Any) -> str | None:
    if next(model.parameters()).device.type != "cpu":
        return None
    return "the model is on a CPU, and kernels are fused on a GPU; use attention='streaming'"
