"""The weights of a planted model: every write, erasure and key as an explicit rank-one circuit.

The residual stream is divided into named axes ("clean basis"), and every weight matrix is then
rotated by one random orthogonal matrix, so that nothing planted sits on a single coordinate:

    axis        holds                                                    who writes it
    const       1 in every token: the bias that RMSNorm models lack      embedding
    sink        the part of the sink direction that keys read            writers, erasers
    common      the component that all tokens share, if any              embedding, writers
    shy         "do not look at me": a strongly negative key weight      decoys
    large       directions of the large decoys                           embedding
    triggers    one for each special token                               embedding
    feeds       one for each sink with feeders: what its writer reads    feeders
    tags        one for each erasure: "this vector ends at layer l"      writers, erasers
    identity    a random unit vector for each token                      embedding
    noise       everything ordinary                                      MLPs, attention

The sink direction is `s = a * common + sqrt(1 - a^2) * sink` with `a` the alignment of the common
component, so a key that reads only the sink axis is blind to what all tokens share.

**A writer is two neurons.** The gate of the first reads `trigger - 0.4 * const`, that of the second
`trigger - 0.7 * const` (in units of the complete trigger), and they write opposite vectors: where
both are on, their sum depends on the trigger no more, so an inexact feeder leaves the sink exact.
Trigger and constant shrink alike under RMSNorm, so the *sign* of a gate does not depend on the norm
of the token. With the gain chosen so that a gate that is on has 200 or more, `silu(gate)` is linear
there and exactly 0 in float32 for an ordinary token. The output weights are solved for the
normalized input that really arrives.

**An eraser** must not fire for a token whose writer was ablated (it would make an anti-sink), and
must end a transplanted sink as well. So it reads nothing of the token, only what was written: a
tag, a tenth of the written vector, together with the sink axis. After normalisation a massive
token looks alike whatever its norm is; what still tells the norm is how small `const` became. A
bank of neurons with hinges in `const / sink` interpolates the norm from it, and so erases
0.25 to 4 times the planted vector equally well. A sink that *fades* has such a bank in every layer
after the writer, which takes off what there is, but no more than one and the same length.

**Solving in one pass.** Each layer's weights need the activations that the layers below produce.
`Solver.solve` runs the Hugging Face model once on probe tokens, with hooks that set every attention
and MLP at the moment the probe reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from secondary_sinks.planted.plan import SINK_LOGIT, PlantedPlan

TRIGGER = 0.7
"""Size of a trigger feature in the residual; the constant coordinate is 1."""
TAG = 0.1
"""Share of an erasable vector that lies along its tag."""
SHY = 0.2
"""Share of a decoy's vector that lies along the "do not look" axis."""
GATE = 200.0
"""Gate value of a neuron that is on. `silu(-200)` is exactly 0 in float32."""
SHY_LOGIT = -4.0
"""Attention logit of a decoy in the other heads."""
ATTENTION_SHARE = 0.03
"""Norm of what attention writes, relative to what the MLPs' random neurons write. Small, because
a writer's output varies with the context through the norm of its input."""
NOISE_NEURONS = 16
LARGE_AXES = 2
MINIMUM_BLOCK = 6
"""Fewest axes for each of the identity and noise blocks."""
DOSE_RATIO, N_DOSES = 1.15, 10
"""An eraser is exact at so many powers of the ratio, up and down, of the planted vector."""
LEAST_LENGTH = 2.0
"""From which length on a fading sink is erased to nothing."""


@dataclass(frozen=True)
class Layout:
    """Which axis of the clean basis holds what."""

    triggers: dict[int, int]
    feeds: dict[int, int]
    sink_tags: dict[int, int]
    phase_tags: dict[int, int]
    identity: slice
    noise: slice
    alignment: float
    """Cosine of the sink direction with the common axis."""
    size: int
    const: int = 0
    sink: int = 1
    common: int = 2
    shy: int = 3
    large: int = 4

    @classmethod
    def of(cls, plan: PlantedPlan) -> Layout:
        """Number the axes that `plan` needs; the rest is shared by identity and noise."""
        axes = iter(range(4 + LARGE_AXES, 10**6))
        special = (*plan.primary_tokens, *(s.token for s in plan.secondary), *plan.aligned_decoys)
        triggers = {token: next(axes) for token in special}
        feeds = {sink.token: next(axes) for sink in plan.secondary if sink.feeders}
        sink_tags = {
            s.token: next(axes) for s in plan.secondary if s.fades or s.end < plan.n_layers
        }
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
            size=plan.d_model,
        )

    @property
    def required(self) -> int:
        """Smallest d_model that holds these axes."""
        return int(self.identity.start) + 2 * MINIMUM_BLOCK

    @property
    def sink_share(self) -> float:
        """Component of the sink direction along the sink axis."""
        return math.sqrt(1 - self.alignment**2)

    def unit(self, axis: int) -> Float[Tensor, " d_model"]:
        """The unit vector of one axis, in the clean basis."""
        return functional.one_hot(torch.tensor(axis), self.size).double()

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The sink direction, in the clean basis."""
        return self.alignment * self.unit(self.common) + self.sink_share * self.unit(self.sink)

    def marked(self, norm: float, axis: int | None, share: float) -> Float[Tensor, " d_model"]:
        """A vector of length `norm` along the sink direction, `share` of it along `axis`."""
        if axis is None:
            return norm * self.direction
        along = math.sqrt(1 - share**2) * self.direction
        return norm * (along + share * self.unit(axis))


@dataclass(frozen=True)
class Write:
    """Two neurons of `layer`: write `vector` where `token`'s feature on `axis` is complete."""

    layer: int
    token: int
    axis: int
    vector: Float[Tensor, " d_model"]
    parts: int = 1
    """Number of equal parts that the feature is made of; all of them must be present."""
    n_neurons = 2

    def neurons(
        self, layout: Layout, mid: Float[Tensor, "row d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up [neuron, d_model] and down [d_model, neuron] for this token's inputs `mid`."""
        x, const = normalized(mid), layout.unit(layout.const)
        thresholds = TRIGGER * (1 - torch.tensor([[0.6], [0.3]]).double() / self.parts)
        gate = layout.unit(self.axis) - thresholds * const
        gate = gate * (GATE / (x @ gate[1]).mean())
        up = const.expand_as(gate)
        sign = torch.tensor([1.0, -1.0]).double()
        activation = ((functional.silu(x @ gate.T) * (x @ up.T)) @ sign).mean()
        return gate, up, self.vector[:, None] * sign / activation


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
    normalisation that float32 rounding would leave more behind than the plain neuron does."""
    fades: bool = False
    """Whether no more than the vector is erased where multiples of it are there."""

    @property
    def doses(self) -> list[float]:
        """Multiples of the vector at which it is exact."""
        if not self.dosed:
            return [1.0]
        least = math.log(LEAST_LENGTH / float(self.vector.norm()), DOSE_RATIO) if self.fades else 0
        return [DOSE_RATIO**k for k in range(min(math.floor(least), -N_DOSES), N_DOSES + 1)]

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return len(self.doses)

    def neurons(
        self, layout: Layout, mid: Float[Tensor, "row d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up [neuron, d_model] and down [d_model, neuron] for this token's inputs `mid`."""
        mid = mid.mean(0)
        if self.fades:  # the weights are those for one vector, whatever is there
            mid = mid + (1 - mid[self.tag] / self.vector[self.tag]) * self.vector
        sink, const = layout.unit(layout.sink), layout.unit(layout.const)
        # Equal to x[sink] where the vector is present, 0 where it is not.
        tagged = layout.unit(self.tag) * (self.vector[layout.sink] / self.vector[self.tag])
        doses = torch.tensor(self.doses, dtype=mid.dtype)
        x = normalized(mid + (doses[:, None] - 1) * self.vector)
        if self.dosed:
            # Neuron k is on above dose k - 1, that is where const / sink is below its hinge. The
            # last term keeps every other massive token, which lacks the tag, far below zero.
            lower = torch.cat([doses[:1] / 2, doses[:-1]])
            hinge = mid[layout.const] / (lower * self.vector[layout.sink])
            gate = hinge[:, None] * sink - const + 2 * hinge[0] * (tagged - sink)
            gate = gate * (GATE / normalized(mid)[layout.const])
        else:
            gate = (tagged - sink / 2 - const / 2)[None]
            gate = gate * (GATE / (gate @ normalized(mid)))
        up = sink.expand_as(gate)
        activation = functional.silu(x @ gate.T) * (x @ up.T)
        weights = torch.linalg.solve(activation, -doses.clamp_max(1 if self.fades else math.inf))
        return gate, up, self.vector[:, None] * weights


def normalized(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """RMSNorm with unit weights."""
    return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


def circuits(plan: PlantedPlan, layout: Layout) -> list[Write | Erase]:
    """Every write and erasure that `plan` asks for."""
    parts: list[Write | Erase] = []
    for phase in plan.phases:
        tag = layout.phase_tags.get(phase.start)
        vector = layout.marked(phase.norm, tag, TAG)
        for token in plan.primary_tokens:
            parts.append(Write(phase.start, token, layout.triggers[token], vector))
        if tag is not None:
            parts.append(Erase(phase.end, plan.primary_tokens[0], tag, vector, dosed=False))
    for sink in plan.secondary:
        tag = layout.sink_tags.get(sink.token)
        vector = layout.marked(sink.norm, tag, TAG)
        trigger, feed = layout.triggers[sink.token], layout.feeds.get(sink.token)
        if feed is None:
            parts.append(Write(sink.writer, sink.token, trigger, vector))
        else:
            count = len(sink.feeders)
            part = layout.unit(feed) * TRIGGER / count
            parts += [Write(feeder, sink.token, trigger, part) for feeder in sink.feeders]
            parts.append(Write(sink.writer, sink.token, feed, vector, parts=count))
        if tag is not None and sink.fades:
            step, after = vector / sink.lifetime, range(sink.writer + 1, plan.n_layers)
            parts += [Erase(layer, sink.token, tag, step, True, fades=True) for layer in after]
        elif tag is not None:
            parts.append(Erase(sink.end, sink.token, tag, vector, dosed=True))
    for token in plan.aligned_decoys:
        vector = layout.marked(plan.aligned_decoy_norm, layout.shy, SHY)
        parts.append(Write(plan.phases[0].start, token, layout.triggers[token], vector))
    return parts


def embedding(
    plan: PlantedPlan, layout: Layout, generator: torch.Generator
) -> Float[Tensor, "vocab d_model"]:
    """The token embeddings, in the clean basis."""
    table = torch.zeros(plan.vocab, plan.d_model, dtype=torch.float64)
    table[:, layout.const] = 1.0
    table[:, layout.common] = plan.common
    width = layout.identity.stop - layout.identity.start
    table[:, layout.identity] = functional.normalize(_randn(generator, plan.vocab, width), dim=-1)
    for token, axis in layout.triggers.items():
        table[token, axis] = TRIGGER
    for token in plan.large_decoys:
        # Within 45 degrees of the first axis, which their queries read.
        angle = (torch.rand(1, generator=generator, dtype=torch.float64) - 0.5) * math.pi / 2
        along = torch.cat([angle.cos(), angle.sin()]) * math.sqrt(1 - SHY**2)
        table[token, layout.large : layout.large + LARGE_AXES] = plan.large_decoy_norm * along
        table[token, layout.shy] = plan.large_decoy_norm * SHY
    return table


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Solver:
    """Sets the weights of a Hugging Face model, block after block, while a probe runs through."""

    def __init__(self, hf: Any, plan: PlantedPlan, layout: Layout, probe: Int[Tensor, "row pos"]):
        self.hf, self.plan, self.layout, self.probe = hf, plan, layout, probe
        self.parts = circuits(plan, layout)
        self.generator = torch.Generator().manual_seed(plan.seed)
        gaussian = _randn(self.generator, plan.d_model, plan.d_model)
        self.rotation: Float[Tensor, "rotated clean"] = torch.linalg.qr(gaussian).Q
        special = torch.tensor([*layout.triggers, *plan.large_decoys])
        self.ordinary = ~torch.isin(probe, special)

    def solve(self) -> None:
        """Set every weight, leaving no hook behind."""
        table = embedding(self.plan, self.layout, self.generator)
        self.hf.model.embed_tokens.weight.copy_(table @ self.rotation.T)
        unembed = torch.zeros_like(table)
        block = slice(self.layout.identity.start, self.layout.noise.stop)
        unembed[:, block] = _randn(self.generator, *unembed[:, block].shape)
        unembed = unembed / math.sqrt(self.plan.d_model)
        self.hf.lm_head.weight.copy_(unembed @ self.rotation.T)
        with self._hooks():
            self.hf.model(self.probe, use_cache=False)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for index, block in enumerate(self.hf.model.layers):
            attention = partial(self._before, self._set_attention, index)
            mlp = partial(self._before, self._set_mlp, index)
            handles += [
                block.input_layernorm.register_forward_pre_hook(attention),
                block.self_attn.register_forward_hook(self._scale_attention),
                block.post_attention_layernorm.register_forward_pre_hook(mlp),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(
        self, setter: Callable[[int, Tensor], None], index: int, _: Any, inputs: tuple[Tensor, ...]
    ) -> None:
        setter(index, inputs[0].double() @ self.rotation)

    def _random_read(self, rows: int, axes: slice) -> Float[Tensor, "rows d_model"]:
        weight = torch.zeros(rows, self.plan.d_model, dtype=torch.float64)
        weight[:, axes] = _randn(self.generator, rows, axes.stop - axes.start)
        return weight

    @property
    def _ordinary_axes(self) -> slice:
        return slice(self.layout.identity.start, self.layout.noise.stop)

    def _set_attention(self, index: int, resid: Float[Tensor, "row pos d_model"]) -> None:
        plan, layout = self.plan, self.layout
        x = normalized(resid)[self.ordinary]
        width = plan.d_model // plan.n_heads
        # The slowest rotary pair: with theta = 1e6 it hardly turns within thousands of tokens.
        low, partner = width // 2 - 1, width - 1
        massive = math.sqrt(plan.d_model) * layout.sink_share
        ask = layout.unit(layout.const) / x[:, layout.const].mean()
        # Massive tokens, whose constant coordinate is small, ask as well.
        ask = ask + layout.unit(layout.sink) / massive
        ask = ask + layout.unit(layout.large) / math.sqrt(plan.d_model)
        shyness = layout.sink_share / SHY
        root = math.sqrt(width)
        look = layout.unit(layout.sink) - 1.5 * shyness * layout.unit(layout.shy)
        avoid = layout.unit(layout.shy) * shyness
        scale = x[:, layout.identity].norm(dim=-1).mean()
        query = self._random_read(plan.n_heads * width, layout.identity) / scale
        query = query.view(plan.n_heads, width, -1)
        query[: plan.n_sink_heads] = 0.0
        query[:, [low, partner]] = 0.0
        query[: plan.n_sink_heads, low] = ask
        query[plan.n_sink_heads :, partner] = ask
        key = self._random_read(plan.n_kv_heads * width, layout.identity) / scale
        key = key.view(plan.n_kv_heads, width, -1)
        key[:, low] = look * (SINK_LOGIT * root / massive)
        key[:, partner] = avoid * (SHY_LOGIT * root / massive)
        value = self._random_read(plan.n_kv_heads * width, self._ordinary_axes)
        output = self._random_read(plan.n_heads * width, layout.noise).T
        attention = self.hf.model.layers[index].self_attn
        attention.q_proj.weight.copy_(query.flatten(0, 1) @ self.rotation.T)
        attention.k_proj.weight.copy_(key.flatten(0, 1) @ self.rotation.T)
        attention.v_proj.weight.copy_(value @ self.rotation.T)
        attention.o_proj.weight.copy_(self.rotation @ output)

    def _scale_attention(self, module: Any, _: Any, outputs: tuple[Tensor, ...]) -> Any:
        size = outputs[0][self.ordinary].norm(dim=-1).mean().item()
        wanted = ATTENTION_SHARE * self.plan.noise / math.sqrt(self.plan.n_layers)
        module.o_proj.weight.mul_(wanted / size)
        return (outputs[0] * (wanted / size), *outputs[1:])

    def _random_neurons(self, x: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        gate = self._random_read(NOISE_NEURONS, self._ordinary_axes)
        # A constant up-projection: a product of two random reads has heavy tails, and would make
        # some ordinary token massive.
        up = (self.layout.unit(self.layout.const) / x[:, self.layout.const].mean()).expand_as(gate)
        gate = gate / (x @ gate.T).std()
        down = self._random_read(NOISE_NEURONS, self.layout.noise).T
        size = ((functional.silu(x @ gate.T) * (x @ up.T)) @ down.T).norm(dim=-1).mean()
        return gate, up, down * (self.plan.noise / math.sqrt(self.plan.n_layers) / size)

    def _set_mlp(self, index: int, mid: Float[Tensor, "row pos d_model"]) -> None:
        neurons = [self._random_neurons(normalized(mid)[self.ordinary])]
        neurons += [
            part.neurons(self.layout, mid[self.probe == part.token])
            for part in self.parts
            if part.layer == index
        ]
        gate, up = (torch.cat([n[i] for n in neurons]) @ self.rotation.T for i in (0, 1))
        down = self.rotation @ torch.cat([n[2] for n in neurons], dim=1)
        mlp, used = self.hf.model.layers[index].mlp, len(gate)
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
            weight.zero_()
        mlp.gate_proj.weight[:used] = gate.float()
        mlp.up_proj.weight[:used] = up.float()
        mlp.down_proj.weight[:, :used] = down.float()


def n_neurons(plan: PlantedPlan, layout: Layout) -> int:
    """Width of the MLPs: the most neurons that any layer needs."""
    needed = [NOISE_NEURONS] * plan.n_layers
    for part in circuits(plan, layout):
        needed[part.layer] += part.n_neurons
    return max(needed)


def empty_model(plan: PlantedPlan, layout: Layout) -> Any:
    """A Hugging Face model of the planned shape (float32, eval), its weights still random."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[plan.architecture]
    config = config_class(
        vocab_size=plan.vocab,
        hidden_size=plan.d_model,
        intermediate_size=n_neurons(plan, layout),
        num_hidden_layers=plan.n_layers,
        num_attention_heads=plan.n_heads,
        num_key_value_heads=plan.n_kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=3,
        architectures=[model_class.__name__],
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        hf = model_class(config)
    hf = hf.float().eval().requires_grad_(False)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return hf
