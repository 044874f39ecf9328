"""Edits: what an intervention puts in the place of an activation.

An edit is called with the value that it replaces, and with the clean activations of all tokens at
the same site and layer, and returns the new value. An edit of one's own is any such callable:

>>> def flip(value, clean, ordinary):
...     return -value
>>> Intervention("mlp_out", layer=5, position=3, edit=flip)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError


@runtime_checkable
class Edit(Protocol):
    """Anything that makes a new value of an old one."""

    def __call__(
        self,
        value: Float[Tensor, "*shape"],
        clean: Float[Tensor, "token *shape"],
        ordinary: Bool[Tensor, "token"],
    ) -> Float[Tensor, "*shape"]:
        """The new value.

        Args:
            value: the activation of the edited token at the site, after earlier edits of the row.
            clean: the activations of all tokens there, without any edit.
            ordinary: which tokens are ordinary ones (no sinks).
        """
        ...


@dataclass(frozen=True)
class Zero:
    """Nothing in its place: zero ablation."""

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(value)


@dataclass(frozen=True)
class Mean:
    """The mean over the ordinary tokens of the same text: mean ablation."""

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The mean."""
        return clean[ordinary.to(clean.device)].mean(dim=0)


@dataclass(frozen=True)
class Resample:
    """What another token of the same text has there: resample ablation, or a transplant."""

    position: int

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The other token's value."""
        return clean[self.position]


@dataclass(frozen=True)
class Scale:
    """The same, `alpha` times as long."""

    alpha: float

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The scaled value."""
        return self.alpha * value


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """Without its part along a direction (of any length)."""

    direction: Float[Tensor, "d_model"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The rest."""
        return value - _along(value, self.direction)


@dataclass(frozen=True, eq=False)
class KeepOnly:
    """Its part along a direction (of any length) alone."""

    direction: Float[Tensor, "d_model"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The part along the direction."""
        return _along(value, self.direction)


@dataclass(frozen=True, eq=False)
class Replace:
    """A given value in its place, for example from another text."""

    value: Float[Tensor, "*shape"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The given value."""
        return _fitting(self.value, value, "Replace")


@dataclass(frozen=True, eq=False)
class Add:
    """A given vector added to it: steering."""

    value: Float[Tensor, "*shape"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The sum."""
        return value + _fitting(self.value, value, "Add")


ALONE = (Zero, Scale, ProjectOut, KeepOnly, Replace, Add)
"""Edits that look at no other token: the clean text need not be kept for them."""


def _along(value: Tensor, direction: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(_fitting(direction, value, "the direction"), dim=-1)
    return (value * unit).sum(dim=-1, keepdim=True) * unit


def _fitting(given: Tensor, value: Tensor, name: str) -> Tensor:
    if given.shape != value.shape:
        raise InputError(f"{name} has shape {list(given.shape)}, the site's {list(value.shape)}")
    return given.to(value.device, value.dtype)
