"""The rows that test which block ended a sink: its token again, without each block in turn."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.analyses.decomposition.erasers import (
    Block,
    BlockAblation,
    Erased,
    EraserVerdict,
    Role,
    judge,
    leading_life,
    main_head,
    rank,
)
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.engine import Method, choose_engine, clean_run_for_rows
from secondary_sinks.intervene.interventions import EditSite, Intervention, Row
from secondary_sinks.intervene.run_rows import run_rows
from secondary_sinks.sinks.controls import phase_of
from secondary_sinks.sinks.direct_writes import DirectWrite
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


@dataclass(frozen=True)
class Suspects:
    """The blocks that may have ended one sink; none if it is not a sink, or nothing ends it."""

    index: int
    sink: Sink
    ranking: tuple[Erased, ...]
    """Blocks after the sink's last layer, those that erase most first."""
    candidates: tuple[Erased, ...]
    """The first of them, and before it its main head, if it has one."""

    @classmethod
    def of(
        cls, index: int, sink: Sink, write: DirectWrite, heads: Float[Tensor, " layer head"]
    ) -> Suspects:
        """Rank the blocks by what they erase of a sink.

        Args:
            index: of the sink in `write`.
            sink: the sink.
            write: of every block at the sinks' tokens.
            heads: what each head writes at this sink's token beyond what ordinary tokens get.
        """
        if sink.kind == "chosen":
            return cls(index, sink, (), ())
        ranking = rank(
            write.excess[index],
            write.attention_excess[index],
            write.excess_projection[index],
            sink.layers[-1],
        )
        candidates = ranking[:1]
        if ranking and ranking[0].block.kind == "attention":
            head = main_head(heads[ranking[0].block.layer], ranking[0])
            candidates = [head, *candidates] if head else candidates
        return cls(index, sink, tuple(ranking), tuple(candidates))

    @property
    def blocks(self) -> list[Block]:
        """The candidates, then the controls."""
        candidates = [candidate.block for candidate in self.candidates]
        last = max(erased.block.layer for erased in self.ranking)
        controls = [
            block
            for layer in range(self.sink.l_start + 1, last + 1)
            for block in (Block("attention", layer), Block("mlp", layer))
            if block not in candidates
        ]
        return candidates + controls

    @property
    def rows(self) -> list[Row]:
        """A row without an edit, then one without each block."""
        unedited = Intervention("mlp_out", self.sink.l_start, self.sink.position, Scale(1.0))
        return [(unedited,), *((_zeroed(block, self.sink.position),) for block in self.blocks)]

    def ablations(
        self, is_sink: Bool[Tensor, " row layer"], length: Float[Tensor, " row layer"]
    ) -> list[BlockAblation]:
        """What became of the rows."""
        after = self.candidates[0].block.layer
        whole = length[0, self.sink.layers[-1]]

        def ablation(row: int, block: str, role: Role) -> BlockAblation:
            lifetime = leading_life(is_sink[row], self.sink.l_start)
            return BlockAblation(
                self.index, block, role, lifetime, float(length[row, after] / whole)
            )

        n_candidates = len(self.candidates)
        return [ablation(0, "", "unedited")] + [
            ablation(row, str(block), "candidate" if row <= n_candidates else "control")
            for row, block in enumerate(self.blocks, start=1)
        ]

    def verdict(
        self, write: DirectWrite, primary: DirectWrite, ablations: Sequence[BlockAblation]
    ) -> EraserVerdict:
        """The verdict on a main head if it passes the tests, else on the block.

        Args:
            write: of every block at the sinks' tokens.
            primary: the same at the primary's.
            ablations: what became of this sink's rows; empty if they were not run.
        """
        if self.sink.kind == "chosen":
            return EraserVerdict(f"the token at position {self.sink.position} is not a sink")
        if not self.candidates:
            return EraserVerdict("the sink lives to the last layer, so nothing ends it")
        last = self.sink.layers[-1]
        verdicts = []
        for candidate in self.candidates:
            block = candidate.block
            written = primary.excess if block.kind == "mlp" else primary.attention_excess
            of_primary = -written[self.index, block.layer]
            verdicts.append(
                judge(
                    candidate,
                    self.ranking[1:],
                    whole=float(write.excess_projection[self.index, last]),
                    primary_share=float(of_primary / primary.excess_projection[self.index, last]),
                    ablations=ablations,
                )
            )
        return next((verdict for verdict in verdicts if verdict.eraser), verdicts[-1])


def ablate(
    model: Model,
    sink_map: SinkMap,
    suspects: Sequence[Suspects],
    *,
    method: Method = "auto",
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> tuple[dict[int, list[BlockAblation]], str | None]:
    """Zero each suspect at its sink's token; by index of the sink, and the engine that ran."""
    suspects = [suspected for suspected in suspects if suspected.candidates]
    if not suspects:
        return {}, None
    clean = clean_run_for_rows(
        model,
        sink_map,
        method,
        positions=[suspected.sink.position for suspected in suspects],
        begin_at={suspected.sink.l_start for suspected in suspects},
        fwd_hooks=fwd_hooks,
    )
    # Rows of sinks that end alike are measured against the same direction.
    groups: dict[tuple[int, int], list[Suspects]] = defaultdict(list)
    for suspected in suspects:
        phase = phase_of(sink_map, suspected.sink)
        groups[phase.start, suspected.sink.layers[-1]].append(suspected)
    ablations: dict[int, list[BlockAblation]] = {}
    for (start, last), group in groups.items():
        held = _hold_direction(clean, start, last)
        rows = [row for suspected in group for row in suspected.rows]
        positions = [row[0].position for row in rows]
        engine, _ = choose_engine(model, clean, method, positions, fwd_hooks)
        states = run_rows(engine, model, held, rows, fwd_hooks=fwd_hooks, progress=progress)
        is_sink = states.is_sink(held.judge, torch.tensor(positions))
        length = states.centered_norm * states.centered_alignment
        first = 0
        for suspected in group:
            own = slice(first, first + len(suspected.rows))
            ablations[suspected.index] = suspected.ablations(is_sink[own], length[own])
            first = own.stop
    return ablations, engine


def _hold_direction(clean: CleanRun, start: int, last: int) -> CleanRun:
    """The clean run with the sink direction after layer `last` held fixed from there on, in a phase
    that begins at `start` and does not end.

    The primary may lose its length where the sink does, and then no residual is aligned with it;
    whether the sink itself would have lived on must not depend on that.
    """
    sink_map = clean.sink_map
    primary = clean.primary.clone()
    primary[last + 1 :] = clean.common[last + 1 :] + clean.primary[last] - clean.common[last]
    judge = dataclasses.replace(clean.judge, phases=((start, len(primary)),))
    return dataclasses.replace(
        clean,
        sink_map=dataclasses.replace(sink_map, primary_residual=primary, judge=judge),
        # A pass that begins later would take the clean tokens' alignment with the primary itself.
        begin_by=last + 1,
    )


def _zeroed(block: Block, position: int) -> Intervention:
    if block.kind == "head":
        return Intervention("z", block.layer, position, Zero(), head=block.head)
    site: EditSite = "mlp_out" if block.kind == "mlp" else "attn_out"
    return Intervention(site, block.layer, position, Zero())
