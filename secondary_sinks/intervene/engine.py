"""Which engine can be believed in a model: measured, never assumed.

Whether attention can be masked from outside, whether positions are followed and whether the first
blocks can be left out depends on the architecture, and no host says when it cannot. So the first
time that a model is used, and again when a text first exceeds a sliding window, a few rows of each
fast engine are compared with full passes. An engine that is off by more than rounding explains is
not used.

Hooks of the user's own are a second thing to be fooled by: one that edits the token at index 7
edits the text, and not the row of that token, which stands elsewhere. Where there are such hooks,
rows are packed behind the text, and a row without an edit is run for every token first: it must be
the clean token.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.attention_replaced import sliding_windows
from secondary_sinks.host.forward import has_hooks
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, layer_sites
from secondary_sinks.intervene.clean_run import CleanRun, KeepMasks, KeepText
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.full_passes import run_full
from secondary_sinks.intervene.interventions import Intervention, Row, rows_of
from secondary_sinks.intervene.passes import Engine, FastEngine, run_chunk, run_rows
from secondary_sinks.intervene.rows import RowStates, clean_states
from secondary_sinks.observe.attention_path import path_of_attention
from secondary_sinks.sinks.detect_sinks import detect_sinks
from secondary_sinks.sinks.sink_map import SinkMap

Method = Literal["auto", "cached", "packed", "full"]

_LONGEST_TEST = 600
"""Tokens of the self-test of models that do not show which keys a query sees."""

_tested: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], float]] = weakref.WeakKeyDictionary()


def clean_run_for_rows(
    model: Any,
    sink_map: SinkMap,
    method: Method,
    *,
    positions: Iterable[int],
    sites: Iterable[Site] = (),
    begin_at: Iterable[int] = (),
    fwd_hooks: Sequence[UserHook] = (),
) -> CleanRun:
    """The clean run of a text, with what the engine needs that `method` asks for.

    Args:
        model: any TransformerLens model.
        sink_map: the sink map of the text.
        method: an engine, or "auto", which keeps the text for cached rows where attention can be
            streamed and there are no hooks, and masks for packed ones elsewhere.
        positions: the tokens of the rows to come.
        sites: those that the rows' edits look at (`rows.looked_at`).
        begin_at: layers at which passes of packed rows may begin.
        fwd_hooks: hooks of the user's own.

    Raises:
        ModelError: the model cannot be measured, or "cached" was asked for and cannot be had.
    """
    keep: KeepText | KeepMasks | None = None if method == "full" else KeepMasks(begin_at)
    if method == "cached" or (method == "auto" and not (fwd_hooks or has_hooks(model))):
        read = layer_sites(["resid_pre", "resid_post"], describe(model).n_layers)
        try:
            path_of_attention(
                model, cast(Tensor, sink_map.tokens), "streaming", sites=[*read, *sites]
            )
            keep = KeepText(positions, sites)
        except ModelError:
            if method == "cached":
                raise
    return CleanRun.of(model, sink_map, fwd_hooks=fwd_hooks, keep=keep)


def choose_engine(
    model: Any,
    clean: CleanRun,
    method: Method,
    positions: Sequence[int],
    fwd_hooks: Sequence[UserHook] = (),
) -> tuple[Engine, float | None]:
    """The engine to run, and what its self-test measured.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        method: an engine, or "auto" for the first of "cached", "packed", "full" that is
            right, of those for which the clean run kept what they need.
        positions: the tokens of the rows to come.
        fwd_hooks: hooks of the user's own.

    Returns:
        The engine and its largest relative difference from a full pass. Where "auto" comes down to
        full passes, the smallest difference of the engines that failed, None if none could run.

    Raises:
        ModelError: the engine that was asked for is wrong in this model, or with these hooks.
    """
    if method == "full":
        return "full", None
    hooked = bool(fwd_hooks) or has_hooks(model)
    errors: list[float] = []
    engine: FastEngine = "packed" if clean.kept is None else "cached"
    # Without the text in its place, a hook that looks at the sequence would edit other tokens.
    if method in ("auto", engine) and not (engine == "cached" and hooked):
        error = _self_test(model, clean, engine)
        if error is not None and error <= tolerance(model) and hooked:
            error = max(error, _without_edits(model, clean, engine, positions, fwd_hooks))
        if error is not None and error <= tolerance(model):
            return engine, error
        errors += [] if error is None else [error]
    if method == "auto":
        return "full", min(errors, default=None)
    raise ModelError(
        f"{method} rows are wrong in {describe(model).name!r} (relative error "
        f"{min(errors, default=None)}): its attention, or a hook on it, cannot be run that way; "
        "use method='full'"
    )


def _self_test(model: Any, clean: CleanRun, engine: FastEngine) -> float | None:
    """Largest relative difference of an engine's rows from a full pass; None if it cannot run.

    Measured once a model, and once more when a text first exceeds a sliding window, because that
    is where a host masks differently and says nothing.
    """
    generation = describe(model).generation
    if generation == "other":
        return None
    n_tokens = len(clean.tokens)
    if clean.shows_scores or engine == "cached":
        widths = [int(kind.sum(dim=1).max()) for kind in clean.visible]
        widths += sliding_windows(model) if engine == "cached" else ()
        # Of the sliding windows that this text exceeds.
        longest = max((width for width in widths if width < n_tokens), default=0)
        n_tested = min(n_tokens, longest + 48)
    else:
        n_tested = longest = min(n_tokens, _LONGEST_TEST)
    known = _tested.setdefault(model, {})
    if (engine, longest) not in known:
        known[engine, longest] = _against_full(model, clean, engine, n_tested)
    return known[engine, longest]


def _against_full(model: Any, clean: CleanRun, engine: FastEngine, n_tokens: int) -> float:
    """The difference on the first tokens of the text, without hooks of the user's own."""
    tokens = clean.tokens[:n_tokens]
    sinks = detect_sinks(model, tokens, primary=clean.sink_map.primary_position)
    middle = describe(model).n_layers // 3
    late, early = rows_of(
        [
            Intervention("mlp_out", middle, (n_tokens - 1) // 2, Zero()),
            Intervention("attn_out", 0, max(0, n_tokens - 2), Scale(2.0)),
        ]
    )
    keep: KeepText | KeepMasks = KeepMasks({middle} - {0})
    if engine == "cached":
        keep = KeepText({late[0].position, early[0].position})
    try:
        short = CleanRun.of(model, cast(SinkMap, sinks), keep=keep)
        # Twice, because a pass with the second row begins with the first block, one without it not.
        passes = [run_chunk(engine, model, short, rows) for rows in ([late, early], [late])]
    except (ModelError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return float("inf")  # the host does not take the mask, the positions, or the cache
    full, _ = run_full(model, short, [late, early, late], totals=False)
    return RowStates.joined(passes).difference_from(full)


def _without_edits(
    model: Any,
    clean: CleanRun,
    engine: FastEngine,
    positions: Sequence[int],
    fwd_hooks: Sequence[UserHook],
) -> float:
    """How far rows that edit nothing are from their clean tokens."""
    of_tokens = sorted(set(positions))
    rows: list[Row] = [(Intervention("resid_pre", 0, p, Scale(1.0)),) for p in of_tokens]
    states = run_rows(engine, model, clean, rows, fwd_hooks=fwd_hooks, progress=False)
    return states.difference_from(clean_states(clean, of_tokens))
