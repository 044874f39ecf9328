"""Where in the writer's MLP does a sink become like the primary sink?

If the MLP recognized something that both have, they would be alike where it reads; if it turns
different things into one, they are alike only where it writes. The cosine of each stage says which,
and only against ordinary tokens: in some stages all tokens are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.analyses.mlp_records import MlpRecord, record_mlps
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.result import Result
from secondary_sinks.sinks.direct_writes import direct_writes
from secondary_sinks.sinks.selection import chosen_sinks, sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import candidates, given_writers

if TYPE_CHECKING:
    import pandas as pd

RESIDUAL_STAGES = ("input", "output", "written")

"""Stages that are vectors of the residual stream's space, the same for all layers; the coordinates
of the others are neurons, of one layer each."""


def mlp_stage_alignment(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    which: Literal["secondary"] | Sequence[Sink] = "secondary",
    writers: int | Mapping[int, int] | None = None,
    n_controls: int = 16,
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> MlpStages:
    """Compare each sink with the primary sink, stage by stage, in the MLP that wrote the sink.

    For every stage `s` of the MLP of the writer's layer: the cosine of `s` at the sink's token with
    `s` at the primary's token, in the same layer of the same text (arXiv 2512.22213). Beyond that,
    for the stages that live in the residual stream's space: the cosine with the primary's input and
    output in the layer where the *primary* emerges. The same is given for ordinary tokens nearby,
    without which no cosine means anything: where all tokens share a component, all are alike.

    What it is not evidence for: that the MLP treats both tokens alike. In the writer's layer the
    primary is massive already, and its normalized input is hardly more than the sink direction;
    the MLP need not write a sink there at all. Nor is a low cosine of the inputs evidence of
    different features, since a shared one may be a small part of both.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        which: "secondary" for all secondary sinks, or some sinks of the map.
        writers: the layer whose MLP is looked into: one for all, or a mapping of positions to
            layers. None takes the layer up to the onset whose MLP writes the largest part along the
            sink direction beyond ordinary tokens, which is the candidate of `attribute_to_mlps`
            without its tests.
        n_controls: how many ordinary tokens each sink is compared with at most.
        seed: of their choice; recorded with the result.
        chat: the string goes through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Returns:
        `MlpStages`: cosines [sink, stage], with those of ordinary tokens.

    Raises:
        InputError: no secondary sinks in the text, sinks that are not in the map, a layer out of
            range, a sink map of another model, text or criterion, or several texts.
        ModelError: the stages of an MLP cannot be seen or do not follow from one another.
    """
    if n_controls < 1:
        raise InputError(f"n_controls is {n_controls}; it must be 1 or more")
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    chosen = chosen_sinks(found, which)
    targets = [Target.of(found, sink, n_controls=n_controls, seed=seed) for sink in chosen]
    if writers is None:
        layers = candidates(direct_writes(model, found, chosen, fwd_hooks=fwd_hooks), chosen)
    else:
        layers = given_writers(writers, chosen, int(found.model["n_layers"]))
    primary = found.primary_position
    wanted: dict[int, list[int]] = defaultdict(list)
    for target, layer in zip(targets, layers, strict=True):
        wanted[layer] += [primary, target.sink.position, *target.matched]
        wanted[target.phase.start].append(primary)
    records = record_mlps(model, found, wanted, fwd_hooks=fwd_hooks)
    stages = _all_stages([records[layer] for layer in layers])
    lines = [
        _compare(records[layer], records[target.phase.start], target, primary, stages)
        for target, layer in zip(targets, layers, strict=True)
    ]
    most = max(len(target.matched) for target in targets)
    columns = [torch.stack([_padded(one, most) for one in c]) for c in zip(*lines, strict=True)]
    return MlpStages(
        sinks=tuple(
            SinkStages(
                position=target.sink.position,
                token=target.sink.token,
                onset=target.sink.l_start,
                writer=layer,
                emergence=target.phase.start,
                n_matched=len(target.matched),
            )
            for target, layer in zip(targets, layers, strict=True)
        ),
        stages=stages,
        cosine=columns[0],
        ordinary=columns[1],
        norm=columns[2],
        primary_norm=columns[3],
        ordinary_norm=columns[4],
        emergence_cosine=columns[5],
        emergence_ordinary=columns[6],
        primary_position=primary,
        seed=seed,
        model=found.model,
    )


def _all_stages(records: Sequence[MlpRecord]) -> tuple[str, ...]:
    """The stages of the MLP that has most (layers of one model may differ)."""
    return max((record.mlp.stages for record in records), key=len)


def _compare(
    record: MlpRecord, emergence: MlpRecord, target: Target, primary: int, stages: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """One sink's cosines and norms: [stage], or [stage, matched] for ordinary tokens."""
    own, near = record.at([target.sink.position]), record.at(target.matched)
    reference = record.at([primary])
    born = {stage: emergence.at([primary])[stage] for stage in RESIDUAL_STAGES}
    return (
        stage_cosines(own, reference, stages)[0],
        stage_cosines(near, reference, stages).T,
        stage_norms(own, stages)[0],
        stage_norms(reference, stages)[0],
        stage_norms(near, stages).T,
        stage_cosines(own, born, stages)[0],
        stage_cosines(near, born, stages).T,
    )


def _padded(values: Tensor, width: int) -> Tensor:
    if values.ndim == 1:
        return values
    missing = width - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing), value=torch.nan)


@dataclass(frozen=True)
class SinkStages:
    """One sink whose stages were compared."""

    position: int
    token: str
    onset: int
    writer: int
    """Layer of the MLP that was looked into."""
    emergence: int
    """Layer in which the primary sink itself emerges: the first of its phase."""
    n_matched: int
    """Number of ordinary tokens that it is compared with."""


@dataclass(frozen=True, eq=False)
class MlpStages(Result):
    """Cosines with the primary's stages; see `mlp_stage_alignment`."""

    sinks: tuple[SinkStages, ...]
    stages: tuple[str, ...]
    """Stages in the order of computation: `input` (after the norm before the MLP), `gate` (before
    the activation function), `activation`, `up`, `product`, `output`, and `written` where a norm
    follows the MLP. An MLP without a gate has `pre` and `activation`; a mixture of experts shows
    its input and output alone."""
    cosine: Float[Tensor, "sink stage"]
    """Cosine of the sink's stage with the primary's, in the MLP of the writer's layer."""
    ordinary: Float[Tensor, "sink stage matched"]
    """The same of ordinary tokens nearby; NaN where there are fewer."""
    norm: Float[Tensor, "sink stage"]
    """Norm of the sink's stage."""
    primary_norm: Float[Tensor, "sink stage"]
    ordinary_norm: Float[Tensor, "sink stage matched"]
    emergence_cosine: Float[Tensor, "sink stage"]
    """Cosine of the sink's stage in the writer's layer with the primary's in the layer where the
    primary emerges; NaN for stages whose coordinates are neurons."""
    emergence_ordinary: Float[Tensor, "sink stage matched"]
    """The same of ordinary tokens."""
    primary_position: int
    seed: int
    model: dict[str, Any]

    def __repr__(self) -> str:
        median = self.cosine.nanmedian(dim=0).values
        shown = ", ".join(
            f"{stage} {value:.2f}" for stage, value in zip(self.stages, median, strict=True)
        )
        name, n = self.model.get("name", "?"), len(self.sinks)
        return f"MlpStages({name!r}, {n} sink{'' if n == 1 else 's'}, median cosine: {shown})"

    def ordinary_band(
        self, low: float = 0.1, high: float = 0.9
    ) -> tuple[Float[Tensor, "stage"], Float[Tensor, "stage"], Float[Tensor, "stage"]]:
        """Median and two quantiles of the ordinary tokens of all sinks together."""
        pooled = self.ordinary.permute(1, 0, 2).flatten(1)
        found = torch.nanquantile(pooled, torch.tensor([0.5, low, high]), dim=1)
        return found[0], found[1], found[2]

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink and stage; `ordinary_...` are over its matched tokens."""
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            for number, stage in enumerate(self.stages):
                near = self.ordinary[index, number]
                band = torch.nanquantile(near, torch.tensor([0.5, 0.1, 0.9])).tolist()
                rows.append(
                    {
                        "position": sink.position,
                        "token": sink.token,
                        "writer": sink.writer,
                        "stage": stage,
                        "cosine": float(self.cosine[index, number]),
                        "ordinary_median": band[0],
                        "ordinary_low": band[1],
                        "ordinary_high": band[2],
                        "norm": float(self.norm[index, number]),
                        "primary_norm": float(self.primary_norm[index, number]),
                        "ordinary_norm": float(self.ordinary_norm[index, number].nanmedian()),
                        "emergence_cosine": float(self.emergence_cosine[index, number]),
                    }
                )
        return pd.DataFrame(rows)


def stage_cosines(
    tokens: Mapping[str, Float[Tensor, "token _"]],
    reference: Mapping[str, Float[Tensor, "1 _"]],
    stages: Sequence[str],
) -> Float[Tensor, "token stage"]:
    """Cosine of every token's stage with the reference's; NaN where either is missing or zero."""
    n = max((len(values) for values in tokens.values()), default=0)
    found = torch.full((n, len(stages)), torch.nan)
    for number, stage in enumerate(stages):
        if stage in tokens and stage in reference:
            one, other = tokens[stage], reference[stage]
            lengths = one.norm(dim=-1) * other.norm(dim=-1)
            found[:, number] = torch.where(lengths > 0, (one * other).sum(-1) / lengths, torch.nan)
    return found.clamp(-1, 1)


def stage_norms(
    tokens: Mapping[str, Float[Tensor, "token _"]], stages: Sequence[str]
) -> Float[Tensor, "token stage"]:
    """Norm of every token's stage; NaN where it is missing."""
    n = max((len(values) for values in tokens.values()), default=0)
    found = torch.full((n, len(stages)), torch.nan)
    for number, stage in enumerate(stages):
        if stage in tokens:
            found[:, number] = tokens[stage].norm(dim=-1)
    return found
