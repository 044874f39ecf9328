"""What the MLPs of some layers read and wrote at some tokens of a text, with their stages.

One pass records inputs and outputs at those tokens. `host.mlp.run_mlp` computes the stages from the
recorded inputs, and its output must be the recorded one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.mlp import Mlp, mlp_of, run_mlp
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import counted
from secondary_sinks.sinks.sink_map import SinkMap


@dataclass(frozen=True)
class MlpRecord:
    """One layer's MLP at some tokens of a text."""

    mlp: Mlp
    positions: tuple[int, ...]
    stages: dict[str, Float[Tensor, " position _"]]
    """Every stage, and `written`: what is added to the residual."""
    recorded: Float[Tensor, " position d_model"]
    """What the pass over the text added to the residual: `stages["written"]` up to rounding."""
    part_names: tuple[str, ...]
    """Names of `parts`; empty where they were not recorded."""
    parts: Float[Tensor, " position part d_model"]
    """The summands of the residual that the MLP reads: the embedding, and the outputs of the
    attention blocks and MLPs before it."""

    def rows(self, positions: Sequence[int]) -> list[int]:
        """Indices of these positions in the record."""
        return [self.positions.index(position) for position in positions]

    def at(self, positions: Sequence[int]) -> dict[str, Float[Tensor, " position _"]]:
        """The stages at some of its positions."""
        rows = self.rows(positions)
        return {stage: values[rows] for stage, values in self.stages.items()}


def record_mlps(
    model: Model,
    sink_map: SinkMap,
    positions: Mapping[int, Sequence[int]],
    *,
    parts: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> dict[int, MlpRecord]:
    """Record the MLPs of some layers at some positions, in one pass.

    Args:
        model: any TransformerLens model.
        sink_map: the map of the text.
        positions: by layer.
        parts: record the summands of the residual as well.
        fwd_hooks: hooks in force in the pass.

    Raises:
        ModelError: an MLP run alone on its recorded inputs does not give what was recorded (a hook
            inside it does this), or cannot be run alone.
    """
    mlps = {layer: mlp_of(model, layer) for layer in positions}
    unique = {layer: tuple(dict.fromkeys(some)) for layer, some in positions.items()}
    collector = _Recorder(unique, parts=parts)
    tokens = sink_map.array("tokens")
    recorded = trace_tokens(model, tokens, [collector], fwd_hooks=fwd_hooks)["_Recorder"]
    records = {}
    for layer, mlp in mlps.items():
        stages = run_mlp(model, layer, recorded["mlp_in", layer])
        for stage, site in (("output", "mlp_raw"), ("written", "mlp_out")):
            _compare(model, layer, stages[stage], recorded[site, layer])
        names = _part_names(mlp) if parts else ()
        rows = [collector.all_positions.index(position) for position in unique[layer]]
        summands = [recorded["part", name][rows] for name in names]
        none = torch.zeros(len(rows), 0, stages["input"].shape[1])
        records[layer] = MlpRecord(
            mlp=mlp,
            positions=unique[layer],
            stages=stages,
            recorded=recorded["mlp_out", layer],
            part_names=names,
            parts=torch.stack(summands, dim=1) if summands else none,
        )
    return records


def counted_kinds(kinds: Sequence[str]) -> str:
    """How many tokens of each kind: "2 sinks, 1 chosen token and 8 ordinary tokens"."""
    others = {kind: kinds.count(kind) for kind in ("chosen", "ordinary")}
    counts = {"sink": len(kinds) - sum(others.values())}
    counts |= {f"{kind} token": n for kind, n in others.items()}
    named = [counted(n, noun) for noun, n in counts.items() if n]
    return " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)


def _part_names(mlp: Mlp) -> tuple[str, ...]:
    blocks = [f"{kind} {layer}" for layer in range(mlp.layer) for kind in ("attn", "mlp")]
    own_attention = [f"attn {mlp.layer}"] if mlp.reads == "resid_mid" else []
    return ("embedding", *blocks, *own_attention)


def _compare(model: Model, layer: int, alone: Tensor, recorded: Tensor) -> None:
    size = recorded.norm(dim=-1).clamp_min(1e-6)
    error = float(((alone - recorded).norm(dim=-1) / size).max())
    if not error <= 10 * tolerance(model):
        raise ModelError(
            f"the MLP of layer {layer} of {name_of(model)!r}, run alone on its inputs of "
            f"this text, gives other outputs than in the text (relative error {error:.1e}): a hook "
            "inside it does this; remove it (model.reset_hooks(), fwd_hooks=()) and detect the "
            "sinks again"
        )


class _Recorder(Collector):
    """Inputs and outputs of some MLPs at some tokens, and the summands of those tokens' residuals.

    Result: tensors [position, d_model] by ("mlp_in", layer), ("mlp_raw", layer), ("mlp_out",
    layer), at the positions of the layer, and by ("part", name), at all positions.
    """

    def __init__(self, positions: Mapping[int, Sequence[int]], *, parts: bool):
        self.sites = ("mlp_in", "mlp_raw", "mlp_out")
        if parts:
            self.sites = (*self.sites, "resid_pre", "attn_out")
        self._positions = {layer: list(some) for layer, some in positions.items()}
        self._parts = parts
        self.all_positions = sorted({p for some in positions.values() for p in some})

    def start(self, run: Run) -> None:
        self._recorded: dict[tuple[str, int | str], Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        if layer is None:
            return
        if layer in self._positions and site in ("mlp_in", "mlp_raw", "mlp_out"):
            self._recorded[site, layer] = activation[self._positions[layer]].float().cpu()
        name = {"resid_pre": "embedding", "attn_out": f"attn {layer}", "mlp_out": f"mlp {layer}"}
        is_part = site in name and (layer == 0 or site != "resid_pre")
        if self._parts and is_part and layer <= max(self._positions):
            self._recorded["part", name[site]] = activation[self.all_positions].float().cpu()

    def result(self) -> dict[tuple[str, int | str], Tensor]:
        return self._recorded
