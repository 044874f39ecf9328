"""An intervention says where one activation of one token is edited, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.host.mlp import shows_neurons
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.sites import Site, missing_sites, site_named, spell_site
from secondary_sinks.intervene.edits import PURE_EDITS, Edit, Resample, checked_index

EditSite = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "k", "v", "mlp_post"
]
SITES: tuple[str, ...] = get_args(EditSite)
"""Sites at which a token can be edited."""

_HEAD_SITES = ("z", "k", "v")
_REQUIRED: Any = None  # given by keyword after a hook name, which holds the layer


@dataclass(frozen=True)
class Intervention:
    """One edit of one activation of one token.

    >>> Intervention("mlp_out", layer=5, position=3, edit=Zero())
    >>> Intervention("blocks.5.hook_mlp_out", position=3, edit=Zero())  # the same
    >>> Intervention("z", layer=5, position=3, edit=Mean(), head=2)

    Raises:
        InputError: a site that does not exist or cannot be edited, a hook name of another layer
            than `layer`, an index that is not an integer from 0 on, or a head or neuron at a site
            without them. What depends on the model (number of layers, heads, tokens) is checked
            when it runs.
    """

    site: str
    """`resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`: [d_model]. `z`, `k`, `v`:
    [head, d_head] (keys before the rotary embedding; key-value heads under grouped-query
    attention), or [d_head] with `head`. `mlp_post`: [d_mlp] (what the MLP's output matrix reads;
    [d_model], and no neurons, in mixtures of experts), or one `neuron` of it. TransformerLens' name
    of a layer's hook is accepted and stored as one of these.

    `resid_mid` is the residual stream between attention and MLP: an edit reaches both the MLP and
    everything after it, as an edit at HookedTransformer's `hook_resid_mid` does. In a
    TransformerBridge the hook of that name is the input of the norm before the MLP, and an edit
    there reaches the MLP alone; so this one hook name is refused."""
    layer: int = _REQUIRED
    position: int = _REQUIRED
    edit: Edit = _REQUIRED
    head: int | None = None
    neuron: int | None = None

    def __post_init__(self) -> None:
        site = site_named(self.site)
        layer = self.layer if site.layer is None else site.layer
        if self.layer not in (None, layer):
            raise InputError(f"{self.site!r} is a hook of layer {layer}, but layer={self.layer}")
        if site.name not in SITES:
            raise InputError(
                f"site {self.site!r} cannot be edited; interventions are possible at "
                f"{', '.join(SITES)}"
            )
        if site.name == "resid_mid" and self.site != "resid_mid":
            raise InputError(
                f"{self.site!r} is not the same place in every model: in a TransformerBridge an "
                "edit there reaches the MLP alone, in a HookedTransformer also the residual stream;"
                f' write site="resid_mid", layer={layer} to edit the residual stream'
            )
        if self.head is not None and site.name not in _HEAD_SITES:
            raise InputError(f"site {site.name!r} has no heads; leave `head` out")
        if self.neuron is not None and site.name != "mlp_post":
            raise InputError(f"site {site.name!r} has no neurons; leave `neuron` out")
        if not callable(self.edit) or isinstance(self.edit, type):
            raise InputError(
                f"edit must be a function or an object such as Zero(), got {self.edit!r}"
            )
        object.__setattr__(self, "site", site.name)
        for name, index in (("layer", layer), ("position", self.position)):
            object.__setattr__(self, name, checked_index(name, index))
        for name in ("head", "neuron"):
            if (index := getattr(self, name)) is not None:
                object.__setattr__(self, name, checked_index(name, index))

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
        row = tuple(entry) if isinstance(entry, Sequence) else (entry,)
        if not row or not all(isinstance(item, Intervention) for item in row):
            raise InputError(
                f"entry {number} must be an Intervention or a sequence of them, got {entry!r}"
            )
        positions = sorted({intervention.position for intervention in row})
        if len(positions) > 1:
            raise InputError(
                f"entry {number} edits tokens {positions}; a row is the trajectory of one token, "
                "so write edits of several tokens as several rows"
            )
        rows.append(tuple(sorted(row, key=lambda intervention: intervention.layer)))
    if not rows:
        raise InputError("no interventions")
    return rows


def check_rows(model: Any, rows: Sequence[Row], n_tokens: int) -> None:
    """Check that rows fit the model and the text.

    Raises:
        InputError: a layer, position, head or neuron out of range, a site that the model lacks, or
            a neuron of a mixture of experts.
        ModelError: an edit at `resid_mid` of a model whose residual stream is not a sum.
    """
    info = describe(model)
    n_kv_heads = getattr(model.cfg, "n_key_value_heads", None) or info.n_heads
    n_heads = {"z": info.n_heads, "k": n_kv_heads, "v": n_kv_heads}
    d_mlp = getattr(model.cfg, "d_mlp", None)
    for intervention in (intervention for row in rows for intervention in row):
        _check_range("layer", intervention.layer, info.n_layers)
        _check_range("position", intervention.position, n_tokens)
        if isinstance(intervention.edit, Resample):
            _check_range("Resample's position", intervention.edit.position, n_tokens)
        if intervention.head is not None:
            _check_range("head", intervention.head, n_heads[intervention.site])
        if intervention.neuron is not None and d_mlp:
            _check_range("neuron", intervention.neuron, int(d_mlp))
        if intervention.site == "resid_mid":
            check_residual_identity(model)
    for site in missing_sites(model, sorted(sites_of(rows))):
        raise InputError(f"{info.name!r} has no {spell_site(site)}")
    for layer in {item.layer for row in rows for item in row if item.neuron is not None}:
        if not shows_neurons(model, layer):
            raise InputError(
                f"the MLP of layer {layer} of {info.name!r} is a mixture of experts: its mlp_post "
                "has residual dimensions and not neurons. Leave `neuron` out, or edit mlp_out"
            )


def sites_of(rows: Iterable[Sequence[Intervention]]) -> set[Site]:
    """The sites that rows edit."""
    return {Site(intervention.site, intervention.layer) for row in rows for intervention in row}


def apply_edit(
    intervention: Intervention, value: Tensor, clean: Tensor, ordinary: Tensor
) -> Tensor:
    """The token's activation after the edit; no argument is changed, whatever the edit does.

    Args:
        intervention: what to do.
        value: the token's activation, `[*shape]`.
        clean: that of all tokens without edits, `[token, *shape]`.
        ordinary: which tokens are ordinary, `[token]`.

    Raises:
        InputError: the edit returns another shape, or NaN or infinite values, or the layer has
            fewer heads.
    """
    edit = intervention.edit
    if intervention.head is not None:  # layers can differ in their numbers of key-value heads
        _check_range("head", intervention.head, len(value))
    part, clean_part = value[intervention.index], clean[:, intervention.index]
    if type(edit) not in PURE_EDITS:
        part, clean_part, ordinary = part.clone(), clean_part.clone(), ordinary.clone()
    new = edit(part, clean_part, ordinary)
    if not isinstance(new, Tensor) or new.shape != part.shape:
        result = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InputError(
            f"the edit {edit!r} returned {result}, the activation is {list(part.shape)}"
        )
    edited = value.clone()
    edited[intervention.index] = new.to(part.device, part.dtype)
    if not torch.isfinite(edited).all():
        raise InputError(f"{edit!r} returned NaN or infinite values")
    return edited


def _check_range(name: str, value: int, limit: int | None) -> None:
    if limit is not None and value >= limit:
        raise InputError(f"{name} {value} is out of range: there are {limit}, counted from 0")
