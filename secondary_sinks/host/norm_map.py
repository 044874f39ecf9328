"""A norm as the linear map that it is once the scale of a token is known.

RMSNorm and LayerNorm divide each vector by a number that depends on it, and do nothing else that is
not linear. With the number of the clean vector kept, a sum of parts goes through the norm part by
part:

    norm(a + b) = scale * weight * (a - mean(a)) + scale * weight * (b - mean(b)) + bias

(without the means for RMSNorm). Weight, bias and whether it centers are found by calling the module
on probes, so that conventions such as Gemma's `1 + weight`, or norms that were folded away, need
not be known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_LARGE = 32.0  # so that the norm's epsilon, at most 1e-5, is 1e-8 of the probe's square


@dataclass(frozen=True)
class NormMap:
    """`scale * weight * centered(v) + bias`, with a scale for each token."""

    weight: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]
    centers: bool
    """Whether the mean of the coordinates is taken off first (LayerNorm)."""

    @classmethod
    def identity(cls, d_model: int) -> NormMap:
        """The map of a place where there is no norm."""
        return cls(torch.ones(d_model), torch.zeros(d_model), False)

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], like: Float[Tensor, "token d_model"]) -> NormMap:
        """Probe a norm; `like` has the dtype, device and width of what it reads.

        Whether it is a norm of this form is not known before `scale` and `error` were asked with
        real values.
        """
        width = like.shape[-1]
        signs = torch.ones(width).to(like)
        signs[1::2] = -1
        if width % 2:  # so that the mean is 0; the last coordinate is probed by a rotation
            signs[-1] = 0
        probes = torch.stack(
            [torch.zeros_like(signs), signs, signs.roll(1), torch.ones_like(signs)]
        )
        zero, one, rolled, equal = norm(_LARGE * probes[None])[0].float().cpu()
        share = (width / (width - width % 2)) ** 0.5  # of a zero among the signs in the mean square
        sign = probes[1:3].float().cpu()
        weight = (
            torch.where(sign[0] != 0, (one - zero) * sign[0], (rolled - zero) * sign[1]) / share
        )
        centers = bool((equal - zero).norm() < 0.5 * weight.norm())
        return cls(weight, zero, centers)

    def scale(
        self, read: Float[Tensor, "token d_model"], gave: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token"]:
        """The scale of each token, from what the norm read and what it gave."""
        shape, gave = self._shape(read), gave.float() - self.bias
        square = (shape * shape).sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        found: Tensor = (shape * gave).sum(dim=-1) / square
        return found

    def error(
        self, read: Float[Tensor, "token d_model"], gave: Float[Tensor, "token d_model"]
    ) -> float:
        """Largest relative deviation of any token from the map."""
        scale = self.scale(read, gave)
        mapped = self.linear(read, scale) + self.bias
        size = gave.float().norm(dim=-1).clamp_min(1e-12)
        return float(((mapped - gave.float()).norm(dim=-1) / size).max())

    def linear(
        self, vectors: Float[Tensor, "*token d_model"], scale: Float[Tensor, "*token"]
    ) -> Float[Tensor, "*token d_model"]:
        """What the norm makes of parts of the tokens that have these scales, without the bias."""
        mapped: Tensor = scale[..., None] * self._shape(vectors)
        return mapped

    def transposed(
        self, directions: Float[Tensor, "*token d_model"], scale: Float[Tensor, "*token"]
    ) -> Float[Tensor, "*token d_model"]:
        """Directions before the norm, so that `linear(v) . d == v . transposed(d)`."""
        weighted = self.weight * directions.float()
        if self.centers:
            weighted = weighted - weighted.mean(dim=-1, keepdim=True)
        back: Tensor = scale[..., None] * weighted
        return back

    def _shape(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        if self.centers:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        return self.weight * vectors
