"""Edits: what an intervention puts in the place of an activation.

An edit is any callable that takes the activation of the edited token, the clean activations of all
tokens at the same site and layer, and which tokens are ordinary, and returns the new activation:

>>> def flip(value, clean, ordinary):
...     return -value
>>> Intervention("mlp_out", layer=5, position=3, edit=flip)

A function gets copies, so it may write into its arguments; only what it returns has an effect.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError


@runtime_checkable
class Edit(Protocol):
    """Computes the new activation of a token."""

    def __call__(
        self,
        value: Float[Tensor, " *shape"],
        clean: Float[Tensor, " token *shape"],
        ordinary: Bool[Tensor, " token"],
    ) -> Float[Tensor, " *shape"]:
        """Return the new activation.

        Args:
            value: the token's activation at the site, after earlier edits of the same row.
            clean: the activations of all tokens there, without any edit.
            ordinary: which tokens are ordinary (`sinks.controls.ordinary_tokens`).
        """
        ...


@dataclass(frozen=True)
class Zero:
    """Zero ablation: replace the activation with zeros."""

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(value)


@dataclass(frozen=True)
class Mean:
    """Mean ablation: replace the activation with the mean over the text's ordinary tokens."""

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the mean."""
        return clean[ordinary.to(clean.device)].mean(dim=0)


@dataclass(frozen=True)
class Resample:
    """Resample ablation, or a transplant: replace the activation with that of another token of the
    same text.

    Raises:
        InputError: the position is not an integer from 0 on.
    """

    position: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", checked_index("Resample's position", self.position))

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the other token's activation."""
        return clean[self.position]


@dataclass(frozen=True)
class Scale:
    """Multiply the activation by `alpha`."""

    alpha: float

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the scaled activation."""
        return self.alpha * value


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """Remove the part of the activation along a direction (of any length)."""

    direction: Float[Tensor, " d_model"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the rest."""
        return value - _along(value, self.direction)


@dataclass(frozen=True, eq=False)
class KeepOnly:
    """Keep only the part of the activation along a direction (of any length)."""

    direction: Float[Tensor, " d_model"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the part along the direction."""
        return _along(value, self.direction)


@dataclass(frozen=True, eq=False)
class Replace:
    """Replace the activation with a given value, for example from another text."""

    value: Float[Tensor, " *shape"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the given value."""
        return _fitting(self.value, value, "Replace")


@dataclass(frozen=True, eq=False)
class Add:
    """Steering: add a given vector to the activation."""

    value: Float[Tensor, " *shape"]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """Return the sum."""
        return value + _fitting(self.value, value, "Add")


LOCAL_EDITS = (Zero, Scale, ProjectOut, KeepOnly, Replace, Add)
"""Edits that use no other token's activation: the clean text need not be stored for them."""

PURE_EDITS = (*LOCAL_EDITS, Mean, Resample)
"""Edits that never write into their arguments and can do without copies."""


def checked_index(name: str, value: int | None) -> int:
    """Return `value` as an int.

    Raises:
        InputError: not an integer from 0 on.
    """
    try:
        index = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    if index < 0:
        raise InputError(f"{name} must be an integer from 0 on, got {value!r}")
    return index


def _along(value: Tensor, direction: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(_fitting(direction, value, "the direction"), dim=-1)
    return (value * unit).sum(dim=-1, keepdim=True) * unit


def _fitting(given: Tensor, value: Tensor, name: str) -> Tensor:
    if given.shape != value.shape:
        raise InputError(f"{name} has shape {list(given.shape)}, the site's {list(value.shape)}")
    return given.to(value.device, value.dtype)
