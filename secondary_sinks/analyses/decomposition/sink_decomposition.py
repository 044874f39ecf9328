"""All that is written along a sink's direction, by MLP and by head, and who ends the sink."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from secondary_sinks.intervene.passes import MAX_BEGINNINGS, run_rows
from torch import Tensor

from secondary_sinks.analyses.decomposition.decomposition_result import (
    DecomposedSink,
    HeadWrite,
    SinkDecomposition,
)
from secondary_sinks.analyses.decomposition.erasers import (
    Block,
    BlockRemoved,
    EraserVerdict,
    judge,
    leading_life,
    main_head,
    no_eraser,
    rank,
)
from secondary_sinks.errors import InputError
from secondary_sinks.host.attention_weights import (
    OutputWeights,
    check_head_sum,
    output_weights,
)
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.engine import Method, choose_engine, clean_run_for_rows
from secondary_sinks.intervene.interventions import EditSite, Intervention, Row
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.sinks.direct_writes import (
    DirectWrite,
    Projections,
    checked_write,
    sink_directions,
)
from secondary_sinks.sinks.selection import chosen_sinks, sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


def sink_decomposition(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    which: Literal["secondary"] | Sequence[Sink] = "secondary",
    direction: Literal["onset", "last"] | int = "onset",
    verify: bool = True,
    method: Method = "auto",
    chat: bool = False,
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> SinkDecomposition:
    """Take each sink's residual along its direction apart, and find the block that ends the sink.

    The direction is `(r - c) / |r - c|`, with `r` the primary's residual and `c` the common
    component after one layer; it is the same for all parts of a sink, because only then do they
    add up. A part is the dot product of what the embedding, an MLP, an attention head (its `z`
    through its slice of W_O) or an attention's output bias adds to the token with that direction,
    in units of the residual stream. Where a norm follows the attention, heads and bias are
    multiplied by what the norm multiplied their sum with in this run. That parts up to a layer are
    the residual's own projection, and heads the attention's, is checked.

    The *eraser* of a sink is the block after its last layer that takes most off along the
    direction, beyond what ordinary tokens lose, if the token is a sink for longer when that block's
    output there is zeroed (`analyses.decomposition.erasers`). The controls are all other MLPs and attention blocks
    from the onset to the layer after which little of the sink is left. A sink for which the tests
    disagree has `eraser=None` and a `reason`, as has one that lives to the last layer.

    What it is not evidence for: a large part is a write, not a cause of whatever happens later; and
    an eraser ends the sink at this token, which does not make ending sinks its purpose.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        which: "secondary" for all secondary sinks, or some sinks of the map.
        direction: after which layer the primary's direction is taken: that of the sink's onset, the
            sink's last, or any. `rotation` of the result tells how much they differ.
        verify: test candidates and controls by zeroing them; without it there is no eraser.
        method: engine of these rows; see `counterfactuals`.
        chat: the string goes through the chat template.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: hooks of your own, in force in every pass.

    Returns:
        `SinkDecomposition`: parts as [sink, layer] and [sink, layer, head], and a verdict a sink.

    Raises:
        InputError: no secondary sinks in the text, sinks that are not in the map, a direction that
            is no layer, a sink map of another model, text or criterion, or several texts.
        ModelError: the parts do not add up in this model, or it cannot be measured.
    """
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    chosen = chosen_sinks(found, which)
    n_layers = int(found.model["n_layers"])
    layers = [_direction_layer(direction, sink, n_layers) for sink in chosen]
    begin_at = sorted({sink.l_start for sink in chosen} - {0})[:MAX_BEGINNINGS]
    clean = clean_run_for_rows(
        model,
        found,
        method,
        positions=[sink.position for sink in chosen],
        begin_at=begin_at,
        fwd_hooks=fwd_hooks,
    )
    directions = sink_directions(clean, layers)
    write, primary, heads = _writes(model, clean, chosen, directions, fwd_hooks)
    tests = [
        _Test(index, sink, found, write, heads, run=verify) for index, sink in enumerate(chosen)
    ]
    engine = ""
    for group in _groups([test for test in tests if test.rows]):
        kept = group[0].kept(clean)
        rows = [row for test in group for row in test.rows]
        positions = [row[0].position for row in rows]
        engine, _ = choose_engine(model, clean, method, positions, fwd_hooks)
        states = run_rows(engine, model, kept, rows, fwd_hooks=fwd_hooks, progress=progress)
        length = states.centered_norm * states.centered_alignment
        is_sink = kept.judge(
            states.centered_alignment, states.centered_norm, states.direct_score, positions
        )
        first = 0
        for test in group:
            mine = slice(first, first + len(test.rows))
            test.take(is_sink[mine], length[mine])
            first = mine.stop
    return SinkDecomposition(
        sinks=tuple(
            _decomposed(test, layer, write, primary)
            for test, layer in zip(tests, layers, strict=True)
        ),
        n_layers=n_layers,
        n_heads=heads.heads.shape[2],
        direction=str(direction),
        write=write,
        head_write=heads,
        primary_write=primary,
        rotation=_rotation(clean, directions),
        removed=tuple(removed for test in tests for removed in test.removed),
        engine=engine,
        model=found.model,
        primary_position=found.primary_position,
    )


def _direction_layer(direction: str | int, sink: Sink, n_layers: int) -> int:
    if direction in ("onset", "last"):
        return sink.l_start if direction == "onset" else sink.layers[-1]
    if not isinstance(direction, int) or not 0 <= direction < n_layers:
        raise InputError(
            f"direction={direction!r}; use 'onset', 'last' or a layer from 0 to {n_layers - 1}"
        )
    return direction


def _writes(
    model: Any,
    clean: CleanRun,
    chosen: Sequence[Sink],
    directions: Float[Tensor, "sink d_model"],
    fwd_hooks: Sequence[UserHook],
) -> tuple[DirectWrite, DirectWrite, HeadWrite]:
    """What everything writes at the sinks' tokens, what blocks write at the primary's along the
    same directions, and what heads write at the sinks'."""
    positions = [sink.position for sink in chosen]
    at_primary = Projections(
        [clean.sink_map.primary_position] * len(chosen), directions, clean.ordinary
    )
    at_primary.name = "primary"
    collectors: list[Collector] = [
        Projections(positions, directions, clean.ordinary),
        at_primary,
        _Heads(positions, directions, clean.ordinary, lambda layer: output_weights(model, layer)),
    ]
    found = cast(Trace, trace(model, clean.tokens, collectors, fwd_hooks=fwd_hooks))
    heads, dtype = found["_Heads"]
    check_head_sum(model, heads.error, dtype)
    return (
        checked_write(model, found["Projections"]),
        checked_write(model, found["primary"]),
        heads,
    )


class _Heads(Collector):
    """Projections of what every attention head adds to a few tokens, and to ordinary ones."""

    sites = ("z", "attn_out")

    def __init__(
        self,
        positions: Sequence[int],
        directions: Float[Tensor, "sink d_model"],
        ordinary: Bool[Tensor, "token"],
        weights: Callable[[int], OutputWeights],
    ):
        self._positions = list(positions)
        self._directions = directions
        self._ordinary = ordinary
        self._weights = weights

    def start(self, run: Run) -> None:
        shape = (len(self._positions), run.n_layers)
        self._own = torch.zeros(*shape, run.n_heads)
        self._mean = torch.zeros(*shape, run.n_heads)
        self._bias = torch.zeros(shape)
        self._error = 0.0
        self._dtype = torch.float32

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        if site == "z":
            self._z = activation.float()
            self._dtype = activation.dtype
            return
        z, self._z = self._z, torch.empty(0)
        weights = self._weights(cast(int, layer))
        scale, error = weights.scale(z, activation.float())
        self._error = max(self._error, error)
        read, bias = weights.along(self._directions.to(z.device))
        scaled = z * scale[:, None, None]
        ordinary = scaled[self._ordinary.to(z.device)].mean(dim=0)
        self._own[:, layer] = (scaled[self._positions] * read).sum(dim=-1).cpu()
        self._mean[:, layer] = (ordinary * read).sum(dim=-1).cpu()
        self._bias[:, layer] = (scale[self._positions] * bias).cpu()

    def result(self) -> tuple[HeadWrite, torch.dtype]:
        return HeadWrite(self._own, self._bias, self._mean, self._error), self._dtype


def _rotation(
    clean: CleanRun, directions: Float[Tensor, "sink d_model"]
) -> Float[Tensor, "sink layer"]:
    return directions @ sink_directions(clean, range(len(clean.primary))).T


class _Test:
    """The rows of one sink: unedited, without its candidates, and without each control."""

    def __init__(
        self,
        index: int,
        sink: Sink,
        sinks: SinkMap,
        write: DirectWrite,
        heads: HeadWrite,
        *,
        run: bool,
    ):
        self.sink, self.index = sink, index
        self.ranking = rank(
            write.excess[index],
            write.attention_excess[index],
            write.excess_projection[index],
            sink.layers[-1],
        )
        self.phase = next((p for p in sinks.phases if p[0] <= sink.l_start < p[1]), None)
        self.candidates = self.ranking[:1]
        if self.ranking and self.ranking[0].block.kind == "attention":
            first = self.ranking[0]
            head = main_head(heads.excess[index, first.block.layer], first.length)
            if head is not None:
                named = head._replace(block=head.block._replace(layer=first.block.layer))
                self.candidates = [named, first]
        self.rows: list[Row] = []
        self.removed: list[BlockRemoved] = []
        self.lifetime, self.left = -1, float("nan")
        self._blocks = [one.block for one in self.candidates]
        if run and self.candidates and self.phase is not None:
            self._plan()

    def _plan(self) -> None:
        last = max(one.block.layer for one in self.ranking)
        self._blocks += [
            block
            for layer in range(self.sink.l_start + 1, last + 1)
            for block in (Block("attention", layer), Block("mlp", layer))
            if block not in self._blocks
        ]
        unedited = Intervention("mlp_out", self.sink.l_start, self.sink.position, Scale(1.0))
        self.rows = [(unedited,), *((_zeroed(b, self.sink.position),) for b in self._blocks)]

    def kept(self, clean: CleanRun) -> CleanRun:
        """The clean run with the sink direction kept after the sink's last layer.

        The primary may lose its length where the sink does, and no residual is aligned with it
        afterwards; whether the sink itself would have gone on must not hang on that.
        """
        last = self.sink.layers[-1]
        primary = clean.primary.clone()
        primary[last + 1 :] = clean.common[last + 1 :] + clean.primary[last] - clean.common[last]
        start, _ = cast(tuple[int, int], self.phase)
        phases = ((start, len(primary)),)
        return dataclasses.replace(
            clean,
            primary=primary,
            sinks=dataclasses.replace(clean.sink_map, phases=phases),
            # A pass that begins later would take what was measured against the primary before it.
            begin_by=last + 1,
        )

    def take(self, is_sink: Bool[Tensor, "row layer"], length: Float[Tensor, "row layer"]) -> None:
        """Read what became of the rows."""
        after = self.candidates[0].block.layer
        left = length[:, after] / length[0, self.sink.layers[-1]]
        lives = [leading_life(row, self.sink.l_start) for row in is_sink]
        self.lifetime, self.left = lives[0], float(left[0])
        n_candidates = len(self.candidates)
        self.removed = [
            BlockRemoved(
                sink=self.index,
                block=str(block),
                role="candidate" if number < n_candidates else "control",
                lifetime=lives[1 + number],
                left=float(left[1 + number]),
            )
            for number, block in enumerate(self._blocks)
        ]

    def verdict(self, write: DirectWrite, primary: DirectWrite) -> EraserVerdict:
        """What the tests say: of a main head if it passes them, else of the block."""
        last = self.sink.layers[-1]
        found = [
            judge(
                candidate,
                self.ranking[1:],
                whole=float(write.excess_projection[self.index, last]),
                primary_share=_primary_share(primary, self.index, candidate.block, last),
                removed=self.removed,
                lifetime=self.lifetime,
                left=self.left,
            )
            for candidate in self.candidates
        ]
        return next((one for one in found if one.eraser), found[-1] if found else no_eraser())


def _primary_share(primary: DirectWrite, index: int, block: Block, last: int) -> float:
    written = primary.excess if block.kind == "mlp" else primary.attention_excess
    return -float(written[index, block.layer] / primary.excess_projection[index, last])


def _zeroed(block: Block, position: int) -> Intervention:
    if block.kind == "head":
        return Intervention("z", block.layer, position, Zero(), head=block.head)
    site: EditSite = "mlp_out" if block.kind == "mlp" else "attn_out"
    return Intervention(site, block.layer, position, Zero())


def _groups(tests: Sequence[_Test]) -> list[list[_Test]]:
    """Those whose rows are measured against the same direction."""
    groups: dict[tuple[Any, int], list[_Test]] = defaultdict(list)
    for test in tests:
        groups[test.phase, test.sink.layers[-1]].append(test)
    return list(groups.values())


def _decomposed(
    test: _Test, layer: int, write: DirectWrite, primary: DirectWrite
) -> DecomposedSink:
    sink = test.sink
    return DecomposedSink(
        position=sink.position,
        token=sink.token,
        token_id=sink.token_id,
        kind=sink.kind,
        onset=sink.l_start,
        lifetime=sink.lifetime,
        last_layer=sink.layers[-1],
        direction_layer=layer,
        verdict=test.verdict(write, primary),
    )
