"""What the MLPs of some layers read and wrote at some tokens of a text, with their stages.

One pass records inputs and outputs at those tokens; the stages come out of `host.mlp.run_mlp` on
the recorded inputs, and its output must be the recorded one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.mlp import Mlp, mlp_of, run_mlp
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.sinks.sink_map import SinkMap


@dataclass(frozen=True)
class MlpRecord:
    """One layer's MLP at some tokens."""

    mlp: Mlp
    positions: tuple[int, ...]
    stages: dict[str, Float[Tensor, "position _"]]
    """Every stage, and `written`: what was added to the residual."""
    part_names: tuple[str, ...]
    """Names of `parts`; empty where they were not asked for."""
    parts: Float[Tensor, "position part d_model"]
    """What the residual that the MLP reads is the sum of: the embedding, and the outputs of the
    attention blocks and MLPs before it."""

    def rows(self, positions: Sequence[int]) -> list[int]:
        """Where these positions stand in the record."""
        return [self.positions.index(position) for position in positions]

    def at(self, positions: Sequence[int]) -> dict[str, Float[Tensor, "position _"]]:
        """The stages of some of its tokens."""
        rows = self.rows(positions)
        return {stage: values[rows] for stage, values in self.stages.items()}


def record_mlps(
    model: Any,
    sinks: SinkMap,
    wanted: Mapping[int, Sequence[int]],
    *,
    parts: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> dict[int, MlpRecord]:
    """Record the MLP of each wanted layer at its positions, in one pass.

    Args:
        model: any TransformerLens model.
        sinks: the text's sink map.
        wanted: positions by layer.
        parts: record the parts of the residual as well.
        fwd_hooks: hooks in force in the pass.

    Raises:
        ModelError: an MLP run alone on its recorded inputs does not give what was recorded (a hook
            inside it does this), or cannot be run alone.
    """
    mlps = {layer: mlp_of(model, layer) for layer in wanted}
    positions = {layer: tuple(dict.fromkeys(some)) for layer, some in wanted.items()}
    collector = _Recorder(positions, parts=parts)
    tokens = cast(Tensor, sinks.tokens)
    found = cast(Trace, trace(model, tokens, [collector], fwd_hooks=fwd_hooks))["_Recorder"]
    records = {}
    for layer, mlp in mlps.items():
        stages = run_mlp(model, layer, found["mlp_in", layer])
        for stage, site in (("output", "mlp_raw"), ("written", "mlp_out")):
            _compare(model, layer, stages[stage], found[site, layer])
        stages["written"] = found["mlp_out", layer]
        names = _part_names(mlp) if parts else ()
        sources = [found["part", name][_index(collector, positions[layer])] for name in names]
        own = (len(positions[layer]), 0, stages["input"].shape[1])
        records[layer] = MlpRecord(
            mlp=mlp,
            positions=positions[layer],
            stages=stages,
            part_names=names,
            parts=torch.stack(sources, dim=1) if sources else torch.zeros(own),
        )
    return records


def _part_names(mlp: Mlp) -> tuple[str, ...]:
    names = ["embedding"]
    for layer in range(mlp.layer):
        names += [f"attn {layer}", f"mlp {layer}"]
    return (*names, f"attn {mlp.layer}") if mlp.reads == "resid_mid" else tuple(names)


def _index(collector: _Recorder, positions: Sequence[int]) -> list[int]:
    return [collector.all_positions.index(position) for position in positions]


def _compare(model: Any, layer: int, own: Tensor, recorded: Tensor) -> None:
    size = recorded.norm(dim=-1).clamp_min(1e-6)
    error = float(((own - recorded).norm(dim=-1) / size).max())
    if not error <= 10 * tolerance(model):
        raise ModelError(
            f"the MLP of layer {layer} of {describe(model).name!r}, run alone on what it read in "
            f"this text, gives something else than it did there (relative error {error:.1e}); a "
            "hook inside it does this: remove it (model.reset_hooks(), fwd_hooks=())"
        )


class _Recorder(Collector):
    """Inputs and outputs of some MLPs at some tokens, and the parts of those tokens' residuals."""

    def __init__(self, positions: Mapping[int, Sequence[int]], *, parts: bool):
        self.sites = ("mlp_in", "mlp_raw", "mlp_out")
        if parts:
            self.sites = (*self.sites, "resid_pre", "attn_out")
        self._positions = {layer: list(some) for layer, some in positions.items()}
        self._parts = parts
        self.all_positions = sorted({p for some in positions.values() for p in some})

    def start(self, run: Run) -> None:
        self._found: dict[tuple[str, int | str], Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        if layer is None:
            return
        if layer in self._positions and site in ("mlp_in", "mlp_raw", "mlp_out"):
            self._found[site, layer] = activation[self._positions[layer]].float().cpu()
        name = {"resid_pre": "embedding", "attn_out": f"attn {layer}", "mlp_out": f"mlp {layer}"}
        is_part = site in name and (layer == 0 or site != "resid_pre")
        if self._parts and is_part and layer <= max(self._positions):
            self._found["part", name[site]] = activation[self.all_positions].float().cpu()

    def result(self) -> dict[tuple[str, int | str], Tensor]:
        return self._found
