"""Which engine can be believed in a model: measured, never assumed.

Whether attention can be masked from outside, whether positions are followed and whether the first
blocks can be left out depends on the architecture, and no host says when it cannot. So the first
time that a model is used, and again when a text first exceeds a sliding window, a few rows of each
fast engine are compared with full passes. An engine that is off by more than rounding explains is
not used.

Hooks of the user's own are a second thing to be fooled by: one that edits the token at index 7
edits the text, and not the row of that token, which stands elsewhere. Where there are such hooks,
a row without an edit is run for every token first: it must be the clean token.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from secondary_sinks.errors import ModelError
from secondary_sinks.intervene.chunks import Engine, FastEngine, run_chunk, run_rows
from secondary_sinks.intervene.clean import CleanRun
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.full import run_full
from secondary_sinks.intervene.interventions import Intervention, Row, rows_of
from secondary_sinks.intervene.rows import RowStates
from secondary_sinks.models.host import UserHook, describe, has_hooks
from secondary_sinks.models.precision import tolerance

Method = Literal["auto", "packed", "batched", "full"]

_LONGEST_TEST = 600
"""Tokens of the self-test of models that do not show which keys a query sees."""

_tested: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], float]] = weakref.WeakKeyDictionary()


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
        method: an engine, or "auto" for the first of "packed", "batched", "full" that is right.
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
    for engine in get_args(FastEngine):
        # One token at a time, a hook that looks at the sequence would meet a sequence of one.
        if method not in ("auto", engine) or (engine == "batched" and hooked):
            continue
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
    if generation == "other" or (engine == "batched" and generation != "bridge"):
        return None
    n_tokens = len(clean.tokens)
    longest = 0  # of the sliding windows that this text exceeds
    if clean.shows_scores:
        widths = [int(kind.sum(dim=1).max()) for kind in clean.visible]
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
    sinks = dataclasses.replace(
        clean.sinks,
        tokens=clean.tokens[:n_tokens],
        token_strings=clean.sinks.token_strings[:n_tokens],
        n_tokens=n_tokens,
        sinks=(),
    )
    middle = describe(model).n_layers // 3
    short = CleanRun.of(model, sinks, begin_at={middle} - {0})
    late, early = rows_of(
        [
            Intervention("mlp_out", middle, (n_tokens - 1) // 2, Zero()),
            Intervention("attn_out", 0, max(0, n_tokens - 2), Scale(2.0)),
        ]
    )
    try:
        # Twice, because a pass with the second row begins with the first block, one without it not.
        passes = [run_chunk(engine, model, short, rows) for rows in ([late, early], [late])]
    except (ModelError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return float("inf")  # the host does not take the mask, the positions, or the cache
    full, _ = run_full(model, short, [late, early, late], totals=False)
    return difference(RowStates.joined(passes), full)


def difference(fast: RowStates, full: RowStates) -> float:
    """Largest relative difference of rows from the oracle's.

    Residuals are compared relative to the largest norm that they had up to that layer: what is
    left of a massive vector after it was erased has the rounding of the massive one.
    """
    size = full.norm.cummax(dim=1).values
    largest = full.direct_score.nan_to_num(0).max().clamp_min(1e-30)
    differences = (
        (fast.norm - full.norm) / size,
        (fast.centered_alignment - full.centered_alignment) * full.centered_norm / size,
        (fast.direct_score - full.direct_score) / largest,
    )
    oracles = (full.norm, full.centered_alignment, full.direct_score)
    # NaN is right where the oracle has it too: the last token of a text is never looked at.
    return max(
        float(change[~torch.isnan(oracle)].abs().nan_to_num(nan=float("inf")).max())
        for change, oracle in zip(differences, oracles, strict=True)
        if not torch.isnan(oracle).all()
    )


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
    geometry = {name: value[:, of_tokens].T for name, value in vars(clean.geometry).items()}
    score = clean.score[:, :, of_tokens].permute(2, 0, 1)
    return difference(states, RowStates(**geometry, direct_score=score))
