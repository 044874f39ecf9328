"""Which neurons of the writer make each sink, and what do they read?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.explain.neurons import (
    NeuronContributions,
    NeuronInputs,
    NeuronTest,
    SinkNeurons,
    TestKind,
    fewest,
    strongest_others,
)
from secondary_sinks.explain.sinks import Sink, SinkMap
from secondary_sinks.intervene.clean import CleanRun
from secondary_sinks.intervene.interventions import Intervention
from secondary_sinks.intervene.self_test import Method
from secondary_sinks.models.host import UserHook, describe
from secondary_sinks.models.mlp import need_neurons
from secondary_sinks.models.precision import tolerance
from secondary_sinks.models.text import Text
from secondary_sinks.questions.attribution_rows import Target
from secondary_sinks.questions.counterfactuals import CounterfactualRows, counterfactuals
from secondary_sinks.questions.direct_writes import direct_writes, sink_directions
from secondary_sinks.questions.given import chosen_sinks, sink_map_of
from secondary_sinks.questions.mlp_records import MlpRecord, record_mlps
from secondary_sinks.questions.writers import candidates, given_writers


def neuron_contributions(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    which: Literal["secondary"] | Sequence[Sink] = "secondary",
    writers: int | Mapping[int, int] | None = None,
    share: float = 0.9,
    verify: bool = True,
    n_inputs: int = 8,
    n_controls: int = 8,
    seed: int = 0,
    method: Method = "auto",
    chat: bool = False,
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> NeuronContributions:
    """Split each sink's write over the neurons of its writer, and test the few that make it.

    The contribution of neuron `n` is `h_n * (w_n . d)`, with `h_n` its activation at the sink's
    token (what the output matrix reads), `w_n` its row of the output matrix and `d` the unit sink
    direction after the sink's onset layer, taken back through the norm behind the MLP where there
    is one. Contributions and biases add up to what the MLP writes along `d`; that is checked
    against the write that a forward pass recorded. `k` is the fewest neurons that make `share`
    of it, taken by the size of their contributions (`explain.neurons.fewest`).

    With `verify`, counterfactual rows set neurons to zero at the sink's token: those `k`, all but
    those `k`, and, as controls, the same with `k` others drawn at random (`n_controls` draws) and
    with the `k` others whose outputs are the longest in any direction.

    For the largest neurons: their pre-activation as a sum over what the MLP reads, the embedding
    and the outputs of all blocks before it (`NeuronInputs`), beside the same of ordinary tokens.

    What it is not evidence for: that the neurons mean anything by themselves (the basis is the
    model's, the sum over many small ones may matter), that a part which brings much to a
    pre-activation is necessary for it (the norm's scale would change without it), or that neurons
    which contribute little along the sink direction have no effect by way of later blocks.

    Args:
        model: any TransformerLens model whose MLPs show their neurons.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        which: "secondary" for all secondary sinks, or some sinks of the map.
        writers: the layer whose MLP is split: one for all, or a mapping of positions to layers.
            None takes the layer up to the onset whose MLP writes the largest part along the sink
            direction beyond ordinary tokens (the candidate of `attribute_to_mlps`, untested).
        share: of the write that the named neurons make.
        verify: run the counterfactual rows.
        n_inputs: of how many neurons of each sink the inputs are split; 0 for none.
        n_controls: random draws of each control, and ordinary tokens to compare inputs with.
        seed: of every random choice; recorded with the result.
        method: engine of the rows; see `counterfactuals`.
        chat: the string goes through the chat template.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: no secondary sinks in the text, sinks that are not in the map, a layer out of
            range, one whose MLP writes nothing along a sink's direction, a `share` outside (0, 1],
            a sink map of another model, text or criterion, or several texts.
        ModelError: the writer is a mixture of experts, or the contributions do not add up.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; it lies above 0 and up to 1")
    if n_controls < 1 or n_inputs < 0:
        raise InputError(f"n_controls is {n_controls} and n_inputs {n_inputs}; at least 1 and 0")
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    chosen = chosen_sinks(found, which)
    targets = [Target.of(found, sink, n_controls=n_controls, seed=seed) for sink in chosen]
    clean = CleanRun.of(model, found, fwd_hooks=fwd_hooks)
    writes = direct_writes(model, found, chosen, clean=clean, fwd_hooks=fwd_hooks)
    if writers is None:
        layers = candidates(writes, chosen)
    else:
        layers = given_writers(writers, chosen, int(found.model["n_layers"]))
    wanted: dict[int, list[int]] = defaultdict(list)
    for target, layer in zip(targets, layers, strict=True):
        need_neurons(model, layer)
        wanted[layer] += [target.sink.position, *target.matched]
    records = record_mlps(model, found, wanted, parts=n_inputs > 0, fwd_hooks=fwd_hooks)
    directions = sink_directions(clean, [sink.l_start for sink in chosen])
    splits = []
    for index, (target, layer, direction) in enumerate(
        zip(targets, layers, directions, strict=True)
    ):
        recorded = float(writes.mlp[index, layer])
        split = _split(model, records[layer], target, direction, recorded, share)
        splits.append(split)
    plan = _Plan(splits, n_controls, seed)
    rows = None
    if verify:
        rows = counterfactuals(
            model,
            found,
            plan.interventions,
            method=method,
            progress=progress,
            fwd_hooks=fwd_hooks,
        )
    width = max(len(split.contribution) for split in splits)
    return NeuronContributions(
        sinks=tuple(_record(model, split, n_inputs) for split in splits),
        contribution=torch.stack(
            [
                torch.nn.functional.pad(split.contribution, (0, width - len(split.contribution)))
                for split in splits
            ]
        ),
        share=share,
        tests=() if rows is None else tuple(plan.tests(rows)),
        seed=seed,
        engine="" if rows is None else rows.engine,
        model=found.model,
        primary_position=found.primary_position,
    )


@dataclass(frozen=True)
class OnlyNeurons:
    """An edit: some neurons at zero, or all but some."""

    neurons: tuple[int, ...]
    keep: bool

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The activations with those neurons, or the others, at zero."""
        chosen = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        chosen[..., list(self.neurons)] = True
        return torch.where(chosen == self.keep, value, torch.zeros_like(value))


@dataclass(frozen=True)
class _Split:
    """One sink's write, neuron by neuron."""

    target: Target
    record: MlpRecord
    contribution: Float[Tensor, "neuron"]
    output_norm: Float[Tensor, "neuron"]
    """Length of what each neuron writes, in any direction."""
    write: float
    bias: float
    neurons: tuple[int, ...]
    error: float


def _split(
    model: Any,
    record: MlpRecord,
    target: Target,
    direction: Float[Tensor, "d_model"],
    recorded: float,
    share: float,
) -> _Split:
    mlp, position = record.mlp, target.sink.position
    own = record.at([position])
    if mlp.hidden is None or mlp.w_out is None:
        raise ModelError(f"the MLP of layer {mlp.layer} shows no neurons")
    hidden = own[mlp.hidden][0]
    scale = mlp.norm_after.scale(own["output"], own["written"])
    back = mlp.norm_after.transposed(direction[None], scale)[0]
    weight = mlp.w_out.float().cpu()
    contribution = hidden * (weight @ back)
    own_bias = 0.0 if mlp.b_out is None else float(mlp.b_out.float().cpu() @ back)
    bias = own_bias + float(mlp.norm_after.bias @ direction)
    write = float(contribution.double().sum()) + bias
    error = abs(write - recorded) / max(float(own["written"].norm()), 1e-12)
    if not error <= 10 * tolerance(model):
        raise ModelError(
            f"the neurons of MLP {mlp.layer} of {describe(model).name!r} write {write:.4g} along "
            f"the sink direction at position {position}, where the forward pass recorded "
            f"{recorded:.4g} (relative error {error:.1e}); nothing can be ascribed to them"
        )
    if not write > 0:
        raise InputError(
            f"MLP {mlp.layer} writes nothing along the sink direction at position {position} "
            f"({write:.3g}), so no neuron of it makes the sink: name another layer in `writers`"
        )
    return _Split(
        target=target,
        record=record,
        contribution=contribution,
        output_norm=hidden.abs() * weight.norm(dim=1),
        write=write,
        bias=bias,
        neurons=fewest(contribution, write, bias=bias, share=share),
        error=error,
    )


def _record(model: Any, split: _Split, n_inputs: int) -> SinkNeurons:
    target = split.target
    named = split.neurons[:n_inputs]
    return SinkNeurons(
        position=target.sink.position,
        token=target.sink.token,
        onset=target.sink.l_start,
        writer=split.record.mlp.layer,
        lifetime=target.clean_lifetime,
        norm=target.clean_norm(),
        score=target.clean_score(),
        write=split.write,
        bias=split.bias,
        neurons=split.neurons,
        error=split.error,
        inputs=_inputs(model, split, named) if named else None,
    )


def _inputs(model: Any, split: _Split, neurons: tuple[int, ...]) -> NeuronInputs:
    """Pre-activations of some neurons as sums over what the MLP reads, through the clean norm."""
    record, mlp = split.record, split.record.mlp
    read = record.parts.sum(dim=1)
    scale = mlp.norm_before.scale(read, record.stages["input"])
    normed = mlp.norm_before.linear(record.parts, scale[:, None])
    own = record.rows([split.target.sink.position])
    near = record.rows(split.target.matched)
    reads, ordinary = {}, {}
    for stage, (weight, layer_bias) in mlp.readers.items():
        columns = weight[:, list(neurons)].float().cpu()
        bias = mlp.norm_before.bias @ columns
        if layer_bias is not None:
            bias = bias + layer_bias[list(neurons)].float().cpu()
        parts = torch.einsum("tpd,dn->tnp", normed, columns)
        parts = torch.cat([parts, bias[None, :, None].expand(len(parts), -1, 1)], dim=2)
        expected = record.stages[stage][:, list(neurons)]
        # The parts of a massive token cancel, so the error is measured against their sizes.
        size = parts.abs().sum(dim=2) + expected.abs()
        error = float(((parts.sum(dim=2) - expected).abs() / size.clamp_min(1e-6)).max())
        if not error <= 10 * tolerance(model):
            raise ModelError(
                f"what the blocks before MLP {mlp.layer} of {describe(model).name!r} bring to its "
                f"{stage} does not add up to it (relative error {error:.1e}), so it cannot be "
                "ascribed to them; a hook that edits the residual stream itself does this"
            )
        reads[stage] = parts[own[0]]
        ordinary[stage] = parts[near].mean(dim=0)
    return NeuronInputs(neurons, (*record.part_names, "bias"), reads, ordinary)


class _Plan:
    """The counterfactual rows of all sinks, and what each of them is."""

    def __init__(self, splits: Sequence[_Split], n_controls: int, seed: int):
        self.interventions: list[Intervention] = []
        self._splits = splits
        self._what: list[tuple[int, TestKind, int]] = []
        for index, split in enumerate(splits):
            top = split.neurons
            active = strongest_others(split.output_norm, top, len(top))
            self._add(index, "ablate_top", "keep_top", 0, top)
            self._add(index, "ablate_active", "keep_active", 0, active)
            sink = split.target.sink
            rng = np.random.default_rng([seed, sink.position, sink.l_start, 3])
            others = np.setdiff1d(np.arange(len(split.contribution)), np.array(top, dtype=int))
            for draw in range(n_controls):
                some = rng.permutation(others)[: len(top)].astype(int).tolist()
                self._add(index, "ablate_random", "keep_random", draw, tuple(sorted(some)))

    def _add(
        self, index: int, ablate: TestKind, keep: TestKind, draw: int, neurons: tuple[int, ...]
    ) -> None:
        layer = self._splits[index].record.mlp.layer
        position = self._splits[index].target.sink.position
        for kind in (ablate, keep):
            edit = OnlyNeurons(neurons, keep=kind == keep)
            self.interventions.append(Intervention("mlp_post", layer, position, edit))
            self._what.append((index, kind, draw))

    def tests(self, rows: CounterfactualRows) -> list[NeuronTest]:
        """The outcome of every row."""
        length = rows.centered_norm * rows.centered_alignment
        found = []
        for row, (index, kind, draw) in enumerate(self._what):
            target = self._splits[index].target
            found.append(
                NeuronTest(
                    sink=index,
                    kind=kind,
                    draw=draw,
                    lifetime=int(rows.is_sink[row, target.phase].sum()),
                    norm=float(rows.norm[row, target.life].mean()),
                    length_left=float(length[row, target.life].mean()) / target.clean_length(),
                    score=float(rows.direct_score[row, target.shown].mean()),
                )
            )
        return found
