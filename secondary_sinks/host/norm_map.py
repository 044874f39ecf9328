"""A norm as a linear map, once the scale of each token is known.

RMSNorm and LayerNorm divide a vector by a number that depends on it; everything else that they do
is linear. With that number kept, a sum of parts goes through the norm part by part:

    norm(a + b) = scale * weight * (a - mean(a)) + scale * weight * (b - mean(b)) + bias

(without the means for RMSNorm). `NormMap.of` finds weight, bias and centering by calling the module
on probe vectors, so conventions such as Gemma's `1 + weight`, and norms whose weights were folded
into the next layer, need no special case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_PROBE_SIZE = 32.0  # the norm's epsilon, at most 1e-5, is then 1e-8 of the probe's square


@dataclass(frozen=True)
class NormMap:
    """`scale * weight * centered(v) + bias`, with a scale for each token."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centers: bool
    """Whether the mean of the coordinates is subtracted first (LayerNorm)."""

    @classmethod
    def identity(cls, d_model: int) -> NormMap:
        """The map where there is no norm."""
        return cls(torch.ones(d_model), torch.zeros(d_model), False)

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], like: Float[Tensor, " token d_model"]) -> NormMap:
        """Read the map off a norm by probing it.

        Any module gives some map; `error`, on real inputs and outputs, says whether it is right.

        Args:
            norm: the module, called on [1, probe, d_model].
            like: a tensor with the dtype, device and width of its inputs.
        """
        width = like.shape[-1]
        signs = torch.ones(width).to(like)
        signs[1::2] = -1
        if width % 2:  # the mean must be 0; the second, rotated probe shows the last coordinate
            signs[-1] = 0
        zeros, ones = torch.zeros_like(signs), torch.ones_like(signs)
        probes = torch.stack([zeros, signs, signs.roll(1), ones])
        at_zero, at_signs, at_rotated, at_ones = norm(_PROBE_SIZE * probes[None])[0].float().cpu()
        sign, rotated = probes[1:3].float().cpu()
        # A zero among the signs makes the probe's mean square, and so the divisor, smaller.
        gain = (width / (width - width % 2)) ** 0.5
        weight = torch.where(
            sign != 0, (at_signs - at_zero) * sign, (at_rotated - at_zero) * rotated
        )
        centers = bool((at_ones - at_zero).norm() < 0.5 * (weight / gain).norm())
        return cls(weight / gain, at_zero, centers)

    def scale(
        self, inputs: Float[Tensor, " token d_model"], outputs: Float[Tensor, " token d_model"]
    ) -> Float[Tensor, " token"]:
        """The scale of each token, from the inputs and outputs of the norm (least squares)."""
        shape, outputs = self._shape(inputs), outputs.float() - self.bias
        square = (shape * shape).sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        scale: Tensor = (shape * outputs).sum(dim=-1) / square
        return scale

    def error(
        self, inputs: Float[Tensor, " token d_model"], outputs: Float[Tensor, " token d_model"]
    ) -> float:
        """Largest relative difference of any token's output from that of the map."""
        mapped = self.linear(inputs, self.scale(inputs, outputs)) + self.bias
        size = outputs.float().norm(dim=-1).clamp_min(1e-12)
        return float(((mapped - outputs.float()).norm(dim=-1) / size).max())

    def linear(
        self, parts: Float[Tensor, " *token d_model"], scale: Float[Tensor, " *token"]
    ) -> Float[Tensor, " *token d_model"]:
        """Send parts of tokens that have these scales through the norm, without the bias."""
        mapped: Tensor = scale[..., None] * self._shape(parts)
        return mapped

    def transposed(
        self, directions: Float[Tensor, " *token d_model"], scale: Float[Tensor, " *token"]
    ) -> Float[Tensor, " *token d_model"]:
        """Take directions back through the norm: `linear(v) . d == v . transposed(d)`."""
        weighted = self.weight * directions.float()
        if self.centers:
            weighted = weighted - weighted.mean(dim=-1, keepdim=True)
        back: Tensor = scale[..., None] * weighted
        return back

    def _shape(self, vectors: Tensor) -> Tensor:
        """The map without scale and bias."""
        vectors = vectors.float()
        if self.centers:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        return self.weight * vectors
