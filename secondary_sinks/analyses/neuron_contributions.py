"""Which neurons of the writer make each sink, and what do they read?

What an MLP writes along a direction is a sum over its neurons, activation times output weight, so
each neuron's contribution is exact. A large contribution does not yet show that the sink needs the
neuron, because contributions are along one direction after one layer. So `NeuronTest` holds what
becomes of the token without the largest neurons, and with them alone, and the same for controls.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from secondary_sinks.analyses.mlp_records import MlpRecord, counted_kinds, record_mlps
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.mlp import Mlp, need_neurons
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.intervene.counterfactuals import CounterfactualRows, counterfactuals
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.interventions import Intervention
from secondary_sinks.result import Result
from secondary_sinks.sinks.direct_writes import sink_directions
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Kind, Sink
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TestKind = Literal[
    "ablate_top", "keep_top", "ablate_random", "keep_random", "ablate_active", "keep_active"
]


def neuron_contributions(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    writers: int | Mapping[int, int] | None = None,
    share: float = 0.9,
    verify: bool = True,
    n_inputs: int = 8,
    n_controls: int = 8,
    seed: int = 0,
    method: Method = "auto",
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> NeuronContributions:
    """Which neurons of its writer make each sink, and is the sink gone without them?

    The contribution of neuron `n` is `h_n * (w_n . d)`, with `h_n` its activation at the sink's
    token (what the output matrix reads), `w_n` its row of the output matrix and `d` the unit sink
    direction after the sink's onset layer, taken back through the norm after the MLP where there is
    one. Contributions and biases add up to what the MLP writes along `d`, which is checked against
    the recorded write. `k` is the fewest neurons that make `share` of it, taken by the size of
    their contributions (`fewest`).

    With `verify`, counterfactual rows set neurons to zero at the sink's token: those `k`, all but
    those `k`, and, as controls, the same with `k` others drawn at random (`n_controls` draws) and
    with the `k` others that have the longest outputs in any direction.

    For the largest neurons: their pre-activation as a sum over what the MLP reads, the embedding
    and the outputs of all blocks before it (`NeuronInputs`), with the same for ordinary tokens.

    >>> neurons = neuron_contributions(model, sink_map)
    >>> neurons.to_frame()
    >>> neurons.plot()

    Not evidence for: that the neurons mean anything by themselves (the basis is the model's, and
    the sum over many small ones may matter), that a part which contributes much to a pre-activation
    is necessary for it (the norm's scale would change without it), or that neurons which contribute
    little along the sink direction have no effect through later blocks.

    Args:
        model: any TransformerLens model whose MLPs show their neurons.
        sink_map: from `detect_sinks` in this model.
        sinks: which tokens; see `SinkMap.select`.
        writers: the layer whose MLP is split: one for all, or a mapping of positions to layers.
            None takes the largest write (`sinks.writers.resolve_writers`).
        share: of the write that the named neurons make.
        verify: run the counterfactual rows.
        n_inputs: for how many neurons of each sink the inputs are split; 0 for none.
        n_controls: random draws of each control, and ordinary tokens to compare inputs with.
        seed: of every random choice; recorded with the result.
        method: engine of the rows; see `counterfactuals`.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Raises:
        InputError: nothing selected, a layer out of range, one whose MLP writes nothing along a
            sink's direction, a `share` outside (0, 1], or a sink map that does not belong to this
            model.
        ModelError: the writer is a mixture of experts, or the contributions do not add up.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; it must be above 0 and at most 1")
    if n_controls < 1 or n_inputs < 0:
        raise InputError(f"n_controls is {n_controls} and n_inputs {n_inputs}; at least 1 and 0")
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    chosen = sink_map.select(sinks)
    targets = [Target.of(sink_map, sink, n_controls=n_controls, seed=seed) for sink in chosen]
    resolved = resolve_writers(model, sink_map, chosen, writers, fwd_hooks=fwd_hooks)
    positions: dict[int, list[int]] = defaultdict(list)
    for target, layer in zip(targets, resolved.layers, strict=True):
        need_neurons(model, layer)
        positions[layer] += [target.sink.position, *target.matched]
    records = record_mlps(model, sink_map, positions, parts=n_inputs > 0, fwd_hooks=fwd_hooks)
    directions = sink_directions(sink_map, [sink.l_start for sink in chosen])
    splits = [
        _split(model, records[layer], target, direction, share, n_inputs)
        for target, layer, direction in zip(targets, resolved.layers, directions, strict=True)
    ]
    plan = _planned_tests(splits, n_controls, seed) if verify else []
    rows = None
    if plan:
        rows = counterfactuals(
            model,
            sink_map,
            [_intervention(splits, test) for test in plan],
            method=method,
            progress=progress,
            fwd_hooks=fwd_hooks,
        )
    return NeuronContributions(
        sinks=tuple(split.sink for split in splits),
        contribution=pad_sequence([split.contribution for split in splits], batch_first=True),
        share=share,
        tests=() if rows is None else _outcomes(splits, plan, rows),
        primary_position=sink_map.primary_position,
        writer_rule=resolved.rule,
        provenance=sink_map.provenance.extended(
            seed=seed, engine=None if rows is None else rows.engine
        ),
    )


class NeuronTest(NamedTuple):
    """What became of a sink when some neurons of its writer were set to zero at its token."""

    sink: int
    """Index of the sink."""
    kind: TestKind
    """`ablate_...`: those neurons at zero; `keep_...`: all others at zero. `..._top`: the neurons
    that make the write; `..._random`: as many others, drawn at random; `..._active`: as many
    others, those with the longest outputs in any direction."""
    draw: int
    """Number of the random draw; 0 for the other kinds."""
    lifetime: int
    """Layers of the primary phase after which the token is a sink."""
    norm: float
    """Residual norm, mean over the layers of the clean life."""
    length_left: float
    """Length along the sink direction over that of the clean token, mean over the same layers; NaN
    where the clean token has none."""
    score: float
    """Direct sink score, mean over heads and the layers that show the clean life."""


@dataclass(frozen=True, eq=False)
class NeuronInputs:
    """What the pre-activations of a sink's largest neurons are made of.

    The residual that the MLP reads is a sum of parts, and the norm is linear once its scale is
    known, so the parts of a row add up to the neuron's pre-activation. Each part goes through the
    clean norm; without the part, the scale would have been another.
    """

    neurons: tuple[int, ...]
    parts: tuple[str, ...]
    """`embedding`, `attn 0`, `mlp 0`, ..., and `bias` (of the norm and of the layer)."""
    reads: dict[str, Float[Tensor, " neuron part"]]
    """By stage that reads the input: `gate` and `up`, or `pre`."""
    ordinary: dict[str, Float[Tensor, " neuron part"]]
    """The same, mean over ordinary tokens nearby."""

    def pre_activation(self, stage: str) -> Float[Tensor, " neuron"]:
        """The sum of the parts."""
        return self.reads[stage].sum(dim=1)


@dataclass(frozen=True, eq=False)
class SinkNeurons:
    """One sink (or chosen token) and the neurons that wrote it."""

    position: int
    token: str
    kind: Kind
    onset: int
    writer: int
    """Layer of the MLP whose neurons these are."""
    lifetime: int
    norm: float
    """Residual norm, mean over the life."""
    score: float
    """Sink score, mean over heads and the layers that show the life."""
    write: float
    """What the MLP writes along the sink direction."""
    bias: float
    """The part of it that comes from biases and from no neuron."""
    neurons: tuple[int, ...]
    """The fewest neurons that make `share` of the write (`fewest`), the largest first; none where
    the write is not above 0."""
    error: float
    """Difference of the sum of the contributions from the recorded write, over the norm of all that
    the MLP wrote."""
    inputs: NeuronInputs | None
    """Of the largest of them."""
    reason: str = ""
    """Why no neurons make a sink here: the token is not one. Empty for a sink."""

    @property
    def k(self) -> int:
        """How many neurons make `share` of the write."""
        return len(self.neurons)


@dataclass(frozen=True, eq=False)
class NeuronContributions(Result):
    """Exact contributions of the writers' neurons; see `neuron_contributions`."""

    sinks: tuple[SinkNeurons, ...]
    contribution: Float[Tensor, " sink neuron"]
    """What each neuron of the sink's writer writes along the sink direction."""
    share: float
    """Share of the write that `SinkNeurons.neurons` make."""
    tests: tuple[NeuronTest, ...]
    """Empty with `verify=False`."""
    primary_position: int
    writer_rule: WriterRule
    provenance: Provenance
    """With the engine that ran the tests, if they were run."""

    def __repr__(self) -> str:
        counts = sorted(sink.k for sink in self.sinks if sink.write > 0)
        span = " to ".join(dict.fromkeys(str(count) for count in (counts[:1] + counts[-1:])))
        tokens = counted_kinds([sink.kind for sink in self.sinks])
        n_neurons = self.contribution.shape[1]
        outcome = (
            f"{span} of {n_neurons} neurons make {self.share:.0%} of the write"
            if counts
            else "nothing is written along the sink direction"
        )
        return f"NeuronContributions({self.provenance.model.name!r}, {tokens}: {outcome})"

    @property
    def write_share(self) -> Float[Tensor, " sink neuron"]:
        """Each neuron's contribution over the write; NaN where the write is not above 0."""
        write = torch.tensor([sink.write if sink.write > 0 else math.nan for sink in self.sinks])
        return self.contribution / write[:, None]

    @property
    def jaccard(self) -> Float[Tensor, " sink sink"]:
        """Neurons that two sinks share, over those that either has; 0 for different writers."""
        sets = [{(sink.writer, neuron) for neuron in sink.neurons} for sink in self.sinks]
        return torch.tensor([[len(a & b) / max(1, len(a | b)) for b in sets] for a in sets])

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: its writer, how many neurons make it, and the tests' outcome.

        Lifetimes and lengths of the random controls are means over the draws.
        """
        import pandas as pd

        frame = pd.DataFrame(
            {
                "position": sink.position,
                "token": sink.token,
                "kind": sink.kind,
                "writer": sink.writer,
                "write": sink.write,
                "bias": sink.bias,
                "k": sink.k,
                "largest_share": float(shares.max()),
                "neurons": sink.neurons[:5],
                "lifetime": sink.lifetime,
                "reason": sink.reason,
            }
            for sink, shares in zip(self.sinks, self.write_share, strict=True)
        )
        tests = self.tests_frame()
        for kind in dict.fromkeys(test.kind for test in self.tests):
            means = tests[tests["kind"] == kind].groupby("sink")[["lifetime", "length_left"]].mean()
            for name in means:
                frame[f"{kind}.{name}"] = means[name].reindex(frame.index).astype(float)
        return frame

    def neurons_frame(self) -> pd.DataFrame:
        """One row for each neuron that is among those of any sink, the most shared first."""
        import pandas as pd

        rows = []
        shares = self.write_share
        listed = {(sink.writer, neuron) for sink in self.sinks for neuron in sink.neurons}
        for writer, neuron in sorted(listed):
            of_writer = [
                i for i, sink in enumerate(self.sinks) if sink.writer == writer and sink.write > 0
            ]
            own = shares[of_writer, neuron]
            rows.append(
                {
                    "layer": writer,
                    "neuron": neuron,
                    "n_sinks": sum(neuron in self.sinks[i].neurons for i in of_writer),
                    "of_sinks": len(of_writer),
                    "mean_share": float(own.mean()),
                    "least_share": float(own.min()),
                    "largest_share": float(own.max()),
                }
            )
        columns = "layer neuron n_sinks of_sinks mean_share least_share largest_share"
        frame = pd.DataFrame(rows, columns=columns.split())
        return frame.sort_values(["n_sinks", "mean_share"], ascending=False, ignore_index=True)

    def inputs_frame(self) -> pd.DataFrame:
        """One row for each sink, neuron, stage and part: what the part contributes to it."""
        import pandas as pd

        rows = [
            (sink.position, sink.token, sink.writer, neuron, stage, part, *pair)
            for sink in self.sinks
            if sink.inputs is not None
            for stage, values in sink.inputs.reads.items()
            for neuron, *lines in zip(
                sink.inputs.neurons,
                values.tolist(),
                sink.inputs.ordinary[stage].tolist(),
                strict=True,
            )
            for part, *pair in zip(sink.inputs.parts, *lines, strict=True)
        ]
        columns = "position token layer neuron stage part value ordinary"
        return pd.DataFrame(rows, columns=columns.split())

    def tests_frame(self) -> pd.DataFrame:
        """One row for each counterfactual run."""
        import pandas as pd

        return pd.DataFrame(self.tests, columns=NeuronTest._fields)

    def plot_inputs(self, **options: Any) -> Figure:
        """Draw what the neurons read; see `plots.plot_neuron_contributions.plot_neuron_inputs`."""
        return self.plot(figure="neuron_inputs", **options)


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
    sink: SinkNeurons
    contribution: Float[Tensor, " neuron"]
    output_norm: Float[Tensor, " neuron"]
    """Norm of what each neuron writes, in any direction."""


def _split(
    model: Model,
    record: MlpRecord,
    target: Target,
    direction: Float[Tensor, " d_model"],
    share: float,
    n_inputs: int,
) -> _Split:
    sink, layer = target.sink, record.mlp.layer
    stages = record.at([sink.position])
    hidden = stages[str(record.mlp.hidden)][0]
    weight, bias = _along(record.mlp, stages, direction)
    contribution = hidden * weight
    write = float(contribution.double().sum()) + bias
    recorded = float(record.recorded[record.rows([sink.position])[0]] @ direction)
    error = abs(write - recorded) / max(float(stages["written"].norm()), 1e-12)
    if not error <= 10 * tolerance(model):
        raise ModelError(
            f"the neurons of MLP {layer} of {name_of(model)!r} write {write:.4g} along the "
            f"sink direction at position {sink.position}, where the forward pass recorded "
            f"{recorded:.4g} (relative error {error:.1e}); nothing can be attributed to them"
        )
    if not write > 0 and sink.kind != "chosen":
        raise InputError(
            f"MLP {layer} writes nothing along the sink direction at position {sink.position} "
            f"({write:.3g}), so no neuron of it makes the sink: name another layer in `writers`"
        )
    neurons = fewest(contribution, write, bias=bias, share=share) if write > 0 else ()
    named = neurons[:n_inputs]
    return _Split(
        target=target,
        sink=SinkNeurons(
            position=sink.position,
            token=sink.token,
            kind=sink.kind,
            onset=sink.l_start,
            writer=layer,
            lifetime=target.clean_lifetime,
            norm=target.clean_norm(),
            score=target.clean_score(),
            write=write,
            bias=bias,
            neurons=neurons,
            error=error,
            inputs=_inputs(model, record, target, named) if named else None,
            reason=_reason(sink, layer, write),
        ),
        contribution=contribution,
        output_norm=hidden.abs() * cast(Tensor, record.mlp.w_out).float().cpu().norm(dim=1),
    )


def _along(
    mlp: Mlp, stages: dict[str, Tensor], direction: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " neuron"], float]:
    """What each neuron writes along a direction when its activation is 1, and what biases write,
    through the norm after the MLP with the scale of one token."""
    scale = mlp.norm_after.scale(stages["output"], stages["written"])
    before_norm = mlp.norm_after.transposed(direction[None], scale)[0]
    bias = float(mlp.norm_after.bias @ direction)
    if mlp.b_out is not None:
        bias += float(mlp.b_out.float().cpu() @ before_norm)
    return cast(Tensor, mlp.w_out).float().cpu() @ before_norm, bias


def _reason(sink: Sink, layer: int, write: float) -> str:
    if sink.kind != "chosen":
        return ""
    nothing = f", and MLP {layer} writes nothing along the sink direction there"
    return f"the token at position {sink.position} is not a sink{'' if write > 0 else nothing}"


def _inputs(
    model: Model, record: MlpRecord, target: Target, neurons: tuple[int, ...]
) -> NeuronInputs:
    """Pre-activations of some neurons as sums over what the MLP reads, through the clean norm."""
    mlp = record.mlp
    scale = mlp.norm_before.scale(record.parts.sum(dim=1), record.stages["input"])
    normed = mlp.norm_before.linear(record.parts, scale[:, None])
    (sink_row,) = record.rows([target.sink.position])
    reads, ordinary = {}, {}
    for stage, (weight, layer_bias) in mlp.readers.items():
        columns = weight[:, list(neurons)].float().cpu()
        bias = mlp.norm_before.bias @ columns
        if layer_bias is not None:
            bias = bias + layer_bias[list(neurons)].float().cpu()
        parts = einsum(normed, columns, "token part d_model, d_model neuron -> token neuron part")
        bias_part = repeat(bias, "neuron -> token neuron 1", token=len(parts))
        parts = torch.cat([parts, bias_part], dim=2)
        expected = record.stages[stage][:, list(neurons)]
        # The parts of a massive token cancel, so the error is measured against their sizes.
        size = parts.abs().sum(dim=2) + expected.abs()
        error = float(((parts.sum(dim=2) - expected).abs() / size.clamp_min(1e-6)).max())
        if not error <= 10 * tolerance(model):
            raise ModelError(
                f"the contributions of the blocks before MLP {mlp.layer} of "
                f"{name_of(model)!r} to its {stage} do not add up to it (relative error "
                f"{error:.1e}), so it cannot be attributed to them; a hook that edits the residual "
                "stream itself does this"
            )
        reads[stage] = parts[sink_row]
        ordinary[stage] = parts[record.rows(target.matched)].mean(dim=0)
    return NeuronInputs(neurons, (*record.part_names, "bias"), reads, ordinary)


class _PlannedTest(NamedTuple):
    """The neurons of one counterfactual row; the other fields are those of `NeuronTest`."""

    sink: int
    kind: TestKind
    draw: int
    neurons: tuple[int, ...]


def _planned_tests(splits: Sequence[_Split], n_controls: int, seed: int) -> list[_PlannedTest]:
    """The tests of all tokens that get a write along the sink direction."""
    plan = []
    for index, split in enumerate(splits):
        sink = split.sink
        if not sink.write > 0:
            continue
        top = sink.neurons
        active = strongest_others(split.output_norm, top, len(top))
        plan.append(_PlannedTest(index, "ablate_top", 0, top))
        plan.append(_PlannedTest(index, "keep_top", 0, top))
        plan.append(_PlannedTest(index, "ablate_active", 0, active))
        plan.append(_PlannedTest(index, "keep_active", 0, active))
        rng = np.random.default_rng([seed, sink.position, sink.onset, 3])
        others = np.setdiff1d(np.arange(len(split.contribution)), np.array(top, dtype=int))
        for draw in range(n_controls):
            drawn = tuple(sorted(rng.permutation(others)[: len(top)].astype(int).tolist()))
            plan.append(_PlannedTest(index, "ablate_random", draw, drawn))
            plan.append(_PlannedTest(index, "keep_random", draw, drawn))
    return plan


def _intervention(splits: Sequence[_Split], test: _PlannedTest) -> Intervention:
    sink = splits[test.sink].sink
    edit = OnlyNeurons(test.neurons, keep=test.kind.startswith("keep"))
    return Intervention("mlp_post", sink.writer, sink.position, edit)


def _outcomes(
    splits: Sequence[_Split], plan: Sequence[_PlannedTest], rows: CounterfactualRows
) -> tuple[NeuronTest, ...]:
    length = rows.centered_norm * rows.centered_alignment
    tests = []
    for row, test in enumerate(plan):
        target = splits[test.sink].target
        clean_length = target.clean_length()
        left = float(length[row, target.life].mean())
        tests.append(
            NeuronTest(
                sink=test.sink,
                kind=test.kind,
                draw=test.draw,
                lifetime=int(rows.is_sink[row, target.phase].sum()),
                norm=float(rows.norm[row, target.life].mean()),
                length_left=left / clean_length if clean_length > 0 else math.nan,
                score=float(rows.direct_score[row, target.shown].nanmean()),
            )
        )
    return tuple(tests)


def fewest(
    contribution: Float[Tensor, " neuron"], write: float, *, bias: float = 0.0, share: float = 0.9
) -> tuple[int, ...]:
    """The fewest neurons that make `share` of a write, the largest first.

    Neurons are taken by the size of their contributions, whatever their sign, until what they and
    the biases write is within `1 - share` of the whole and no further neuron takes it out again:
    two large ones that nearly cancel belong together.
    """
    order = contribution.abs().argsort(descending=True, stable=True)
    sums = bias + torch.cat([torch.zeros(1).double(), contribution.double()[order].cumsum(0)])
    allowed = max(1 - share, 1e-6) * abs(write)
    outside = ((sums - write).abs() > allowed).nonzero().flatten().tolist()
    n = outside[-1] + 1 if outside else 0
    return tuple(order[:n].tolist())


def strongest_others(
    size: Float[Tensor, " neuron"], without: Sequence[int], n: int
) -> tuple[int, ...]:
    """The `n` largest that are not among `without`."""
    left = size.clone()
    left[list(without)] = -1
    return tuple(left.argsort(descending=True, stable=True)[:n].tolist())
