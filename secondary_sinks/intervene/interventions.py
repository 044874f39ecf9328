"""An intervention says where one activation of one token is edited, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.sites import Site, missing_sites
from secondary_sinks.intervene.edits import Edit

EditSite = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "k", "v", "mlp_post"
]
SITES: tuple[str, ...] = get_args(EditSite)


@dataclass(frozen=True)
class Intervention:
    """One edit of one activation of one token."""

    site: EditSite
    """`resid_pre/mid/post`, `attn_out`, `mlp_out`: [d_model]; `z`, `k`, `v`: [head, d_head] (keys
    before the rotary embedding; key-value heads under grouped-query attention), or [d_head] with
    `head`; `mlp_post`: [d_mlp] (what the MLP's output matrix reads), or one `neuron` of it."""
    layer: int
    position: int
    edit: Edit
    head: int | None = None
    neuron: int | None = None

    @property
    def index(self) -> int | slice:
        """Which part of the token's activation is edited."""
        if self.head is not None:
            return self.head
        return slice(None) if self.neuron is None else slice(self.neuron, self.neuron + 1)


Row: TypeAlias = tuple[Intervention, ...]
"""Interventions on one token that happen together."""


def rows_of(interventions: Sequence[Intervention | Sequence[Intervention]]) -> list[Row]:
    """Each entry as a row: an intervention by itself, or several that happen together.

    Raises:
        InputError: no interventions, something else in their place, or a row over several tokens.
    """
    rows: list[Row] = []
    for number, entry in enumerate(interventions):
        row = (entry,) if isinstance(entry, Intervention) else tuple(entry)
        if not row or not all(isinstance(one, Intervention) for one in row):
            raise InputError(f"entry {number} is not an Intervention, nor several: {entry!r}")
        if len({one.position for one in row}) > 1:
            raise InputError(
                f"entry {number} edits tokens {sorted({one.position for one in row})}; a row is "
                "one token's trajectory, so edits of several tokens are several rows"
            )
        rows.append(tuple(sorted(row, key=lambda one: one.layer)))
    if not rows:
        raise InputError("no interventions")
    return rows


def check_rows(model: Any, rows: Sequence[Row], n_tokens: int) -> None:
    """Raise `InputError` for a layer, position, head or neuron out of range, `ModelError`'s cousin
    for a site that the model lacks."""
    info = describe(model)
    kv_heads = int(getattr(model.cfg, "n_key_value_heads", None) or info.n_heads)
    d_mlp = getattr(model.cfg, "d_mlp", None)
    limits = {"z": info.n_heads, "k": kv_heads, "v": kv_heads}
    for one in (one for row in rows for one in row):
        if one.site not in SITES:
            raise InputError(f"no site {one.site!r} to intervene at; there are {', '.join(SITES)}")
        _check_index("layer", one.layer, info.n_layers)
        _check_index("position", one.position, n_tokens)
        if one.head is not None:
            if one.site not in limits:
                raise InputError(f"site {one.site!r} has no heads; leave `head` out")
            _check_index("head", one.head, limits[one.site])
        if one.neuron is not None:
            if one.site != "mlp_post":
                raise InputError(f"site {one.site!r} has no neurons; leave `neuron` out")
            if d_mlp:
                _check_index("neuron", one.neuron, int(d_mlp))
    edited = {Site(one.site, one.layer) for row in rows for one in row}
    for site, layer in missing_sites(model, edited):
        raise InputError(f"{info.name!r} has no {site} in layer {layer}")


def apply_edit(one: Intervention, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
    """The token's activation after the edit.

    Args:
        one: the intervention.
        value: the token's activation, `[*shape]`.
        clean: all clean tokens', `[token, *shape]`.
        ordinary: which tokens are ordinary ones, `[token]`.
    """
    edited = value.clone()
    part = value[one.index]
    new = one.edit(part, clean[:, one.index], ordinary)
    if not isinstance(new, Tensor) or new.shape != part.shape:
        shape = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InputError(
            f"the edit {one.edit!r} returned {shape} for an activation {list(part.shape)}"
        )
    edited[one.index] = new.to(part.device, part.dtype)
    if not torch.isfinite(edited).all():
        raise InputError(f"the edit {one.edit!r} returned NaN or infinite values")
    return edited


def _check_index(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise InputError(f"{name} {value} is out of range: there are {limit}, counted from 0")
