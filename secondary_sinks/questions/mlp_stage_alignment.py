"""Where in the writer's MLP does a sink become like the primary sink?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.explain.mlp_stages import (
    RESIDUAL_STAGES,
    MlpStages,
    SinkStages,
    stage_cosines,
    stage_norms,
)
from secondary_sinks.explain.sinks import Sink, SinkMap
from secondary_sinks.models.host import UserHook
from secondary_sinks.models.text import Text
from secondary_sinks.questions.attribution_rows import Target
from secondary_sinks.questions.direct_writes import direct_writes
from secondary_sinks.questions.given import chosen_sinks, sink_map_of
from secondary_sinks.questions.mlp_records import MlpRecord, record_mlps
from secondary_sinks.questions.writers import candidates, given_writers


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
