"""What one attention head adds to the residual stream: its `z` through its slice of W_O.

The output of an attention block is a sum over heads, and so is its projection on any direction:

    attn_out[t] = s[t] * gain * (sum over heads of z[t, h] @ W_O[h]  +  b_O)

`gain` and `s[t]` are those of a norm after the attention (Gemma 2 and 3, OLMo 2): it multiplies
each dimension by a weight and each token by a number, which is taken from the clean run. Without
such a norm `gain` is one and `s[t]` is the same for all tokens: one, or the factor by which some
models scale what a block adds. Callers check the formula (`check_head_sum`), because it fails in
some architectures, such as those with a gate or a norm before W_O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.model_info import name_of


@dataclass(frozen=True)
class OutputWeights:
    """What lies between `z` and the residual stream in one layer."""

    weight: Float[Tensor, " head d_head d_model"]
    """W_O of each head."""
    bias: Float[Tensor, " d_model"]
    """b_O; zeros if there is none."""
    gain: Float[Tensor, " d_model"]
    """Weight of the norm after the attention; ones if there is none."""

    def scale(
        self, z: Float[Tensor, " token head d_head"], attn_out: Float[Tensor, " token d_model"]
    ) -> tuple[Float[Tensor, " token"], float]:
        """`s[t]` of every token, and how far the formula is from what the model computed.

        Returns:
            The scales, and the largest deviation of a token's output from the formula, relative to
            its norm (or to a hundredth of the mean norm, where that is more).
        """
        heads = einsum(z, self.weight, "token head d_head, head d_head d_model -> token d_model")
        unscaled = (heads + self.bias) * self.gain
        scale = (unscaled * attn_out).sum(-1) / unscaled.square().sum(-1).clamp_min(1e-30)
        norm = attn_out.norm(dim=-1)
        difference = (scale[:, None] * unscaled - attn_out).norm(dim=-1)
        error = difference / norm.clamp_min(0.01 * norm.mean()).clamp_min(1e-30)
        return scale, float(error.max())

    def along(
        self, directions: Float[Tensor, " direction d_model"]
    ) -> tuple[Float[Tensor, " direction head d_head"], Float[Tensor, " direction"]]:
        """What each head's `z` is multiplied with to give its part along each direction, and the
        part of the bias, both for a scale of 1."""
        read = directions * self.gain
        heads = einsum(
            self.weight, read, "head d_head d_model, direction d_model -> direction head d_head"
        )
        return heads, read @ self.bias


def output_weights(model: Any, layer: int) -> OutputWeights:
    """Read the output weights of one attention block, in float32.

    Raises:
        ModelError: the block has none, or not by head.
    """
    block = model.blocks[layer]
    name = name_of(model)
    try:
        weight, bias = block.attn.W_O, getattr(block.attn, "b_O", None)
    except (AttributeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{name!r} shows no output weights of its attention in layer {layer} "
            f"({type(error).__name__}: {error}), so nothing can be ascribed to its heads"
        ) from error
    n_heads = int(model.cfg.n_heads)
    if not isinstance(weight, Tensor) or weight.ndim != 3 or weight.shape[0] != n_heads:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ModelError(
            f"W_O of layer {layer} of {name!r} is {shape}, not [head, d_head, d_model], so nothing "
            "can be ascribed to heads"
        )
    weight = weight.detach().float()
    zeros = torch.zeros(weight.shape[2], device=weight.device)
    bias = zeros if bias is None else bias.detach().float()
    return OutputWeights(weight, bias, gain=_gain(block, zeros))


def check_head_sum(model: Any, error: float, dtype: torch.dtype) -> None:
    """Check that the heads' parts add up to the attention's output.

    Args:
        model: named in the message.
        error: of `OutputWeights.scale`, the largest of all layers.
        dtype: of the activations.

    Raises:
        ModelError: they do not.
    """
    allowed = max(1e-3, 8 * torch.finfo(dtype).eps)
    if not error <= allowed:
        raise ModelError(
            f"in {name_of(model)!r} the heads' outputs do not add up to the attention's "
            f"(relative error {error:.1e}), so nothing can be ascribed to them: the architecture "
            "has more than W_O in between, or a hook edits one of the two; remove such a hook "
            "(model.reset_hooks(), fwd_hooks=())"
        )


def _gain(block: Any, like: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """Weight of the norm after the attention.

    It is what a root-mean-square norm makes of ones, however the model stores it (Gemma stores it
    less one).
    """
    norm = getattr(block, "ln1_post", None)
    if norm is None:
        return torch.ones_like(like)
    inner = getattr(norm, "original_component", None)
    if inner is not None:
        weight = next((p for p in inner.parameters()), like)
        with torch.no_grad():
            gain: Tensor = inner(torch.ones_like(like, dtype=weight.dtype)[None])[0].float()
        return gain
    stored = getattr(norm, "w", None)
    return torch.ones_like(like) if stored is None else stored.detach().float()
