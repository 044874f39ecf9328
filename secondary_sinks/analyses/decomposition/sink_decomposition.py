"""What is written along a sink's direction, by MLP and by head, and which block ends the sink?

The residual stream is a sum: the embedding, every MLP, and every attention block, which is itself a
sum over heads and a bias. So is its projection on one direction, exactly. The parts before a sink's
onset show what made it (`attribute_to_mlps` tests that), those after it what keeps it, and the
negative ones after its last layer what *ends* it (`analyses.decomposition.erasers` tests that).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.analyses.decomposition.eraser_rows import Suspects, ablate
from secondary_sinks.analyses.decomposition.erasers import BlockAblation, EraserVerdict
from secondary_sinks.errors import InputError
from secondary_sinks.host.attention_weights import OutputWeights, check_head_sum, output_weights
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import need_attention_everywhere
from secondary_sinks.intervene.engine import Method
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.direct_writes import (
    DirectWrite,
    Projections,
    checked_write,
    sink_directions,
)
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Kind, Sink
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap

if TYPE_CHECKING:
    import pandas as pd


def sink_decomposition(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    direction: Literal["onset", "last"] | int = "onset",
    verify: bool = True,
    method: Method = "auto",
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> SinkDecomposition:
    """What is each sink's residual along the sink direction made of, and which block ends the sink?

    The direction is `(r - c) / |r - c|`, with `r` the primary's residual and `c` the common
    component after one layer; it is the same for all parts of a sink, because only then do they
    add up. A part is the dot product of that direction with what the embedding, an MLP, an
    attention head (its `z` through its slice of W_O) or an attention's output bias adds to the
    token, in units of the residual stream. Where a norm follows the attention, heads and bias are
    multiplied by what the norm multiplied their sum with in this run. Checked: that the parts up to
    a layer add up to the residual's projection, and heads to the attention's.

    The *eraser* of a sink is the block after its last layer that erases most along the direction,
    beyond what ordinary tokens lose, if the token is a sink for longer when that block's output
    there is zeroed (`analyses.decomposition.erasers`). The controls are all other MLPs and
    attention blocks from the onset to the layer after which little of the sink is left. Where the
    tests disagree, where the sink lives to the last layer, and for a token that is not a sink,
    `eraser` is None and `reason` says why.

    >>> parts = sink_decomposition(model, sink_map)
    >>> parts.to_frame()[["position", "eraser", "share", "reason"]]
    >>> parts.plot()

    Not evidence for: what a large part causes later (it is a write); or that an eraser is there to
    end sinks (it ends this one, at this token).

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sinks: which sinks, or positions, of the map (`SinkMap.select`).
        direction: after which layer the primary's direction is taken: that of the sink's onset, the
            sink's last, or any. `rotation` of the result says how much they differ.
        verify: test candidates and controls by zeroing them; without it there is no eraser.
        method: engine of these rows; see `counterfactuals`.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Returns:
        `SinkDecomposition`: parts as [sink, layer] and [sink, layer, head], and a verdict on each
        sink.

    Raises:
        InputError: nothing is selected, a direction that is not a layer, or a sink map that does
            not belong to this model.
        ModelError: the parts do not add up in this model, or it cannot be measured.
    """
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    need_attention_everywhere(model, "sink_decomposition")
    chosen = sink_map.select(sinks)
    layers = [_direction_layer(direction, sink, int(sink_map.n_layers or 0)) for sink in chosen]
    directions = sink_directions(sink_map, layers)
    write, primary_write, head_write = _writes(model, sink_map, chosen, directions, fwd_hooks)
    suspects = [
        Suspects.of(index, sink, write, head_write.excess[index])
        for index, sink in enumerate(chosen)
    ]
    ablations, engine = ablate(
        model,
        sink_map,
        suspects if verify else [],
        method=method,
        progress=progress,
        fwd_hooks=fwd_hooks,
    )
    return SinkDecomposition(
        sinks=tuple(
            DecomposedSink(
                position=sink.position,
                token=sink.token,
                token_id=sink.token_id,
                kind=sink.kind,
                onset=sink.l_start,
                lifetime=sink.lifetime,
                last_layer=sink.layers[-1],
                direction_layer=layer,
                verdict=suspected.verdict(write, primary_write, ablations.get(suspected.index, [])),
            )
            for sink, layer, suspected in zip(chosen, layers, suspects, strict=True)
        ),
        direction=str(direction),
        write=write,
        head_write=head_write,
        primary_write=primary_write,
        primary_position=sink_map.primary_position,
        rotation=directions @ sink_directions(sink_map, range(write.mlp.shape[1])).T,
        ablations=tuple(row for index in sorted(ablations) for row in ablations[index]),
        provenance=sink_map.provenance.extended(engine=engine),
    )


@dataclass(frozen=True)
class HeadWrite:
    """What each attention head contributes to a token's residual along the sink direction.

    `heads.sum(-1) + bias` is the attention's write. Where a norm follows the attention, its scale
    at the token is that of the clean run, so the parts are exact and add up, but say nothing of
    what the norm would do without one of them.
    """

    heads: Float[Tensor, " sink layer head"]
    bias: Float[Tensor, " sink layer"]
    """Of the attention's output bias, which is the same for all tokens but for such a norm."""
    ordinary_heads: Float[Tensor, " sink layer head"]
    """Mean over ordinary tokens along the same direction."""
    error: float
    """Largest deviation of a token's attention output from the sum of its heads, over its norm."""

    @property
    def excess(self) -> Float[Tensor, " sink layer head"]:
        """What each head writes beyond what ordinary tokens get."""
        return self.heads - self.ordinary_heads


@dataclass(frozen=True)
class DecomposedSink:
    """One sink, and the block that ended it."""

    position: int
    token: str
    token_id: int
    kind: Kind
    onset: int
    lifetime: int
    """Of a token that is not a sink: the number of layers that it is measured over."""
    last_layer: int
    direction_layer: int
    """The layer after which the primary's direction was taken."""
    verdict: EraserVerdict

    @property
    def eraser(self) -> str | None:
        """The block that ended the sink; None where the tests disagree or nothing did."""
        return self.verdict.eraser


@dataclass(frozen=True)
class SinkDecomposition(Result):
    """Everything written along each sink's direction, by block and head; see
    `sink_decomposition`."""

    sinks: tuple[DecomposedSink, ...]
    direction: str
    """Which direction: "onset", "last" or a layer's number."""
    write: DirectWrite
    """Of the embedding, every MLP and every attention block, at the sink's token."""
    head_write: HeadWrite
    """Of every attention head there."""
    primary_write: DirectWrite
    """The same as `write` at the *primary's* token, along the same direction."""
    primary_position: int
    rotation: Float[Tensor, " sink layer"]
    """Cosine of the direction with the sink direction after each layer. Where it is far from 1, a
    write along the one says little about the other."""
    ablations: tuple[BlockAblation, ...]
    """What became of each sink as it is, without its candidate, and without each control."""
    provenance: Provenance
    """With the engine that ran the rows; None if there were none."""

    @property
    def n_layers(self) -> int:
        """Depth of the model."""
        return self.head_write.heads.shape[1]

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return self.head_write.heads.shape[2]

    def __repr__(self) -> str:
        erasers = Counter(sink.eraser for sink in self.sinks if sink.kind != "chosen")
        n_chosen = len(self.sinks) - erasers.total()
        named = [
            f"eraser of {counted(count, 'sink')}: {name or 'none'}"
            for name, count in sorted(erasers.items(), key=lambda item: (-item[1], str(item[0])))
        ]
        named += [counted(n_chosen, "other token")] if n_chosen else []
        return f"SinkDecomposition({self.provenance.model.name!r}, {'; '.join(named)})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: which block ended it, and how the tests came out."""
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            verdict = sink.verdict
            rows.append(
                {
                    "position": sink.position,
                    "token": sink.token,
                    "kind": sink.kind,
                    "onset": sink.onset,
                    "last_layer": sink.last_layer,
                    "eraser": verdict.eraser,
                    "co_erasers": verdict.co_erasers,
                    "candidate": verdict.candidate,
                    "share": verdict.share,
                    "runner_up": verdict.runner_up,
                    "runner_up_share": verdict.runner_up_share,
                    "primary_share": verdict.primary_share,
                    "length": float(self.write.excess_projection[index, sink.last_layer]),
                    "lifetime": sink.lifetime,
                    "lifetime_without": verdict.lifetime_without,
                    "left": verdict.left,
                    "left_without": verdict.left_without,
                    "percentile": verdict.percentile,
                    "reason": verdict.reason,
                }
            )
        return pd.DataFrame(rows)

    def parts_frame(self) -> pd.DataFrame:
        """One row for each part of each sink: embedding, MLPs, heads, and the attentions' biases.

        The parts of a sink up to a layer add up to the residual's projection after it. `excess` is
        what goes beyond ordinary tokens (NaN for embedding and bias).
        """
        import pandas as pd

        write, heads = self.write, self.head_write
        rows: list[tuple[Any, ...]] = []
        for index, sink in enumerate(self.sinks):
            along = float(write.embedding[index])
            rows.append((sink.position, "embedding", -1, -1, along, math.nan))
            per_layer = (write.mlp, write.excess, heads.bias, heads.heads, heads.excess)
            for layer, (mlp, mlp_excess, bias, along_heads, excess_heads) in enumerate(
                zip(*(values[index].tolist() for values in per_layer), strict=True)
            ):
                rows.append((sink.position, "mlp", layer, -1, mlp, mlp_excess))
                rows.append((sink.position, "attention bias", layer, -1, bias, math.nan))
                rows += [
                    (sink.position, "head", layer, head, *values)
                    for head, values in enumerate(zip(along_heads, excess_heads, strict=True))
                ]
        return pd.DataFrame(rows, columns=["position", "part", "layer", "head", "along", "excess"])

    def ablations_frame(self) -> pd.DataFrame:
        """For each sink one row without an edit, and one for each block that was zeroed."""
        import pandas as pd

        return pd.DataFrame(self.ablations, columns=BlockAblation._fields)

    def shares(
        self, written: Float[Tensor, " sink layer *head"]
    ) -> Float[Tensor, " sink layer *head"]:
        """Writes over the length of each sink after its last layer, beyond ordinary tokens; NaN for
        a token that is not a sink, of whose length next to nothing may be there."""
        last = [sink.last_layer for sink in self.sinks]
        chosen = torch.tensor([sink.kind == "chosen" for sink in self.sinks])
        whole = self.write.excess_projection[torch.arange(len(last)), last]
        return written / whole.masked_fill(chosen, math.nan).reshape(-1, *[1] * (written.ndim - 1))


def _direction_layer(direction: str | int, sink: Sink, n_layers: int) -> int:
    if direction in ("onset", "last"):
        return sink.l_start if direction == "onset" else sink.layers[-1]
    if not isinstance(direction, int) or not 0 <= direction < n_layers:
        raise InputError(
            f"direction={direction!r}; use 'onset', 'last' or a layer from 0 to {n_layers - 1}"
        )
    return direction


def _writes(
    model: Model,
    sink_map: SinkMap,
    chosen: Sequence[Sink],
    directions: Float[Tensor, " sink d_model"],
    fwd_hooks: Sequence[UserHook],
) -> tuple[DirectWrite, DirectWrite, HeadWrite]:
    """What everything writes at the sinks' tokens, what blocks write at the primary's along the
    same directions, and what heads write at the sinks'."""
    positions = [sink.position for sink in chosen]
    ordinary = ordinary_tokens(sink_map)
    at_primary = Projections([sink_map.primary_position] * len(chosen), directions, ordinary)
    at_primary.name = "primary"
    collectors: list[Collector] = [
        Projections(positions, directions, ordinary),
        at_primary,
        _Heads(positions, directions, ordinary, lambda layer: output_weights(model, layer)),
    ]
    writes = trace_tokens(model, sink_map.array("tokens"), collectors, fwd_hooks=fwd_hooks)
    heads, dtype = writes["_Heads"]
    check_head_sum(model, heads.error, dtype)
    return (
        checked_write(model, writes["Projections"]),
        checked_write(model, writes["primary"]),
        heads,
    )


class _Heads(Collector):
    """Projections of what every attention head adds to a few tokens, and to ordinary ones."""

    sites = ("z", "attn_out")

    def __init__(
        self,
        positions: Sequence[int],
        directions: Float[Tensor, " sink d_model"],
        ordinary: Bool[Tensor, " token"],
        weights: Callable[[int], OutputWeights],
    ):
        self._weights = weights
        self._positions = list(positions)
        self._directions = directions
        self._ordinary = ordinary

    def start(self, run: Run) -> None:
        shape = (len(self._positions), run.n_layers)
        self._at_sinks = torch.zeros(*shape, run.n_heads)
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
        mean = scaled[self._ordinary.to(z.device)].mean(dim=0)
        at_sinks = einsum(scaled[self._positions], read, "sink head d, sink head d -> sink head")
        self._at_sinks[:, layer] = at_sinks.cpu()
        self._mean[:, layer] = einsum(mean, read, "head d, sink head d -> sink head").cpu()
        self._bias[:, layer] = (scale[self._positions] * bias).cpu()

    def result(self) -> tuple[HeadWrite, torch.dtype]:
        return HeadWrite(self._at_sinks, self._bias, self._mean, self._error), self._dtype
