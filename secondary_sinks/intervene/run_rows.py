"""Any number of counterfactual rows, in as few passes as memory allows.

Rows are sorted by the layer of their first edit before they are cut into chunks. A row equals its
clean token up to that layer, so the pass of a chunk begins at the first layer in which one of its
rows is edited: with several chunks, about half of the blocks need not run. The order of the results
does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from secondary_sinks.host.memory import MEMORY_BUDGET, eager_attention_bytes, in_chunks
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.intervene.cached_rows import run_cached
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.full_passes import run_full
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.packed_rows import run_packed
from secondary_sinks.intervene.rows import RowStates

FastEngine = Literal["cached", "packed"]
Engine = Literal["cached", "packed", "full"]

CACHED_ROWS = 256
"""Largest number of rows in a cached pass."""


def run_rows(
    engine: Engine,
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    *,
    memory_budget: int = MEMORY_BUDGET,
    fwd_hooks: Sequence[UserHook] = (),
    progress: bool | None = None,
) -> RowStates:
    """Run any number of rows; the results are in their order.

    Args:
        engine: which engine runs them; "full" makes a pass for each row, whatever the budget.
        model: any TransformerLens model that the engine can run.
        clean: the clean run of the text, with what the engine needs; packed passes begin where it
            kept the residual stream (`first_edits`).
        rows: what to edit.
        memory_budget: bytes for the attention of a pass; decides how many rows share it.
        fwd_hooks: the user's hooks.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        ModelError: not even one row fits into memory.
    """
    if engine == "full":
        return run_full(model, clean, rows, fwd_hooks=fwd_hooks, totals=False, progress=progress)[0]
    order = _by_first_edit(rows)
    n_tokens = len(clean.tokens)
    chunks = in_chunks(
        lambda chunk: run_chunk(engine, model, clean, chunk, fwd_hooks=fwd_hooks),
        [rows[index] for index in order],
        rows_per_pass(engine, model, n_tokens, memory_budget),
        too_large=f"not even one row fits into memory with {n_tokens} tokens; shorten the text",
        description="counterfactual rows",
        progress=progress,
    )
    return RowStates.joined(list(chunks)).take(torch.tensor(order).argsort())


def run_chunk(
    engine: FastEngine,
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    *,
    fwd_hooks: Sequence[UserHook] = (),
) -> RowStates:
    """Run rows in one pass of one engine."""
    if engine == "cached":
        return run_cached(model, clean, rows)
    return run_packed(model, clean, rows, fwd_hooks=fwd_hooks)


def first_edits(model: Any, rows: Sequence[Row], n_tokens: int, memory_budget: int) -> set[int]:
    """The layers at which the packed passes of these rows can begin: the first edit of each."""
    order = _by_first_edit(rows)[:: rows_per_pass("packed", model, n_tokens, memory_budget)]
    return {rows[index][0].layer for index in order}


def rows_per_pass(engine: FastEngine, model: Any, n_tokens: int, memory_budget: int) -> int:
    """How many rows share a pass.

    Cached rows: as many as make a pass efficient, and no more, so that most passes begin late.
    Packed rows: what fits into the budget, but at most twice as many as tokens. More would spend
    the time on the masked attention of rows to other rows, and begin their pass too early.
    """
    if engine == "cached":
        return max(1, min(CACHED_ROWS, memory_budget // (100 * int(model.cfg.d_model))))
    length = math.isqrt(memory_budget // eager_attention_bytes(model, n_tokens=1))
    return max(1, min(length - n_tokens, 2 * max(n_tokens, 128)))


def _by_first_edit(rows: Sequence[Row]) -> list[int]:
    return sorted(range(len(rows)), key=lambda index: rows[index][0].layer)
