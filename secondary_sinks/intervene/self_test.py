"""Whether a fast engine is right in a model, measured against full passes and against clean tokens.

Whether attention can be masked from outside, whether positions are followed and whether the first
blocks can be left out depends on the architecture, and no model says when it cannot. So the first
time that a model is used, and again when a text first exceeds a sliding window, a few rows of the
engine are compared with full passes.

The user's hooks can go wrong in another way: a hook that edits the token at index 7 edits the text,
and not the row of that token, which is at another index. Where there are hooks, a row without an
edit is run for every token, and must equal the clean token.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from secondary_sinks.errors import ModelError
from secondary_sinks.host.attention_replaced import sliding_windows
from secondary_sinks.host.precision import coarsest_dtype
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.intervene.clean_run import CleanRun, KeepMasks, KeepText
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.full_passes import run_full
from secondary_sinks.intervene.interventions import Intervention, Row, rows_of
from secondary_sinks.intervene.rows import RowStates, clean_states
from secondary_sinks.intervene.run_rows import FastEngine, run_chunk, run_rows
from secondary_sinks.sinks.detect_sinks import detect_sinks
from secondary_sinks.sinks.sink_map import SinkMap

_BEYOND = 48
"""Tokens of the test beyond the longest sliding window that the text exceeds."""

_LONGEST_TEST = 600
"""Tokens of the test of models that do not show which keys a query sees."""

_ENGINE_FAILS = (
    ModelError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
)
"""What is raised where a model does not take the mask, the positions or the cache."""


class Difference(NamedTuple):
    """What a test of an engine found."""

    error: float
    """Largest relative difference; infinite if the engine cannot run."""
    reason: str = ""
    """Why it cannot run."""


_tested: weakref.WeakKeyDictionary[Any, dict[Any, Difference]] = weakref.WeakKeyDictionary()
"""By engine, longest window exceeded and precision of the weights."""


def difference_from_full(model: Any, clean: CleanRun, engine: FastEngine) -> Difference:
    """Difference of an engine's rows from full passes.

    Measured once a model, and once more when a text first exceeds a sliding window, or when the
    precision of the weights has changed.
    """
    n_tokens = len(clean.tokens)
    if engine == "cached" or clean.shows_scores:
        widths = [int(kind.sum(dim=1).max()) for kind in clean.visible]
        widths += sliding_windows(model) if engine == "cached" else ()
        exceeded = max((width for width in widths if width < n_tokens), default=0)
        n_tested = min(n_tokens, exceeded + _BEYOND)
    else:
        n_tested = exceeded = min(n_tokens, _LONGEST_TEST)
    known = _tested.setdefault(model, {})
    key = (engine, exceeded, coarsest_dtype(model))
    if key not in known:
        known[key] = _compare_with_full(model, clean, engine, n_tested)
    return known[key]


def difference_from_clean(
    model: Any,
    clean: CleanRun,
    engine: FastEngine,
    positions: Sequence[int],
    fwd_hooks: Sequence[UserHook],
) -> float:
    """Largest relative difference of rows without an edit from their clean tokens."""
    distinct = sorted(set(positions))
    rows: list[Row] = [(Intervention("resid_pre", 0, p, Scale(1.0)),) for p in distinct]
    states = run_rows(engine, model, clean, rows, fwd_hooks=fwd_hooks, progress=False)
    return states.difference_from(clean_states(clean, distinct))


def _compare_with_full(
    model: Any, clean: CleanRun, engine: FastEngine, n_tokens: int
) -> Difference:
    """The difference on the first tokens of the text, without the user's hooks of this pass."""
    sink_map = detect_sinks(model, clean.tokens[:n_tokens], primary=clean.sink_map.primary_position)
    middle = clean.n_layers // 3
    late, early = rows_of(
        [
            Intervention("mlp_out", middle, (n_tokens - 1) // 2, Zero()),
            Intervention("attn_out", 0, max(0, n_tokens - 2), Scale(2.0)),
        ]
    )
    keep: KeepText | KeepMasks = KeepMasks({middle})
    if engine == "cached":
        keep = KeepText({late[0].position, early[0].position})
    try:
        short = CleanRun.of(model, cast(SinkMap, sink_map), keep=keep)
        # One pass begins with the first block, the other at its first edit.
        passes = [run_chunk(engine, model, short, rows) for rows in ([late, early], [late])]
    except _ENGINE_FAILS as error:
        failed = f"a pass with rows fails ({type(error).__name__}: {error})"
        return Difference(math.inf, str(error) if isinstance(error, ModelError) else failed)
    full, _ = run_full(model, short, [late, early, late], totals=False, progress=False)
    return Difference(RowStates.joined(passes).difference_from(full))
