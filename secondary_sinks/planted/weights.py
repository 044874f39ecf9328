"""The weights of a planted model, set in one forward pass.

The weights of each layer depend on the activations that the layers below produce. `Solver.solve`
runs the Hugging Face model once on probe tokens, with hooks that set the weights of every attention
block and MLP when the probe reaches it. See `circuits` for the axes and for the MLPs' neurons.

In every layer the first heads are *sink heads*: each query reads a constant, and each key the sink
axis, through one rotary pair that hardly rotates. The other heads attend to random features of the
tokens.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from secondary_sinks.planted.circuits import (
    LARGE_AXES,
    REPEL_SHARE,
    TRIGGER,
    Layout,
    Neurons,
    circuits,
    normalized,
)
from secondary_sinks.planted.plan import SINK_LOGIT, PlantedPlan

DECOY_LOGIT = -4.0
"""Attention logit of a decoy in heads other than sink heads."""
ATTENTION_SHARE = 0.03
"""Norm of attention's writes, relative to those of the MLPs' random neurons. Small, because a
writer's output varies with the context through the norm of its input."""
NOISE_NEURONS = 16
"""Number of random neurons in every MLP, before those of the circuits."""


def empty_model(plan: PlantedPlan, layout: Layout) -> Any:
    """A Hugging Face model of the planned shape (float32, eval), with weights still random."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[plan.architecture]
    config = config_class(
        name_or_path="planted",
        vocab_size=plan.vocab,
        hidden_size=plan.d_model,
        intermediate_size=_mlp_width(plan, layout),
        num_hidden_layers=plan.n_layers,
        num_attention_heads=plan.n_heads,
        num_key_value_heads=plan.n_kv_heads,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=3,
        architectures=[model_class.__name__],
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        hf = model_class(config)
    hf = hf.float().eval().requires_grad_(False)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return hf


def _mlp_width(plan: PlantedPlan, layout: Layout) -> int:
    """The number of neurons in the layer that needs most."""
    n_neurons = [NOISE_NEURONS] * plan.n_layers
    for part in circuits(plan, layout):
        n_neurons[part.layer] += part.n_neurons
    return max(n_neurons)


def _embedding(
    plan: PlantedPlan, layout: Layout, generator: torch.Generator
) -> Float[Tensor, " vocab d_model"]:
    """The token embeddings, in the clean basis."""
    table = torch.zeros(plan.vocab, plan.d_model, dtype=torch.float64)
    table[:, layout.const] = 1.0
    table[:, layout.common] = plan.common
    shape = (plan.vocab, layout.identity.stop - layout.identity.start)
    identity = torch.randn(shape, generator=generator, dtype=torch.float64)
    table[:, layout.identity] = functional.normalize(identity, dim=-1)
    for token, axis in layout.triggers.items():
        table[token, axis] = TRIGGER
    for token in plan.large_decoys:
        # Within 45 degrees of the first large axis, which their queries read.
        angle = (torch.rand(1, generator=generator, dtype=torch.float64) - 0.5) * math.pi / 2
        along = torch.cat([angle.cos(), angle.sin()]) * math.sqrt(1 - REPEL_SHARE**2)
        table[token, layout.large : layout.large + LARGE_AXES] = plan.large_decoy_norm * along
        table[token, layout.repel] = plan.large_decoy_norm * REPEL_SHARE
    return table


class Solver:
    """Sets the weights of a Hugging Face model, block after block, as a probe passes through."""

    def __init__(
        self, hf: Any, plan: PlantedPlan, layout: Layout, probe: Int[Tensor, " row token"]
    ):
        self.hf, self.plan, self.layout, self.probe = hf, plan, layout, probe
        self.parts = circuits(plan, layout)
        self.generator = torch.Generator().manual_seed(plan.seed)
        gaussian = self._random(plan.d_model, slice(0, plan.d_model))
        self.rotation: Float[Tensor, " rotated clean"] = torch.linalg.qr(gaussian).Q
        special = torch.tensor([*layout.triggers, *plan.large_decoys])
        self.ordinary = ~torch.isin(probe, special)

    def solve(self) -> None:
        """Set every weight. No hook remains."""
        table = _embedding(self.plan, self.layout, self.generator)
        unembed = self._random(self.plan.vocab, self.layout.ordinary) / math.sqrt(self.plan.d_model)
        self.hf.model.embed_tokens.weight.copy_(table @ self.rotation.T)
        self.hf.lm_head.weight.copy_(unembed @ self.rotation.T)
        with ExitStack() as hooks:
            for layer, block in enumerate(self.hf.model.layers):
                set_attention = partial(self._set_attention, block.self_attn)
                set_mlp = partial(self._set_mlp, layer, block.mlp)
                for handle in (
                    block.input_layernorm.register_forward_pre_hook(set_attention),
                    block.self_attn.register_forward_hook(self._scale_attention),
                    block.post_attention_layernorm.register_forward_pre_hook(set_mlp),
                ):
                    hooks.callback(handle.remove)
            self.hf.model(self.probe, use_cache=False)

    def _random(self, rows: int, axes: slice) -> Float[Tensor, " row d_model"]:
        """Random rows that are zero outside `axes`."""
        weight = torch.zeros(rows, self.plan.d_model, dtype=torch.float64)
        shape = (rows, axes.stop - axes.start)
        weight[:, axes] = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return weight

    def _set_attention(self, attention: Any, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """Hook before the first norm: set the weights of `attention` for this residual."""
        plan, layout = self.plan, self.layout
        residual: Float[Tensor, " row token d_model"] = inputs[0].double() @ self.rotation
        x = normalized(residual)[self.ordinary]
        query, key = self._queries_and_keys(x)
        n_channels = plan.d_model // plan.n_heads
        value = self._random(plan.n_kv_heads * n_channels, layout.ordinary)
        output = self._random(plan.n_heads * n_channels, layout.noise).T
        merged = "head channel d_model -> (head channel) d_model"
        attention.q_proj.weight.copy_(rearrange(query, merged) @ self.rotation.T)
        attention.k_proj.weight.copy_(rearrange(key, merged) @ self.rotation.T)
        attention.v_proj.weight.copy_(value @ self.rotation.T)
        attention.o_proj.weight.copy_(self.rotation @ output)

    def _queries_and_keys(
        self, x: Float[Tensor, " row d_model"]
    ) -> tuple[Float[Tensor, " head channel d_model"], Float[Tensor, " kv_head channel d_model"]]:
        """Query and key weights, given the normalized residuals `x` of ordinary tokens."""
        plan, layout = self.plan, self.layout
        n_channels = plan.d_model // plan.n_heads
        # The two channels of the slowest rotary pair: with theta = 1e6 it hardly rotates within
        # thousands of tokens. Sink heads use the first, the other heads the second.
        sink_channel, decoy_channel = n_channels // 2 - 1, n_channels - 1
        massive = math.sqrt(plan.d_model) * layout.sink_share  # the sink axis of a massive token
        ask = layout.unit(layout.const) / x[:, layout.const].mean()
        # Massive tokens, whose constant coordinate is small, ask as well.
        ask = ask + layout.unit(layout.sink) / massive
        ask = ask + layout.unit(layout.large) / math.sqrt(plan.d_model)
        repel = layout.unit(layout.repel) * (layout.sink_share / REPEL_SHARE)
        show = layout.unit(layout.sink) - 1.5 * repel
        scale = math.sqrt(n_channels)  # attention divides logits by it

        identity_norm = x[:, layout.identity].norm(dim=-1).mean()
        by_head = "(head channel) d_model -> head channel d_model"
        query = self._random(plan.n_heads * n_channels, layout.identity) / identity_norm
        query = rearrange(query, by_head, head=plan.n_heads)
        query[: plan.n_sink_heads] = 0.0
        query[:, [sink_channel, decoy_channel]] = 0.0
        query[: plan.n_sink_heads, sink_channel] = ask
        query[plan.n_sink_heads :, decoy_channel] = ask
        key = self._random(plan.n_kv_heads * n_channels, layout.identity) / identity_norm
        key = rearrange(key, by_head, head=plan.n_kv_heads)
        key[:, sink_channel] = show * (SINK_LOGIT * scale / massive)
        key[:, decoy_channel] = repel * (DECOY_LOGIT * scale / massive)
        return query, key

    def _scale_attention(self, attention: Any, _: Any, outputs: tuple[Tensor, ...]) -> Any:
        """Hook after attention: scale its output weights to the planned norm."""
        norm = outputs[0][self.ordinary].norm(dim=-1).mean().item()
        planned = ATTENTION_SHARE * self.plan.noise / math.sqrt(self.plan.n_layers)
        attention.o_proj.weight.mul_(planned / norm)
        return (outputs[0] * (planned / norm), *outputs[1:])

    def _set_mlp(self, layer: int, mlp: Any, _: Any, inputs: tuple[Tensor, ...]) -> None:
        """Hook before the second norm: set the weights of `mlp` for this residual."""
        mid: Float[Tensor, " row token d_model"] = inputs[0].double() @ self.rotation
        neurons = [self._random_neurons(normalized(mid)[self.ordinary])]
        neurons += [
            part.neurons(self.layout, mid[self.probe == part.token])
            for part in self.parts
            if part.layer == layer
        ]
        gate, up, down = zip(*neurons, strict=True)
        n_neurons = sum(len(rows) for rows in gate)
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
            weight.zero_()
        mlp.gate_proj.weight[:n_neurons] = torch.cat(gate) @ self.rotation.T
        mlp.up_proj.weight[:n_neurons] = torch.cat(up) @ self.rotation.T
        mlp.down_proj.weight[:, :n_neurons] = self.rotation @ torch.cat(down, dim=1)

    def _random_neurons(self, x: Float[Tensor, " row d_model"]) -> Neurons:
        """Neurons that write noise, given the normalized inputs `x` of ordinary tokens."""
        gate = self._random(NOISE_NEURONS, self.layout.ordinary)
        # A constant up-projection: a product of two random reads has heavy tails, and would make
        # some ordinary token massive.
        up = (self.layout.unit(self.layout.const) / x[:, self.layout.const].mean()).expand_as(gate)
        gate = gate / (x @ gate.T).std()
        neurons = Neurons(gate, up, self._random(NOISE_NEURONS, self.layout.noise).T)
        norm = (neurons.activation(x) @ neurons.down.T).norm(dim=-1).mean()
        planned = self.plan.noise / math.sqrt(self.plan.n_layers)
        return neurons._replace(down=neurons.down * (planned / norm))
