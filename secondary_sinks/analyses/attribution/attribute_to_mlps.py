"""Which MLP made each sink: is it necessary, is it sufficient, does it write the vector itself?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from secondary_sinks.analyses.attribution.attribution_result import (
    Ablation,
    DirectWrite,
    MlpAttribution,
    SinkAttribution,
    Transplant,
)
from secondary_sinks.analyses.attribution.attribution_rows import ControlPlan, Sweep, Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.counterfactuals import counterfactuals
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.mean_activations import MeanActivations
from secondary_sinks.sinks.direct_writes import direct_writes
from secondary_sinks.sinks.selection import chosen_sinks, sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import MAX_LEFT, Control, candidates, compare, judge


def attribute_to_mlps(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    which: Literal["secondary"] | Sequence[Sink] = "secondary",
    attention: bool = True,
    reference: MeanActivations | None = None,
    n_controls: int = 8,
    seed: int = 0,
    method: Method = "auto",
    chat: bool = False,
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> MlpAttribution:
    """Find the MLP that wrote each sink, and the earlier layers that it needs.

    For every sink and every layer: *necessity* (that MLP's output at the token zeroed, and set to
    the mean of ordinary tokens; the same for attention blocks), *sufficiency* (that MLP's output at
    the token in the place of the same MLP's output at ordinary tokens nearby), and *direct write*
    (what each block adds along the sink direction `(r - c) / |r - c|`, with `r` the primary's
    residual and `c` the common component after the sink's onset layer; it is checked that the parts
    add up). The writer is the layer up to the onset that writes the largest part, if it is also
    necessary and sufficient; feeders are earlier layers that are necessary and write little. The
    rule, with its thresholds, is `sinks.writers.judge`. A sink whose tests disagree has
    `writer=None` and a `reason`.

    Controls are part of the result: what zeroing the same layer does to matched ordinary tokens and
    to the same token id where it is no sink; what random other layers do; and what becomes of the
    matched tokens when they get, in the place of the writer's output, random directions of its
    norm, or the same layer's output of such other tokens.

    What it is not evidence for: that the sink matters for the output of the model (nothing here
    looks at later tokens), or that a feeder acts through the writer's input alone. A zeroed layer 0
    leaves a token that the model never sees, so its necessity says little.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        which: "secondary" for all secondary sinks, or some sinks of the map.
        attention: sweep the attention blocks as well.
        reference: means of a reference corpus at `mlp_out` (and at `attn_out` with `attention`) for
            the mean ablations; None takes the mean over the ordinary tokens of the same text.
        n_controls: how many matched tokens are transplanted into, and how many controls of each
            kind there are at most; a short text has fewer.
        seed: of every random choice; recorded with the result.
        method: engine of the rows; see `counterfactuals`.
        chat: the string goes through the chat template.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: hooks of your own, in force in every pass.

    Returns:
        `MlpAttribution`: a record for each sink, every effect as [sink, layer].

    Raises:
        InputError: no secondary sinks in the text, sinks that are not in the map, a sink map of
            another model, text or criterion, or several texts.
        ModelError: the parts of a residual do not add up in this model, or it cannot be measured.
    """
    if n_controls < 1:
        raise InputError(f"n_controls is {n_controls}; it must be 1 or more")
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    targets = [
        Target.of(found, sink, n_controls=n_controls, seed=seed)
        for sink in chosen_sinks(found, which)
    ]
    n_layers = int(found.model["n_layers"])
    run = partial(
        counterfactuals, model, found, method=method, progress=progress, fwd_hooks=fwd_hooks
    )
    sweep = Sweep(targets, n_layers, attention=attention, reference=reference)
    rows = run(sweep.interventions)
    writes = direct_writes(model, found, [target.sink for target in targets], fwd_hooks=fwd_hooks)
    layers = candidates(writes, [target.sink for target in targets])
    plan = ControlPlan(targets, layers, seed)
    others = run(plan.interventions) if plan.interventions else None
    ablations = {
        name: sweep.ablation(rows, name)
        for name in ("mlp_zero", "mlp_mean", "attention_zero", "attention_mean")
    }
    transplant = sweep.transplant(rows)
    controls: list[Control] = []
    records: list[SinkAttribution] = []
    for index, target in enumerate(targets):
        own = [
            *sweep.controls(rows, index, layers[index], n_controls, seed),
            *plan.controls(others, index),
        ]
        controls += own
        records.append(_record(index, target, ablations, transplant, writes, own, seed))
    return MlpAttribution(
        sinks=tuple(records),
        n_layers=n_layers,
        transplant=transplant,
        direct_write=writes,
        controls=tuple(controls),
        seed=seed,
        engine=rows.engine,
        model=found.model,
        primary_position=found.primary_position,
        **ablations,  # type: ignore[arg-type]
    )


def _record(
    index: int,
    target: Target,
    ablations: Mapping[str, Ablation | None],
    transplant: Transplant,
    writes: DirectWrite,
    controls: Sequence[Control],
    seed: int,
) -> SinkAttribution:
    sink = target.sink
    without = ablations["mlp_zero"]
    if without is None:
        raise InputError("the MLPs were not swept")
    verdict = judge(
        writes.excess[index],
        float(writes.excess_projection[index, sink.l_start]),
        without.lifetime[index],
        without.length[index] / target.clean_length(),
        transplant.share[index],
        sink.l_start,
    )
    attention = ablations["attention_zero"]
    needed: list[int] = []
    if attention is not None:
        gone = (attention.lifetime[index] == 0) | (
            attention.length[index] <= MAX_LEFT * target.clean_length()
        )
        needed = gone[: sink.l_start + 1].nonzero().flatten().tolist()
    return SinkAttribution(
        position=sink.position,
        token=sink.token,
        token_id=sink.token_id,
        onset=sink.l_start,
        lifetime=target.clean_lifetime,
        norm=target.clean_norm(),
        alignment=target.clean_alignment(),
        length=target.clean_length(),
        score=target.clean_score(),
        verdict=verdict,
        attention_feeders=tuple(needed),
        comparison=compare(controls, seed=seed),
    )
