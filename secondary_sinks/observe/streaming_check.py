"""Check once that streamed attention is the attention of a model, and what it hides.

A model's attention may include steps that its hooks do not expose, and the hooks between the
projections and the heads' outputs do not fire while attention is streamed. So before the first
streamed pass of a model a short text is run both ways, with every hook read, and compared:
residuals, column statistics, and which hooks showed the same.

Beyond a sliding window a model masks differently, so the check is repeated when a text first
exceeds one. An eager pass of that length holds whole patterns: with a window of 4,096 and 32 heads
some 40 GB. Where that is too much, only the mask is checked, which is all that differs there. The
model's rule for its mask is evaluated for a few queries: those at the edge of each window and the
last ones. For these the output of every layer is computed densely as well:

    streamed   blocks of queries, masked by the width that the layer names
    dense      some queries, all keys, masked by the model's rule
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.attention_replaced import (
    AttentionInputs,
    replaced_attention,
    sliding_windows,
)
from secondary_sinks.host.forward import Observer, forward
from secondary_sinks.host.hooks_aside import hooks_aside
from secondary_sinks.host.memory import (
    MEMORY_BUDGET,
    eager_attention_bytes,
    is_out_of_memory,
)
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.precision import attention_tolerance, coarsest_dtype, tolerance
from secondary_sinks.host.sites import Site
from secondary_sinks.observe.attention_columns import (
    AttentionColumns,
    ColumnRequest,
    eager_columns,
)
from secondary_sinks.observe.streaming_attention import StreamingAttention

_TESTED = 64  # tokens of the first comparison
_BEYOND = 48  # tokens beyond the longest window that the text exceeds, in later comparisons
_COMPARED = 16  # last tokens, whose residuals are compared: they depend on all others
_LAST = 8  # last queries that are computed densely
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class StreamingCheck:
    """What a streamed and an eager pass over the same text have in common."""

    problem: str | None
    """Why the model cannot be streamed."""
    same_hooks: frozenset[str]
    """Hooks that fire as often, with the same shapes and norms."""


_checks: weakref.WeakKeyDictionary[Any, dict[Any, StreamingCheck]] = weakref.WeakKeyDictionary()
"""By longest window exceeded and precision of the weights."""


def check_streaming(model: Any, tokens: Int[Tensor, " token"]) -> StreamingCheck:
    """Compare streamed with eager attention, once for each window that the text is first to exceed.

    Args:
        model: any TransformerLens model.
        tokens: the text that is to be streamed, of which the first tokens are used.

    Raises:
        ModelError: the attention of this model cannot be replaced.
        RuntimeError: memory does not suffice for the comparison.
    """
    exceeded = {width for width in sliding_windows(model) if width < len(tokens)}
    longest = max(exceeded, default=0)
    checks = _checks.setdefault(model, {})
    key = (longest, coarsest_dtype(model))
    if key not in checks:
        n_tokens = min(len(tokens), max(_TESTED, longest + _BEYOND))
        with hooks_aside(model):
            # The eager half of a comparison is a pass over two texts.
            if not exceeded or 2 * eager_attention_bytes(model, n_tokens) <= MEMORY_BUDGET:
                checks[key] = _compare(model, tokens[:n_tokens])
            else:
                checks[key] = _compare_parts(model, tokens[:n_tokens], exceeded)
    return checks[key]


def _compare_parts(model: Any, tokens: Tensor, widths: set[int]) -> StreamingCheck:
    """A short text both ways, and a long one against a few dense queries."""
    check = _compare(model, tokens[:_TESTED])
    if check.problem is not None:
        return check
    try:
        problem = window_problem(model, tokens, widths, tolerance(model))
    except _FAILURES as error:
        problem = _reason(error)
    return replace(check, problem=problem)


def _compare(model: Any, tokens: Tensor) -> StreamingCheck:
    try:
        streamed = _run(model, tokens, stream=True)
    except _FAILURES as error:
        return StreamingCheck(_reason(error), frozenset())
    eager = _run(model, tokens, stream=False)
    problem = None
    for what, difference, allowed in (
        ("the residual", streamed.residual_difference(eager), tolerance(model)),
        ("received attention", streamed.received_difference(eager), attention_tolerance(model)),
    ):
        if not difference <= allowed:
            problem = problem or (
                f"on {len(tokens)} tokens {what} of {name_of(model)!r} differs from its eager pass "
                f"by {difference:.1e}, more than the {allowed:.1e} that rounding explains"
            )
    same = {name for name in eager.hooks if _close(eager.hooks[name], streamed.hooks.get(name))}
    return StreamingCheck(problem, frozenset(same))


def _reason(error: Exception) -> str:
    """Why a streamed pass failed.

    Raises:
        RuntimeError: the error itself, if an allocation failed, which says nothing of the model.
    """
    if is_out_of_memory(error):
        raise error
    return str(error) if isinstance(error, ModelError) else f"its forward pass fails ({error!r})"


@dataclass(frozen=True)
class _Pass:
    """What one pass over a text, batched with its first half, showed."""

    residual: dict[int, Tensor] = field(default_factory=dict)
    """By layer, of the text's last tokens."""
    received: dict[int, list[Tensor]] = field(default_factory=dict)
    """By layer, for both texts."""
    hooks: dict[str, list[tuple[tuple[int, ...], float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Shape and norm of the activation at each call of each hook."""

    def residual_difference(self, other: _Pass) -> float:
        """Largest difference of a layer's residuals, relative to their norm."""
        return _largest(
            [(residual, other.residual[layer]) for layer, residual in self.residual.items()]
        )

    def received_difference(self, other: _Pass) -> float:
        """The same for the attention that tokens receive, over all tokens and heads of a layer.

        A single column is no measure: rounding of a few logits changes it several times as much.
        """
        if self.received.keys() != other.received.keys():
            return math.inf
        return _largest(
            [
                pair
                for layer, columns in self.received.items()
                for pair in zip(columns, other.received[layer], strict=True)
            ]
        )


def _largest(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Largest relative difference of the first from the second; NaN counts as infinite."""
    errors = [float((value - right).norm() / right.norm()) for value, right in pairs]
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def _run(model: Any, tokens: Tensor, *, stream: bool) -> _Pass:
    """Run a text and its first half in one batch, and read residuals, columns and every hook."""
    n_layers, n_tokens = int(model.cfg.n_layers), len(tokens)
    lengths = (n_tokens, -(-n_tokens // 2))
    mask = torch.arange(n_tokens) < torch.tensor(lengths)[:, None]
    result = _Pass()
    kernel = StreamingAttention(lengths)

    def receive(layer: int, columns: list[AttentionColumns]) -> None:
        if layer in result.received:
            raise ModelError(f"the attention of layer {layer} runs more than once in a pass")
        result.received[layer] = [of_text.received.cpu() for of_text in columns]

    def attend(layer: int, inputs: AttentionInputs) -> Tensor:
        output, columns = kernel(inputs)
        receive(layer, columns)
        return output

    def residual_reader(layer: int) -> Observer:
        def read(residual: Tensor) -> None:
            result.residual[layer] = residual[0, -_COMPARED:].float().cpu()

        return read

    def note(activation: Any, hook: Any) -> None:
        # Of the first text only: the padding behind the second may differ.
        if isinstance(activation, Tensor):
            norm = float(activation[:1].float().norm())
            result.hooks[str(hook.name)].append((tuple(activation.shape), norm))

    readers = [(Site("resid_post", layer), residual_reader(layer)) for layer in range(n_layers)]
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # about hooks that the model's settings switch off
        if stream:
            stack.enter_context(replaced_attention(model, attend))
        else:
            columns = eager_columns(model, lengths, ColumnRequest(), receive)
            readers += stack.enter_context(columns)
        forward(
            model,
            tokens.expand(2, -1),
            readers,
            fwd_hooks=[(lambda name: True, note)],
            attention_mask=mask.long(),
        )
    return result


def _close(
    eager: list[tuple[tuple[int, ...], float]],
    streamed: list[tuple[tuple[int, ...], float]] | None,
) -> bool:
    """Whether a hook showed the same, up to a twentieth, which no rounding exceeds."""
    return (
        streamed is not None
        and len(eager) == len(streamed)
        and all(
            shape == other_shape and abs(norm - other) <= 0.05 * abs(norm) + 1e-6
            for (shape, norm), (other_shape, other) in zip(eager, streamed, strict=True)
        )
    )


def window_problem(
    model: Any, tokens: Int[Tensor, " token"], widths: Iterable[int], tolerance: float
) -> str | None:
    """Why the windows of streamed attention may not be those of the model; None if they are.

    Args:
        model: a model whose streamed pass is right on a short text.
        tokens: a text longer than all the windows.
        widths: of the windows.
        tolerance: largest relative difference that rounding explains.
    """
    n_tokens = len(tokens)
    edges = {width + off for width in widths for off in (-1, 0, 1)}
    queries = sorted({q for q in edges if q < n_tokens} | set(range(n_tokens)[-_LAST:]))
    kernel = StreamingAttention([n_tokens])
    unmasked: list[int] = []
    longest: set[int] = set()
    errors = [0.0]

    def attend(layer: int, inputs: AttentionInputs) -> Tensor:
        output, _ = kernel(inputs)
        if inputs.visible is None:
            unmasked.append(layer)
        else:
            longest.add(int(inputs.visible.sum(dim=1).max()))
            expected = _dense(inputs, queries)
            error = (output[0, queries].float() - expected).abs().max() / expected.abs().max()
            errors.append(math.inf if error.isnan() else float(error))
        return output

    with replaced_attention(model, attend, look_up=queries):
        forward(model, tokens[None], [], attention_mask=torch.ones_like(tokens)[None])
    where = f"on {n_tokens} tokens of {name_of(model)!r}"
    if unmasked:
        return f"{where} layer {unmasked[0]} does not show the mask that it would have used"
    if unseen := sorted(set(widths) - longest):
        return f"{where} no layer's mask has the window of {unseen[0]} tokens in the configuration"
    if not max(errors) <= tolerance:
        return (
            f"{where} attention within windows differs from a dense computation under the model's "
            f"own mask by {max(errors):.1e}, more than the {tolerance:.1e} that rounding explains"
        )
    return None


def _dense(inputs: AttentionInputs, queries: Sequence[int]) -> Float[Tensor, " query head d_value"]:
    """Attention of some queries over all keys that the model's mask shows them."""
    query = inputs.query[0, :, list(queries)].float()
    group = query.shape[0] // inputs.key.shape[1]
    key, value = (
        repeat(part[0].float(), "kv_head token d -> (kv_head group) token d", group=group)
        for part in (inputs.key, inputs.value)
    )
    scores = inputs.logits(query @ key.mT, slice(None))
    if inputs.visible is not None:
        scores = scores.masked_fill(~inputs.visible.to(scores.device), -math.inf)
    if inputs.sink_logits is not None:
        learned = repeat(inputs.sink_logits.float(), "head -> head query 1", query=len(queries))
        scores = torch.cat([scores, learned], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[1]]
    return rearrange(weights @ value, "head query d -> query head d")
