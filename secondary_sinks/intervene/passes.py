"""Any number of counterfactual rows, in as few passes as memory allows.

Rows are sorted by the layer of their first edit before they are cut into chunks. A row is its clean
token up to there, so the pass of each chunk can begin at the first layer in which one of its rows
is edited: with several chunks, about half of the layers need not run at all. The order of the
results, and the results, do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from secondary_sinks.errors import ModelError
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.intervene.cached_rows import run_cached
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.full_passes import run_full
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.packed_rows import run_packed
from secondary_sinks.intervene.rows import RowStates

FastEngine = Literal["cached", "packed"]
Engine = Literal["cached", "packed", "full"]

MEMORY_BUDGET = 1 << 30
"""Bytes that the attention of one packed pass may take, by default."""

CACHED_ROWS = 256
"""Rows of a cached pass at most."""

MAX_BEGINNINGS = 8
"""At most so many residual streams of the text are kept for passes to begin with."""


def run_chunk(
    engine: FastEngine,
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    *,
    fwd_hooks: Sequence[UserHook] = (),
) -> RowStates:
    """Rows that fit into memory together, by one engine."""
    if engine == "cached":
        return run_cached(model, clean, rows)
    return run_packed(model, clean, rows, fwd_hooks=fwd_hooks)


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
    """Any number of rows, in order.

    Args:
        engine: which engine runs them; "full" is a pass for each row, whatever the budget.
        model: any TransformerLens model that the engine can run.
        clean: the clean run of the text; passes begin where it kept the residual stream
            (`beginnings`).
        rows: what to edit.
        memory_budget: bytes for the attention of a pass; decides the chunks.
        fwd_hooks: hooks of the user's own.
        progress: show a progress bar; None shows one for more than one chunk.

    Raises:
        ModelError: not even one row fits into memory.
    """
    if engine == "full":
        show = len(rows) > 1 if progress is None else progress
        bar = tqdm(rows, desc="full passes", disable=not show)
        return run_full(model, clean, bar, fwd_hooks=fwd_hooks, totals=False)[0]
    order = _by_first_edit(rows)
    size = chunk_size(engine, model, len(clean.tokens), memory_budget)
    show = len(rows) > size if progress is None else progress
    done: list[RowStates] = []
    first = 0
    with tqdm(total=len(rows), desc="counterfactual rows", disable=not show) as bar:
        while first < len(rows):
            chunk = [rows[index] for index in order[first : first + size]]
            try:
                states = run_chunk(engine, model, clean, chunk, fwd_hooks=fwd_hooks)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ModelError(
                        f"not even one row fits into memory behind {len(clean.tokens)} tokens; "
                        "shorten the text"
                    ) from error
                size = max(1, len(chunk) // 2)
                continue
            done.append(states)
            first += len(chunk)
            bar.update(len(chunk))
    return RowStates.joined(done).take(torch.tensor(order).argsort())


def beginnings(model: Any, rows: Sequence[Row], n_tokens: int, memory_budget: int) -> set[int]:
    """Layers at which the packed passes of these rows can begin; the clean run is to keep the
    residual stream before them."""
    order = _by_first_edit(rows)
    size = chunk_size("packed", model, n_tokens, memory_budget)
    first_edits = sorted({rows[index][0].layer for index in order[::size]} - {0})
    return set(first_edits[:: -(-len(first_edits) // MAX_BEGINNINGS) or 1])


def chunk_size(engine: FastEngine, model: Any, n_tokens: int, memory_budget: int) -> int:
    """How many rows share a pass.

    Cached rows: as many as make a pass efficient, and no more, so that most begin late.
    Packed rows: what fits into the budget, but at most twice as many as tokens. More would spend
    the time on rows' attention to other rows, which is masked, and begin their pass too early.
    """
    cfg, n_heads = model.cfg, describe(model).n_heads
    if engine == "cached":
        return max(1, min(CACHED_ROWS, memory_budget // (100 * int(cfg.d_model))))
    # The eager attention holds about five float32 copies of its scores at once.
    length = int((memory_budget / (20 * n_heads)) ** 0.5)
    return max(1, min(length - n_tokens, 2 * max(n_tokens, 128)))


def _by_first_edit(rows: Sequence[Row]) -> list[int]:
    return sorted(range(len(rows)), key=lambda index: rows[index][0].layer)
