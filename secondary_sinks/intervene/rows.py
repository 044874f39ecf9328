"""What every engine returns for its rows, and the hooks that edit and measure them.

An engine decides where in the model's input a row stands (`Place`): behind the clean tokens of the
same sequence, in a copy of the text, or alone. Editing and measuring are the same for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.intervene.clean import CleanRun
from secondary_sinks.intervene.interventions import Intervention, Row, apply_edit
from secondary_sinks.models.host import Editor, Site

Place = tuple[int, int]
"""Batch row and sequence index at which a row's token stands."""


@dataclass(frozen=True)
class RowStates:
    """Trajectories of the edited tokens, before anything is judged."""

    alignment: Float[Tensor, "row layer"]
    centered_alignment: Float[Tensor, "row layer"]
    norm: Float[Tensor, "row layer"]
    centered_norm: Float[Tensor, "row layer"]
    direct_score: Float[Tensor, "row layer head"]
    """Mean attention of the clean later queries to the row's key; NaN for the last token."""


class RowMeter:
    """Measures each row's residual against the clean run, layer by layer."""

    def __init__(self, clean: CleanRun, places: Sequence[Place]):
        n_layers = clean.primary.shape[0]
        shape = (len(places), n_layers)
        self._clean = clean
        self._batch = torch.tensor([batch for batch, _ in places])
        self._index = torch.tensor([index for _, index in places])
        self.alignment = torch.zeros(shape)
        self.centered_alignment = torch.zeros(shape)
        self.norm = torch.zeros(shape)
        self.centered_norm = torch.zeros(shape)

    def editors(self) -> list[tuple[Site, Editor]]:
        """The functions that read the residual after every block."""
        return [
            (Site("resid_post", layer), self._reader(layer)) for layer in range(self.norm.shape[1])
        ]

    def _reader(self, layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            residual = activation[self._batch, self._index].float().cpu()
            primary, common = self._clean.primary[layer], self._clean.common[layer]
            centered = residual - common
            self.norm[:, layer] = residual.norm(dim=-1)
            self.centered_norm[:, layer] = centered.norm(dim=-1)
            self.alignment[:, layer] = torch.cosine_similarity(residual, primary, dim=-1)
            self.centered_alignment[:, layer] = torch.cosine_similarity(
                centered, primary - common, dim=-1
            )

        return read


def edit_hooks(
    rows: Sequence[Row],
    places: Sequence[Place],
    clean: CleanRun,
    recorded: Mapping[Site, Tensor] | None = None,
) -> list[tuple[Site, Editor]]:
    """The functions that put every row's edits in its place.

    The clean activations that an edit may want are read from the same pass, in which the first
    tokens of batch row 0 are the clean text; or from `recorded` ([token, *shape] for each edited
    site, and for `resid_pre` and `attn_out` where `resid_mid` is edited), if the pass holds no
    clean text.
    """
    n_tokens = len(clean.tokens)

    def clean_at(site: Site, activation: Tensor) -> Tensor:
        return activation[0, :n_tokens] if recorded is None else recorded[site]

    at: dict[Site, list[tuple[Intervention, Place]]] = defaultdict(list)
    for row, place in zip(rows, places, strict=True):
        for one in row:
            at[Site(one.site, one.layer)].append((one, place))
    hooks: list[tuple[Site, Editor]] = []
    # Within a layer in the order of computation, so that `resid_mid` sees an edited `attn_out`.
    for site, edits in at.items():
        if site.name != "resid_mid":
            hooks.append((site, _editor(site, edits, clean_at, clean.ordinary)))
    for site, edits in at.items():
        if site.name == "resid_mid":
            hooks.extend(_resid_mid_editors(site, edits, clean_at, clean.ordinary))
    return hooks


_CleanAt = Callable[[Site, Tensor], Tensor]


def _editor(
    site: Site, edits: list[tuple[Intervention, Place]], clean_at: _CleanAt, ordinary: Tensor
) -> Editor:
    def edit(activation: Tensor) -> Tensor:
        clean = clean_at(site, activation)
        edited = activation.clone()
        for one, (batch, index) in edits:
            edited[batch, index] = apply_edit(one, edited[batch, index], clean, ordinary)
        return edited

    return edit


def _resid_mid_editors(
    site: Site, edits: list[tuple[Intervention, Place]], clean_at: _CleanAt, ordinary: Tensor
) -> list[tuple[Site, Editor]]:
    """`resid_mid` is edited through `attn_out`.

    In the bridge the hook of that name is the input of the second norm, so an edit there would
    reach the MLP and not the residual stream. Adding the change to the attention's output reaches
    both.
    """
    before_attention, attention = Site("resid_pre", site.layer), Site("attn_out", site.layer)
    before: list[Tensor] = []

    def remember(activation: Tensor) -> None:
        before.append(activation)

    def edit(activation: Tensor) -> Tensor:
        residual = before.pop()
        clean = clean_at(before_attention, residual) + clean_at(attention, activation)
        edited = activation.clone()
        for one, (batch, index) in edits:
            value = residual[batch, index] + edited[batch, index]
            edited[batch, index] += apply_edit(one, value, clean, ordinary) - value
        return edited

    return [(before_attention, remember), (attention, edit)]
