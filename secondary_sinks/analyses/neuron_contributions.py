"""Which neurons of the writer make each sink, and what do they read?

What an MLP writes along a direction is a sum over its neurons, activation times output weight, so
each neuron's contribution is exact. That a neuron contributes much is not yet that the sink needs
it: the contributions are along one direction after one layer. `NeuronTest` therefore holds what
became of the token when the largest were taken away, or alone were kept, and the same of others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.analyses.mlp_records import MlpRecord, record_mlps
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.mlp import need_neurons
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.counterfactuals import CounterfactualRows, counterfactuals
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.interventions import Intervention
from secondary_sinks.result import Result
from secondary_sinks.sinks.direct_writes import direct_writes, sink_directions
from secondary_sinks.sinks.selection import chosen_sinks, sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import candidates, given_writers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TestKind = Literal[
    "ablate_top", "keep_top", "ablate_random", "keep_random", "ablate_active", "keep_active"
]


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
    of it, taken by the size of their contributions (`analyses.neuron_contributions.fewest`).

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
    """Length along the sink direction over the clean sink's, mean over the same layers."""
    score: float
    """Direct sink score, mean over heads and the layers that show the clean life."""


@dataclass(frozen=True, eq=False)
class NeuronInputs:
    """What the pre-activations of a sink's largest neurons are made of.

    The residual that the MLP reads is a sum of parts, and the norm is linear once its scale is
    known, so the parts of a row add up to the neuron's pre-activation. A part counts for what it
    brings through the clean norm: had it been missing, the scale would have been another.
    """

    neurons: tuple[int, ...]
    parts: tuple[str, ...]
    """`embedding`, `attn 0`, `mlp 0`, ..., and `bias` (of the norm and of the layer)."""
    reads: dict[str, Float[Tensor, "neuron part"]]
    """By stage that reads the input: `gate` and `up`, or `pre`."""
    ordinary: dict[str, Float[Tensor, "neuron part"]]
    """The same, mean over ordinary tokens nearby."""

    def pre_activation(self, stage: str) -> Float[Tensor, "neuron"]:
        """The sum of the parts."""
        return self.reads[stage].sum(dim=1)


@dataclass(frozen=True, eq=False)
class SinkNeurons:
    """One sink and the neurons that wrote it."""

    position: int
    token: str
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
    """What of that comes from biases, which no neuron has a part in."""
    neurons: tuple[int, ...]
    """The fewest neurons that make `share` of the write (`fewest`), the largest first."""
    error: float
    """Deviation of the sum of the contributions from the recorded write, over the written norm."""
    inputs: NeuronInputs | None
    """Of the largest of them."""

    @property
    def k(self) -> int:
        """How many neurons make `share` of the write."""
        return len(self.neurons)


@dataclass(frozen=True, eq=False)
class NeuronContributions(Result):
    """Exact contributions of the writers' neurons; see `neuron_contributions`."""

    sinks: tuple[SinkNeurons, ...]
    contribution: Float[Tensor, "sink neuron"]
    """What each neuron of the sink's writer writes along the sink direction."""
    share: float
    """Share of the write that `SinkNeurons.neurons` make."""
    tests: tuple[NeuronTest, ...]
    """Empty with `verify=False`."""
    seed: int
    engine: str
    """Which engine ran the tests; empty without them."""
    model: dict[str, Any]
    primary_position: int

    def __repr__(self) -> str:
        counts = sorted(sink.k for sink in self.sinks)
        span = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        name, n = self.model.get("name", "?"), len(self.sinks)
        return (
            f"NeuronContributions({name!r}, {n} sink{'' if n == 1 else 's'}: {span} of "
            f"{self.contribution.shape[1]} neurons make {self.share:.0%} of the write)"
        )

    @property
    def jaccard(self) -> Float[Tensor, "sink sink"]:
        """Neurons that two sinks share, over those that either has; 0 for different writers."""
        sets = [{(sink.writer, neuron) for neuron in sink.neurons} for sink in self.sinks]
        return torch.tensor([[len(a & b) / max(1, len(a | b)) for b in sets] for a in sets])

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: its writer, how many neurons make it, and the tests' outcome.

        Lifetimes and lengths of the random controls are means over the draws.
        """
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            row: dict[str, Any] = {
                "position": sink.position,
                "token": sink.token,
                "writer": sink.writer,
                "write": sink.write,
                "bias": sink.bias,
                "k": sink.k,
                "largest_share": float(self.contribution[index].max()) / sink.write,
                "neurons": sink.neurons[:5],
                "lifetime": sink.lifetime,
            }
            for kind in dict.fromkeys(test.kind for test in self.tests):
                own = [t for t in self.tests if t.sink == index and t.kind == kind]
                for name in ("lifetime", "length_left"):
                    values = [float(getattr(test, name)) for test in own]
                    row[f"{kind}.{name}"] = sum(values) / len(values) if values else float("nan")
            rows.append(row)
        return pd.DataFrame(rows)

    def neurons_frame(self) -> pd.DataFrame:
        """One row for each neuron that is among those of any sink, the most shared first."""
        import pandas as pd

        rows = []
        listed = {(sink.writer, neuron) for sink in self.sinks for neuron in sink.neurons}
        for writer, neuron in sorted(listed):
            own = [i for i, sink in enumerate(self.sinks) if sink.writer == writer]
            shares = [float(self.contribution[i, neuron]) / self.sinks[i].write for i in own]
            rows.append(
                {
                    "layer": writer,
                    "neuron": neuron,
                    "n_sinks": sum(neuron in self.sinks[i].neurons for i in own),
                    "of_sinks": len(own),
                    "mean_share": sum(shares) / len(shares),
                    "least_share": min(shares),
                    "largest_share": max(shares),
                }
            )
        columns = "layer neuron n_sinks of_sinks mean_share least_share largest_share"
        frame = pd.DataFrame(rows, columns=columns.split())
        return frame.sort_values(["n_sinks", "mean_share"], ascending=False, ignore_index=True)

    def inputs_frame(self) -> pd.DataFrame:
        """One row for each sink, neuron, stage and part: what the part brings to it."""
        import pandas as pd

        rows = []
        for sink in self.sinks:
            if sink.inputs is None:
                continue
            for stage, values in sink.inputs.reads.items():
                for number, neuron in enumerate(sink.inputs.neurons):
                    for column, part in enumerate(sink.inputs.parts):
                        rows.append(
                            {
                                "position": sink.position,
                                "token": sink.token,
                                "layer": sink.writer,
                                "neuron": neuron,
                                "stage": stage,
                                "part": part,
                                "value": float(values[number, column]),
                                "ordinary": float(sink.inputs.ordinary[stage][number, column]),
                            }
                        )
        columns = "position token layer neuron stage part value ordinary"
        return pd.DataFrame(rows, columns=columns.split())

    def tests_frame(self) -> pd.DataFrame:
        """One row for each counterfactual run."""
        import pandas as pd

        return pd.DataFrame(self.tests, columns=NeuronTest._fields)

    def plot_inputs(self, **kwargs: Any) -> Figure:
        """Figure of what they read; see `secondary_sinks.plots.plot_neuron_contributions.plot_neuron_inputs`."""
        from secondary_sinks.plots.plot_neuron_contributions import plot_neuron_inputs

        return plot_neuron_inputs(self, **kwargs)


def fewest(
    contribution: Float[Tensor, "neuron"], write: float, *, bias: float = 0.0, share: float = 0.9
) -> tuple[int, ...]:
    """The fewest neurons that make `share` of a write, the largest first.

    Neurons are taken by the size of their contributions, and not by their sign, until what they and
    the biases write is within `1 - share` of the whole and no further one takes it out again: two
    large ones that all but cancel belong together.
    """
    order = contribution.abs().argsort(descending=True, stable=True)
    sums = bias + torch.cat([torch.zeros(1).double(), contribution.double()[order].cumsum(0)])
    allowed = max(1 - share, 1e-6) * abs(write)
    outside = ((sums - write).abs() > allowed).nonzero().flatten().tolist()
    n = outside[-1] + 1 if outside else 0
    return tuple(order[:n].tolist())


def strongest_others(
    size: Float[Tensor, "neuron"], without: Sequence[int], n: int
) -> tuple[int, ...]:
    """The `n` largest that are not among `without`."""
    left = size.clone()
    left[list(without)] = -1
    return tuple(left.argsort(descending=True, stable=True)[:n].tolist())
