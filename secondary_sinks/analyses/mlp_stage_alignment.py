"""Where in the writer's MLP does a sink become like the primary sink?

If the MLP recognizes a feature that both tokens have, they are alike where it reads. If it turns
different features into the same vector, they are alike only where it writes. The cosine at each
stage says which, but only in comparison with ordinary tokens: at some stages all tokens are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.analyses.mlp_records import MlpRecord, counted_kinds, record_mlps
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Kind
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers

if TYPE_CHECKING:
    import pandas as pd

RESIDUAL_STAGES = ("input", "output", "written")
"""Stages that are vectors of the residual stream's space, the same in all layers; the coordinates
of the others are neurons of one layer."""


def mlp_stage_alignment(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    writers: int | Mapping[int, int] | None = None,
    n_controls: int = 16,
    seed: int = 0,
    fwd_hooks: Sequence[UserHook] = (),
) -> MlpStages:
    """Where in the MLP that wrote it does each sink become like the primary sink?

    For every stage `s` of the MLP of the writer's layer: the cosine of `s` at the sink's token with
    `s` at the primary's token, in the same layer of the same text (arXiv 2512.22213). In addition,
    for the stages that live in the residual stream's space: the cosine with the primary's input and
    output in the layer where the *primary* emerges. The same is computed for ordinary tokens
    nearby, because where all tokens share a component, all cosines are high.

    >>> stages = mlp_stage_alignment(model, sink_map)
    >>> stages.to_frame()
    >>> stages.plot()

    Not evidence for: that the MLP treats both tokens alike. In the writer's layer the primary is
    already massive, and its normalized input is little more than the sink direction; the MLP need
    not write a sink there at all. Nor is a low cosine of the inputs evidence of different features,
    since a shared one may be a small part of both.

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sinks: which tokens; see `SinkMap.select`.
        writers: the layer whose MLP is compared: one for all, or a mapping of positions to layers.
            None takes the largest write (`sinks.writers.resolve_writers`).
        n_controls: at most how many ordinary tokens each sink is compared with.
        seed: of their choice; recorded with the result.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Returns:
        `MlpStages`: cosines [sink, stage], with those of ordinary tokens.

    Raises:
        InputError: nothing selected, a layer out of range, or a sink map that does not belong to
            this model.
        ModelError: the stages of an MLP cannot be seen or do not follow from each other.
    """
    if n_controls < 1:
        raise InputError(f"n_controls is {n_controls}; it must be 1 or more")
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    chosen = sink_map.select(sinks)
    targets = [Target.of(sink_map, sink, n_controls=n_controls, seed=seed) for sink in chosen]
    resolved = resolve_writers(model, sink_map, chosen, writers, fwd_hooks=fwd_hooks)
    primary = sink_map.primary_position
    positions: dict[int, list[int]] = defaultdict(list)
    for target, layer in zip(targets, resolved.layers, strict=True):
        positions[layer] += [primary, target.sink.position, *target.matched]
        positions[target.phase.start].append(primary)
    records = record_mlps(model, sink_map, positions, fwd_hooks=fwd_hooks)
    # Layers of one model may differ: the stages are those of the MLP that has most.
    stages = max((records[layer].mlp.stages for layer in resolved.layers), key=len)
    compared = [
        _compare(records[layer], records[target.phase.start], target, primary, stages)
        for target, layer in zip(targets, resolved.layers, strict=True)
    ]
    width = max(1, *(len(target.matched) for target in targets))
    return MlpStages(
        sinks=tuple(
            SinkStages(
                position=target.sink.position,
                token=target.sink.token,
                kind=target.sink.kind,
                onset=target.sink.l_start,
                writer=layer,
                emergence=target.phase.start,
                n_matched=len(target.matched),
            )
            for target, layer in zip(targets, resolved.layers, strict=True)
        ),
        stages=stages,
        primary_position=primary,
        writer_rule=resolved.rule,
        provenance=sink_map.provenance.extended(seed=seed),
        **{
            name: torch.stack([_padded(values[name], width) for values in compared])
            for name in compared[0]
        },
    )


@dataclass(frozen=True)
class SinkStages:
    """One sink (or chosen token) whose stages were compared."""

    position: int
    token: str
    kind: Kind
    onset: int
    writer: int
    """Layer of the MLP."""
    emergence: int
    """Layer in which the primary sink emerges: the first of its phase."""
    n_matched: int
    """Number of ordinary tokens that it is compared with."""


@dataclass(frozen=True, eq=False)
class MlpStages(Result):
    """Cosines with the primary's stages; see `mlp_stage_alignment`."""

    sinks: tuple[SinkStages, ...]
    stages: tuple[str, ...]
    """In the order of computation: `input` (after the norm before the MLP), `gate` (before the
    activation function), `activation`, `up`, `product`, `output`, and `written` where a norm
    follows the MLP. An MLP without a gate has `pre` and `activation`; a mixture of experts shows
    only its input and output."""
    cosine: Float[Tensor, " sink stage"]
    """Cosine of the sink's stage with the primary's, in the MLP of the writer's layer."""
    ordinary: Float[Tensor, " sink stage matched"]
    """The same for ordinary tokens nearby; NaN where there are fewer."""
    norm: Float[Tensor, " sink stage"]
    """Norm of the sink's stage."""
    primary_norm: Float[Tensor, " sink stage"]
    ordinary_norm: Float[Tensor, " sink stage matched"]
    emergence_cosine: Float[Tensor, " sink stage"]
    """Cosine of the sink's stage in the writer's layer with the primary's in the layer where the
    primary emerges; NaN for stages whose coordinates are neurons."""
    emergence_ordinary: Float[Tensor, " sink stage matched"]
    """The same for ordinary tokens."""
    primary_position: int
    writer_rule: WriterRule
    provenance: Provenance

    def __repr__(self) -> str:
        median = self.cosine.nanmedian(dim=0).values
        cosines = ", ".join(
            f"{stage} {value:.2f}" for stage, value in zip(self.stages, median, strict=True)
        )
        tokens = counted_kinds([sink.kind for sink in self.sinks])
        return f"MlpStages({self.provenance.model.name!r}, {tokens}, median cosine: {cosines})"

    def ordinary_band(
        self, low: float = 0.1, high: float = 0.9, *, of: Literal["cosine", "norm"] = "cosine"
    ) -> tuple[Float[Tensor, " stage"], Float[Tensor, " stage"], Float[Tensor, " stage"]]:
        """Median and two quantiles over the ordinary tokens of all sinks together."""
        values = self.ordinary if of == "cosine" else self.ordinary_norm
        pooled = rearrange(values, "sink stage matched -> stage (sink matched)")
        median, lower, upper = torch.nanquantile(pooled, torch.tensor([0.5, low, high]), dim=1)
        return median, lower, upper

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink and stage; `ordinary_...` are over its matched tokens."""
        import pandas as pd

        levels = torch.tensor([0.5, 0.1, 0.9])
        ordinary = torch.nanquantile(self.ordinary, levels, dim=2)
        ordinary_norm = self.ordinary_norm.nanmedian(dim=2).values
        rows = [
            {
                "position": sink.position,
                "token": sink.token,
                "kind": sink.kind,
                "writer": sink.writer,
                "stage": stage,
                "cosine": float(self.cosine[index, number]),
                "ordinary_median": float(ordinary[0, index, number]),
                "ordinary_low": float(ordinary[1, index, number]),
                "ordinary_high": float(ordinary[2, index, number]),
                "norm": float(self.norm[index, number]),
                "primary_norm": float(self.primary_norm[index, number]),
                "ordinary_norm": float(ordinary_norm[index, number]),
                "emergence_cosine": float(self.emergence_cosine[index, number]),
            }
            for index, sink in enumerate(self.sinks)
            for number, stage in enumerate(self.stages)
        ]
        return pd.DataFrame(rows)


def _compare(
    record: MlpRecord, emergence: MlpRecord, target: Target, primary: int, stages: tuple[str, ...]
) -> dict[str, Tensor]:
    """One sink's tensors of `MlpStages`: [stage], or [stage, matched] for ordinary tokens."""
    sink, matched = record.at([target.sink.position]), record.at(target.matched)
    at_primary, emerging = record.at([primary]), emergence.at([primary])
    emerging = {stage: emerging[stage] for stage in RESIDUAL_STAGES}
    return {
        "cosine": stage_cosines(sink, at_primary, stages)[0],
        "ordinary": stage_cosines(matched, at_primary, stages).T,
        "norm": stage_norms(sink, stages)[0],
        "primary_norm": stage_norms(at_primary, stages)[0],
        "ordinary_norm": stage_norms(matched, stages).T,
        "emergence_cosine": stage_cosines(sink, emerging, stages)[0],
        "emergence_ordinary": stage_cosines(matched, emerging, stages).T,
    }


def _padded(values: Tensor, width: int) -> Tensor:
    """[stage, matched] with NaN up to `width`; [stage] as it is."""
    if values.ndim == 1:
        return values
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=torch.nan)


def stage_cosines(
    tokens: Mapping[str, Float[Tensor, " token _"]],
    other: Mapping[str, Float[Tensor, " 1 _"]],
    stages: Sequence[str],
) -> Float[Tensor, " token stage"]:
    """Cosine of every token's stage with another token's; NaN where either is missing or zero."""
    n = max((len(values) for values in tokens.values()), default=0)
    cosines = torch.full((n, len(stages)), torch.nan)
    for number, stage in enumerate(stages):
        if stage in tokens and stage in other:
            lengths = tokens[stage].norm(dim=-1) * other[stage].norm(dim=-1)
            products = (tokens[stage] * other[stage]).sum(dim=-1)
            cosines[:, number] = torch.where(lengths > 0, products / lengths, torch.nan)
    return cosines.clamp(-1, 1)


def stage_norms(
    tokens: Mapping[str, Float[Tensor, " token _"]], stages: Sequence[str]
) -> Float[Tensor, " token stage"]:
    """Norm of every token's stage; NaN where it is missing."""
    n = max((len(values) for values in tokens.values()), default=0)
    norms = torch.full((n, len(stages)), torch.nan)
    for number, stage in enumerate(stages):
        if stage in tokens:
            norms[:, number] = tokens[stage].norm(dim=-1)
    return norms
