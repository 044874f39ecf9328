"""Which way attention goes in a pass: streamed (or fused, on a GPU), or eager as the host does it.

All give the same numbers. Streaming never holds a pattern and is faster on all but short texts;
but the host's hooks between the projections and the heads' outputs do not fire there, silently, and
a host may do more in its attention than it tells. So nothing is assumed of a model. The first time
that one is about to stream, a short text is run both ways, once with every hook read, and compared:
residuals, column statistics, and which hooks showed the same. When a text first exceeds a sliding
window the same is done beyond it, or, where an eager pass of that length would take much memory,
some queries of it are computed densely (`observe.window_check`). Whoever needs another hook, and a
model that does not agree, gets the eager pass.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.attention_replaced import (
    AttentionInputs,
    has_module_hooks,
    replaced_attention,
    sliding_windows,
)
from secondary_sinks.host.forward import Observer, observe
from secondary_sinks.host.identity import hooks_aside
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import FINAL_NORM, Site, hook_names
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest
from secondary_sinks.observe.fused_attention import FusedAttention
from secondary_sinks.observe.streaming_attention import StreamingAttention
from secondary_sinks.observe.window_check import window_problem

AttentionChoice = Literal["auto", "streaming", "fused", "eager"]
AttentionPath = Literal["streaming", "fused", "eager"]
Receive = Callable[[int, list[AttentionColumns]], None]

SHORTEST = 256
"""Tokens from which on `auto` streams. Shorter texts gain nothing from it (measured on SmolLM2-135M
alone), and their first one would pay for the comparison."""

_TESTED = 64  # tokens of the first comparison
_BEYOND = 48  # and of the next ones, beyond the longest window that the text exceeds
_EAGER_BUDGET = 1 << 30  # bytes that the eager half of a comparison may take
_COMPARED = 16  # last tokens, whose residuals are compared: they depend on all others


def path_of_attention(
    model: Any,
    tokens: Int[Tensor, "token"],
    choice: AttentionChoice,
    *,
    sites: Iterable[Site] = (),
    fwd_hooks: Sequence[UserHook] = (),
) -> AttentionPath:
    """The way that attention takes in a pass over a text.

    Args:
        model: any TransformerLens model.
        tokens: the longest text of the pass.
        choice: what the caller wants; "auto" streams long texts where it can.
        sites: what will be read or edited.
        fwd_hooks: the user's hooks in this pass; those on the model are asked about as well.

    Raises:
        InputError: no such choice.
        ModelError: streaming was wanted, and cannot be had; the message says why.
    """
    if choice not in (known := get_args(AttentionChoice)):
        raise InputError(f"no attention {choice!r}; use one of {', '.join(known)}")
    if choice == "eager" or (choice == "auto" and len(tokens) < SHORTEST):
        return "eager"
    try:
        comparison = _comparison(model, tokens)
        problem = comparison.problem or _unseen(model, comparison, sites, fwd_hooks)
        if choice == "fused":
            problem = problem or _no_accelerator(model)
    except ModelError as error:
        problem = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = "there is no memory left to compare it with the eager pass first"
    if problem and choice != "auto":
        done = {"streaming": "streamed"}.get(choice, choice)
        raise ModelError(f"attention cannot be {done} here: {problem}")
    if problem:
        return "eager"
    return "fused" if choice == "fused" else "streaming"


def _no_accelerator(model: Any) -> str | None:
    if next(model.parameters()).device.type != "cpu":
        return None
    return "the model is on a CPU, and kernels are fused on a GPU; use attention='streaming'"


@contextmanager
def streamed_attention(
    model: Any,
    lengths: Sequence[int],
    request: ColumnRequest,
    receive: Receive,
    way: AttentionPath = "streaming",
) -> Iterator[None]:
    """Within it the model's attention is streamed, and hands its column statistics to `receive`.

    Args:
        model: a model for which `path_of_attention` said so.
        lengths: number of tokens of every text of the batch, without the padding on its right.
        request: which column statistics to compute.
        receive: called once a layer, with one `AttentionColumns` for each text.
        way: "streaming", or "fused".

    Raises:
        ModelError: at the end, if a layer did not run its attention exactly once.
    """
    # What a learned sink logit leaves of a query's weights is told by the sum that divides them.
    log_sum_exp = request.log_sum_exp or request.entropy
    request = replace(request, log_sum_exp=log_sum_exp)
    kernel = (
        FusedAttention(lengths, request, tolerance=tolerance(model))
        if way == "fused"
        else StreamingAttention(lengths, request)
    )
    calls: dict[int, int] = defaultdict(int)

    def attend(layer: int, inputs: AttentionInputs) -> Tensor:
        calls[layer] += 1
        output, columns = kernel(inputs)
        columns = [one.measured(inputs.window, inputs.sink_logits) for one in columns]
        if request.inputs:
            texts = enumerate(zip(columns, lengths, strict=True))
            columns = [replace(own, inputs=inputs.of_text(row, n)) for row, (own, n) in texts]
        receive(layer, columns)
        return output

    with replaced_attention(model, attend):
        yield
    for layer in range(describe(model).n_layers):
        if calls[layer] != 1:
            raise ModelError(
                f"the attention of layer {layer} ran {calls[layer]} times in one streamed pass; "
                "use attention='eager'"
            )


@dataclass(frozen=True)
class _Comparison:
    """What a streamed and an eager pass over the same text have in common."""

    problem: str | None
    """Why the model cannot be streamed."""
    same_hooks: frozenset[str]
    """Hooks that fire as often, with the same shapes and norms."""


_comparisons: weakref.WeakKeyDictionary[Any, dict[int, _Comparison]] = weakref.WeakKeyDictionary()


def _comparison(model: Any, tokens: Tensor) -> _Comparison:
    """Compared once a model, and again when a text first exceeds a sliding window."""
    exceeded = {width for width in sliding_windows(model) if width < len(tokens)}
    longest = max(exceeded, default=0)
    known = _comparisons.setdefault(model, {})
    if longest not in known:
        n_tokens = min(len(tokens), max(_TESTED, longest + _BEYOND))
        with hooks_aside(model):
            if not exceeded or _eager_bytes(model, n_tokens) <= _EAGER_BUDGET:
                known[longest] = _compare(model, tokens[:n_tokens])
            else:
                known[longest] = _compare_parts(model, tokens[:n_tokens], exceeded)
    return known[longest]


def _eager_bytes(model: Any, n_tokens: int) -> int:
    """Memory of the eager half: two texts, about five float32 copies of a layer's scores."""
    return 2 * 20 * describe(model).n_heads * n_tokens**2


def _compare_parts(model: Any, tokens: Tensor, widths: set[int]) -> _Comparison:
    """A short text both ways, and a long one against a few dense queries."""
    comparison = _compare(model, tokens[:_TESTED])
    if comparison.problem is not None:
        return comparison
    try:
        problem = window_problem(model, tokens, widths, tolerance(model))
    except _HOST_FAILS as error:
        problem = _reason(error)
    return replace(comparison, problem=problem)


def _compare(model: Any, tokens: Tensor) -> _Comparison:
    try:
        streamed = _Pass(model, tokens, stream=True)
    except _HOST_FAILS as error:
        return _Comparison(_reason(error), frozenset())
    eager = _Pass(model, tokens, stream=False)
    difference = streamed.difference(eager)
    allowed = tolerance(model)
    problem = None
    if not difference <= allowed:
        problem = (
            f"on {len(tokens)} tokens {describe(model).name!r} differs from its eager pass by "
            f"{difference:.1e}, more than the {allowed:.1e} that rounding explains"
        )
    same = {name for name in eager.hooks if _close(eager.hooks[name], streamed.hooks.get(name))}
    return _Comparison(problem, frozenset(same))


_HOST_FAILS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


def _reason(error: Exception) -> str:
    """What a host's failure says of streaming; memory may be there another time, and says nothing.

    Raises:
        RuntimeError: the error itself, if an allocation failed.
    """
    if is_out_of_memory(error):
        raise error
    return str(error) if isinstance(error, ModelError) else f"the host fails ({error!r})"


class _Pass:
    """One pass over a text, with a shorter one beside it, and what it showed."""

    def __init__(self, model: Any, tokens: Tensor, *, stream: bool):
        n_tokens = len(tokens)
        lengths = (n_tokens, -(-n_tokens // 2))
        mask = torch.arange(n_tokens) < torch.tensor(lengths)[:, None]
        self.residual: dict[int, Tensor] = {}
        self.received: dict[int, list[Tensor]] = {}
        self.hooks: dict[str, list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        layers = range(describe(model).n_layers)
        observers = {Site("resid_post", layer): self._residual_reader(layer) for layer in layers}
        request = ColumnRequest()

        def receive(layer: int, columns: list[AttentionColumns]) -> None:
            self.received[layer] = [one.received.cpu() for one in columns]

        def pattern_reader(layer: int) -> Observer:
            def read(pattern: Tensor) -> None:
                rows = zip(pattern, lengths, strict=True)
                own = (AttentionColumns.of_pattern(p[:, :n, :n], request) for p, n in rows)
                receive(layer, list(own))

            return read

        if not stream:
            observers |= {Site("pattern", layer): pattern_reader(layer) for layer in layers}
        way = streamed_attention(model, lengths, request, receive) if stream else nullcontext()
        with warnings.catch_warnings(), way:
            warnings.simplefilter("ignore")  # on hooks that the model's settings switch off
            observe(
                model,
                tokens.expand(2, -1),
                mask.long(),
                observers,
                fwd_hooks=[(lambda name: True, self._note)],
            )

    def difference(self, other: _Pass) -> float:
        """The largest relative difference; NaN and what is missing count as infinite."""
        errors = [0.0 if self.received.keys() == other.received.keys() else math.inf]
        for layer, mine in self.residual.items():
            theirs = other.residual[layer]
            errors.append(float((mine - theirs).norm() / theirs.norm()))
        for layer, columns in self.received.items():
            for column, theirs in zip(columns, other.received.get(layer, ()), strict=False):
                errors.append(float(((column - theirs).abs() / (1 + theirs)).max()))
        return max(math.inf if math.isnan(error) else error for error in errors)

    def _residual_reader(self, layer: int) -> Observer:
        def read(residual: Tensor) -> None:
            self.residual[layer] = residual[0, -_COMPARED:].float().cpu()

        return read

    def _note(self, activation: Any, hook: Any) -> None:
        # The first text only: padding, behind the second, is nobody's business.
        if isinstance(activation, Tensor):
            norm = float(activation[:1].float().norm())
            self.hooks[str(hook.name)].append((tuple(activation.shape), norm))


def _close(
    eager: list[tuple[tuple[int, ...], float]],
    streamed: list[tuple[tuple[int, ...], float]] | None,
) -> bool:
    """Whether a hook showed the same; a twentieth is beyond rounding in any precision."""
    return (
        streamed is not None
        and len(eager) == len(streamed)
        and all(
            shape == other_shape and abs(norm - other) <= 0.05 * abs(norm) + 1e-6
            for (shape, norm), (other_shape, other) in zip(eager, streamed, strict=True)
        )
    )


def _unseen(
    model: Any, comparison: _Comparison, sites: Iterable[Site], fwd_hooks: Sequence[UserHook]
) -> str | None:
    """What somebody wants to see or edit and cannot while attention is streamed."""
    if has_module_hooks(model):
        return "an attention module has PyTorch hooks, which would see another output"
    points = model.hook_dict
    canonical = {name: str(point.name) for name, point in points.items()}
    # The final norm is read by a module hook, behind all attention.
    hooked = [site for site in sites if site.name != FINAL_NORM]
    for site, name in zip(hooked, hook_names(model, hooked), strict=True):
        if name not in comparison.same_hooks:
            return f"{site.name!r} is asked for, whose hook does not fire there"
    for wanted, _ in fwd_hooks:
        names = [wanted] if isinstance(wanted, str) else filter(wanted, canonical)
        for name in names:
            if canonical.get(name, name) not in comparison.same_hooks:
                return f"there is a hook for {name!r}, which does not fire there"
    for name, point in points.items():
        # A hook on the model is one of these whichever way it was put there.
        if point._forward_hooks and canonical[name] not in comparison.same_hooks:
            return f"the model has a hook at {name!r}, which does not fire there"
    return None
