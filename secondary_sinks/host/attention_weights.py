"""What one attention head adds to the residual stream: its `z` through its slice of W_O.

The output of an attention block is a sum over heads, and so is any projection of it:

    attn_out[t] = s[t] * gain * (sum over heads of z[t, h] @ W_O[h]  +  b_O)

`gain` and `s[t]` are those of a norm after the attention (Gemma 2 and 3, OLMo 2): it multiplies
each dimension by a weight and each token by a number, which is taken from the clean run. Without
such a norm `gain` is one and `s[t]` is the same for all tokens: one, or the factor by which some
models scale what a block adds. That the formula holds is checked wherever it is used, because
not every architecture is built this way (a gate or a norm before W_O breaks it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.model_info import describe


@dataclass(frozen=True)
class OutputWeights:
    """What stands between `z` and the residual stream in one layer."""

    weight: Float[Tensor, "head d_head d_model"]
    """W_O of each head."""
    bias: Float[Tensor, "d_model"]
    """b_O; zeros if there is none."""
    gain: Float[Tensor, "d_model"]
    """Weight of the norm after the attention; ones if there is none."""

    def scale(
        self, z: Float[Tensor, "token head d_head"], attn_out: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token"], float]:
        """`s[t]` of every token, and how far the formula is from what the model computed.

        Returns:
            The scales, and the largest deviation of a token's output from the formula, relative to
            its norm (or to a hundredth of the mean norm, where that is more).
        """
        made = (z.flatten(1) @ self.weight.flatten(0, 1) + self.bias) * self.gain
        scale = (made * attn_out).sum(dim=-1) / made.square().sum(dim=-1).clamp_min(1e-30)
        norm = attn_out.norm(dim=-1)
        away = (scale[:, None] * made - attn_out).norm(dim=-1)
        error = away / norm.clamp_min(0.01 * norm.mean()).clamp_min(1e-30)
        return scale, float(error.max())

    def along(self, directions: Float[Tensor, "direction d_model"]) -> tuple[Tensor, Tensor]:
        """What `z` is multiplied with to give each head's part along each direction, and the part
        of the bias, both for a scale of 1: [direction, head, d_head] and [direction]."""
        seen = directions * self.gain
        return torch.einsum("hkd,nd->nhk", self.weight, seen), seen @ self.bias


def output_weights(model: Any, layer: int) -> OutputWeights:
    """Read the output weights of one attention block, in float32.

    Raises:
        ModelError: the block has none, or not by head.
    """
    block = model.blocks[layer]
    name = describe(model).name
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
    none = torch.zeros(weight.shape[2], device=weight.device)
    return OutputWeights(
        weight=weight,
        bias=none if bias is None else bias.detach().float(),
        gain=_gain(block, none),
    )


def check_head_sum(model: Any, error: float, dtype: torch.dtype) -> None:
    """Raise `ModelError` where the heads' parts are not the attention's output."""
    allowed = max(1e-3, 8 * torch.finfo(dtype).eps)
    if not error <= allowed:
        raise ModelError(
            f"in {describe(model).name!r} the heads' outputs do not add up to the attention's "
            f"(relative error {error:.1e}), so nothing can be ascribed to them: there is more than "
            "W_O between them, or a hook edits one of the two"
        )


def _gain(block: Any, like: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """Weight of the norm after the attention.

    A root-mean-square norm of ones is its weight, whatever the convention that it is stored in
    (Gemma keeps it less one).
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
