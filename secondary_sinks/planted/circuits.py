"""The neurons of a planted model that write, feed and erase sinks.

The residual stream is divided into named axes, the *clean basis*. Every weight matrix is later
rotated by one random orthogonal matrix, so that nothing planted lies on a single coordinate:

    axis        holds                                                    written by
    const       1 in every token: the bias that RMSNorm models lack      embedding
    sink        the part of the sink direction that keys read            writers, erasers
    common      the component that all tokens share, if any              embedding, writers
    repel       a strongly negative weight of sink heads' keys           decoys
    large       directions of the large decoys                           embedding
    triggers    one for each special token                               embedding
    feeds       one for each sink with feeders: what its writer reads    feeders
    tags        one for each erasure: "this vector ends at layer l"      writers, erasers
    identity    a random unit vector for each token                      embedding
    noise       everything ordinary                                      MLPs, attention

The sink direction is `s = a * common + sqrt(1 - a^2) * sink` with `a` the alignment of the common
component, so a key that reads only the sink axis does not see what all tokens share.

**A writer is two neurons.** The gate of the first reads `trigger - 0.4 * const`, that of the second
`trigger - 0.7 * const` (in units of the complete trigger), and they write opposite vectors. Where
both are on, their sum no longer depends on the trigger, so an inexact feeder leaves the sink exact.
RMSNorm shrinks trigger and constant alike, so the *sign* of a gate does not depend on the norm of
the token. With the gain chosen so that a gate that is on is 200 or more, `silu(gate)` is linear
there and exactly 0 in float32 for an ordinary token. The output weights are solved for the
normalized input that actually arrives.

**An eraser** must not fire for a token whose writer was ablated (it would write the opposite of a
sink), and must also end a transplanted sink. So it reads nothing of the token, only what was
written: a tag, a tenth of the written vector, together with the sink axis. After normalization all
massive tokens look alike whatever their norm, except that a larger norm leaves a smaller `const`. A
bank of neurons with hinges in `const / sink` interpolates the norm from it, and so erases 0.25 to 4
times the planted vector equally well. A sink that *fades* has such a bank in every layer after the
writer, which removes what is left of the vector, but never more than one fixed length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from secondary_sinks.planted.plan import PlantedPlan

TRIGGER = 0.7
"""Size of a trigger feature in the residual; the constant coordinate is 1."""
TAG_SHARE = 0.1
"""Share of an erasable vector that lies along its tag."""
REPEL_SHARE = 0.2
"""Share of a decoy's vector that lies along the repel axis."""
GATE_ON = 200.0
"""Gate value of a neuron that is on. `silu(-200)` is exactly 0 in float32."""
LARGE_AXES = 2
MINIMUM_BLOCK = 6
"""Minimum number of axes for each of the identity and noise blocks."""
DOSE_RATIO, N_DOSES = 1.15, 10
"""An eraser is exact at this many powers of the ratio, up and down, of the planted vector."""
LEAST_LENGTH = 2.0
"""A fading sink is erased completely from this length up."""


@dataclass(frozen=True)
class Layout:
    """Which axis of the clean basis holds what."""

    triggers: dict[int, int]
    """Axis of each special token's trigger, by token."""
    feeds: dict[int, int]
    """Axis that feeders write and a writer reads, by the sink's token."""
    sink_tags: dict[int, int]
    """Axis of the tag of each erased sink, by token."""
    phase_tags: dict[int, int]
    """Axis of the tag of each primary phase that ends, by its first layer."""
    identity: slice
    noise: slice
    alignment: float
    """Cosine of the sink direction with the common axis."""
    d_model: int
    const: int = 0
    sink: int = 1
    common: int = 2
    repel: int = 3
    large: int = 4
    """First of `LARGE_AXES` axes."""

    @classmethod
    def of(cls, plan: PlantedPlan) -> Layout:
        """Number the axes that `plan` needs; identity and noise share the rest."""
        special = (*plan.primary_tokens, *(s.token for s in plan.secondary), *plan.aligned_decoys)
        erased = [s.token for s in plan.secondary if s.fades or s.end < plan.n_layers]
        axes = iter(range(4 + LARGE_AXES, 10**6))
        triggers = {token: next(axes) for token in special}
        feeds = {sink.token: next(axes) for sink in plan.secondary if sink.feeders}
        sink_tags = {token: next(axes) for token in erased}
        phase_tags = {p.start: next(axes) for p in plan.phases if p.end < plan.n_layers}
        first = next(axes)
        middle = first + (plan.d_model - first) // 2
        return cls(
            triggers=triggers,
            feeds=feeds,
            sink_tags=sink_tags,
            phase_tags=phase_tags,
            identity=slice(first, middle),
            noise=slice(middle, plan.d_model),
            alignment=plan.common_alignment if plan.common else 0.0,
            d_model=plan.d_model,
        )

    @property
    def required(self) -> int:
        """Smallest d_model that holds these axes."""
        return int(self.identity.start) + 2 * MINIMUM_BLOCK

    @property
    def ordinary(self) -> slice:
        """The axes of the identity and noise blocks."""
        return slice(self.identity.start, self.noise.stop)

    @property
    def sink_share(self) -> float:
        """Component of the sink direction along the sink axis."""
        return math.sqrt(1 - self.alignment**2)

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The sink direction, in the clean basis."""
        return self.alignment * self.unit(self.common) + self.sink_share * self.unit(self.sink)

    def unit(self, axis: int) -> Float[Tensor, " d_model"]:
        """The unit vector of one axis, in the clean basis."""
        return functional.one_hot(torch.tensor(axis), self.d_model).double()

    def marked(self, norm: float, axis: int | None, share: float) -> Float[Tensor, " d_model"]:
        """A vector of length `norm` along the sink direction, with `share` of it along `axis`."""
        if axis is None:
            return norm * self.direction
        along = math.sqrt(1 - share**2) * self.direction
        return norm * (along + share * self.unit(axis))


class Neurons(NamedTuple):
    """Weights of some neurons of one gated MLP, in the clean basis."""

    gate: Float[Tensor, " neuron d_model"]
    up: Float[Tensor, " neuron d_model"]
    down: Float[Tensor, " d_model neuron"]

    def activation(self, x: Float[Tensor, " row d_model"]) -> Float[Tensor, " row neuron"]:
        """Activation of each neuron for each normalized input."""
        return functional.silu(x @ self.gate.T) * (x @ self.up.T)


@dataclass(frozen=True)
class Write:
    """Two neurons of `layer`: write `vector` where `token`'s feature on `axis` is complete."""

    layer: int
    token: int
    axis: int
    vector: Float[Tensor, " d_model"]
    n_portions: int = 1
    """Number of equal portions of the feature, all of which must be present."""
    n_neurons = 2

    def neurons(self, layout: Layout, mid: Float[Tensor, " row d_model"]) -> Neurons:
        """The neurons, solved for `mid`, the MLP's inputs at this token before the norm."""
        x, const = normalized(mid), layout.unit(layout.const)
        thresholds = TRIGGER * (1 - torch.tensor([[0.6], [0.3]]).double() / self.n_portions)
        gate = layout.unit(self.axis) - thresholds * const
        gate = gate * (GATE_ON / (x @ gate[1]).mean())
        signs = torch.tensor([1.0, -1.0]).double()
        neurons = Neurons(gate, const.expand_as(gate), self.vector[:, None] * signs)
        return neurons._replace(down=neurons.down / (neurons.activation(x) @ signs).mean())


@dataclass(frozen=True)
class Erase:
    """Neurons of `layer` that write `-vector` wherever `vector`, with its tag, is present."""

    layer: int
    token: int
    tag: int
    vector: Float[Tensor, " d_model"]
    dosed: bool
    """Whether multiples of the vector are erased as well. Not for a primary, whose input is the
    same in every context: with a norm of 2,000 the constant coordinate is so small after
    normalization that float32 rounding would leave more of the vector than one neuron does."""
    fades: bool = False
    """Whether only one length of the vector is erased where a multiple of it is present."""

    @property
    def doses(self) -> list[float]:
        """Multiples of the vector at which the erasure is exact, one for each neuron."""
        if not self.dosed:
            return [1.0]
        least = math.log(LEAST_LENGTH / float(self.vector.norm()), DOSE_RATIO) if self.fades else 0
        return [DOSE_RATIO**k for k in range(min(math.floor(least), -N_DOSES), N_DOSES + 1)]

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return len(self.doses)

    def neurons(self, layout: Layout, mid: Float[Tensor, " row d_model"]) -> Neurons:
        """The neurons, solved for `mid`, the MLP's inputs at this token before the norm."""
        mid = mid.mean(0)
        if self.fades:  # solve for one vector, however much of it the probe has here
            mid = mid + (1 - mid[self.tag] / self.vector[self.tag]) * self.vector
        sink, const = layout.unit(layout.sink), layout.unit(layout.const)
        # Equal to x[sink] where the vector is present, 0 where it is not.
        tagged = layout.unit(self.tag) * (self.vector[layout.sink] / self.vector[self.tag])
        doses = torch.tensor(self.doses, dtype=mid.dtype)
        x = normalized(mid + (doses[:, None] - 1) * self.vector)
        if self.dosed:
            # Neuron k is on above dose k - 1, where const / sink is below its hinge. The last term
            # keeps every other massive token, which lacks the tag, far below zero.
            lower = torch.cat([doses[:1] / 2, doses[:-1]])
            hinge = mid[layout.const] / (lower * self.vector[layout.sink])
            gate = hinge[:, None] * sink - const + 2 * hinge[0] * (tagged - sink)
            gate = gate * (GATE_ON / normalized(mid)[layout.const])
        else:
            gate = (tagged - sink / 2 - const / 2)[None]
            gate = gate * (GATE_ON / (gate @ normalized(mid)))
        neurons = Neurons(gate, sink.expand_as(gate), self.vector[:, None])
        erased = doses.clamp_max(1 if self.fades else math.inf)
        return neurons._replace(
            down=neurons.down * torch.linalg.solve(neurons.activation(x), -erased)
        )


def normalized(x: Float[Tensor, " *batch d_model"]) -> Float[Tensor, " *batch d_model"]:
    """RMSNorm with unit weights."""
    return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


def circuits(plan: PlantedPlan, layout: Layout) -> list[Write | Erase]:
    """Every write and erasure of `plan`, in the order in which MLPs take their neurons."""
    parts: list[Write | Erase] = []
    for phase in plan.phases:
        tag = layout.phase_tags.get(phase.start)
        vector = layout.marked(phase.norm, tag, TAG_SHARE)
        for token in plan.primary_tokens:
            parts.append(Write(phase.start, token, layout.triggers[token], vector))
        if tag is not None:
            parts.append(Erase(phase.end, plan.primary_tokens[0], tag, vector, dosed=False))
    for sink in plan.secondary:
        tag = layout.sink_tags.get(sink.token)
        vector = layout.marked(sink.norm, tag, TAG_SHARE)
        trigger, feed = layout.triggers[sink.token], layout.feeds.get(sink.token)
        if feed is None:
            parts.append(Write(sink.writer, sink.token, trigger, vector))
        else:
            n_portions = len(sink.feeders)
            portion = layout.unit(feed) * TRIGGER / n_portions
            parts += [Write(feeder, sink.token, trigger, portion) for feeder in sink.feeders]
            parts.append(Write(sink.writer, sink.token, feed, vector, n_portions))
        if tag is not None and sink.fades:
            step, later = vector / sink.lifetime, range(sink.writer + 1, plan.n_layers)
            parts += [Erase(layer, sink.token, tag, step, True, fades=True) for layer in later]
        elif tag is not None:
            parts.append(Erase(sink.end, sink.token, tag, vector, dosed=True))
    for token in plan.aligned_decoys:
        vector = layout.marked(plan.aligned_decoy_norm, layout.repel, REPEL_SHARE)
        parts.append(Write(plan.phases[0].start, token, layout.triggers[token], vector))
    return parts
