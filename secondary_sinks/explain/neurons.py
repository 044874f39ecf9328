"""Which neurons of the writer make a sink, how few of them, and what they read.

What an MLP writes along a direction is a sum over its neurons, activation times output weight, so
each neuron's contribution is exact. That a neuron contributes much is not yet that the sink needs
it: the contributions are along one direction after one layer. `NeuronTest` therefore holds what
became of the token when the largest were taken away, or alone were kept, and the same of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TestKind = Literal[
    "ablate_top", "keep_top", "ablate_random", "keep_random", "ablate_active", "keep_active"
]


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

    def plot(self, **kwargs: Any) -> Figure:
        """Figure of the contributions; see `secondary_sinks.report.neurons.plot_neurons`."""
        from secondary_sinks.report.neurons import plot_neurons

        return plot_neurons(self, **kwargs)

    def plot_inputs(self, **kwargs: Any) -> Figure:
        """Figure of what they read; see `secondary_sinks.report.neurons.plot_neuron_inputs`."""
        from secondary_sinks.report.neurons import plot_neuron_inputs

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
