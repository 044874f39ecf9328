"""What every engine returns for its rows, and the hooks that edit and measure them.

An engine decides where in the model's input a row stands (`Place`): behind the clean tokens of the
same sequence, in a copy of the text, or alone. Editing and measuring are the same for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.host.forward import Editor
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import ALONE
from secondary_sinks.intervene.interventions import Intervention, Row, apply_edit
from secondary_sinks.observe.residual_geometry import TokenGeometry

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

    @classmethod
    def joined(cls, parts: Sequence[RowStates]) -> RowStates:
        """The rows of all parts, in order."""
        names = vars(parts[0])
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def take(self, index: Int[Tensor, "row"]) -> RowStates:
        """The rows at `index`."""
        return RowStates(**{name: value[index] for name, value in vars(self).items()})

    def difference_from(self, oracle: RowStates) -> float:
        """Largest relative difference from the same rows as an oracle has them.

        Residuals are compared relative to the largest norm that they had up to that layer: what is
        left of a massive vector after it was erased has the rounding of the massive one.
        """
        size = oracle.norm.cummax(dim=1).values
        largest = oracle.direct_score.nan_to_num(0).max().clamp_min(1e-30)
        alignment = self.centered_alignment - oracle.centered_alignment
        differences = (
            (self.norm - oracle.norm) / size,
            alignment * oracle.centered_norm / size,
            (self.direct_score - oracle.direct_score) / largest,
        )
        oracles = (oracle.norm, oracle.centered_alignment, oracle.direct_score)
        # NaN is right where the oracle has it too: the last token of a text is never looked at.
        return max(
            float(change[~torch.isnan(right)].abs().nan_to_num(nan=float("inf")).max())
            for change, right in zip(differences, oracles, strict=True)
            if not torch.isnan(right).all()
        )


def clean_states(clean: CleanRun, positions: Sequence[int]) -> RowStates:
    """The clean tokens at some positions, as rows without an edit must be."""
    index = list(positions)
    geometry = {name: value[:, index].T for name, value in vars(clean.geometry).items()}
    return RowStates(**geometry, direct_score=clean.score[:, :, index].permute(2, 0, 1))


class RowMeter:
    """Measures each row's residual against the clean run, layer by layer.

    Args:
        clean: the clean run of the text.
        places: where each row stands.
        begin: the first layer of the pass; before it every row is its clean token.
    """

    def __init__(self, clean: CleanRun, places: Sequence[Place], *, begin: int = 0):
        self._clean = clean
        self._batch = torch.tensor([batch for batch, _ in places])
        self._index = torch.tensor([index for _, index in places])
        self._begin = begin
        self._layers: list[TokenGeometry] = []

    def editors(self) -> list[tuple[Site, Editor]]:
        """The functions that read the residual after every block of the pass."""
        layers = range(self._begin, self._clean.n_layers)
        return [(Site("resid_post", layer), self._reader(layer)) for layer in layers]

    def states(
        self, positions: Int[Tensor, "row"], direct_score: Float[Tensor, "row layer head"]
    ) -> RowStates:
        """What was measured, with the scores that came from elsewhere; rows are of the tokens at
        `positions`."""
        clean = vars(self._clean.geometry)
        measured = {
            name: torch.stack([getattr(layer, name) for layer in self._layers], dim=1)
            for name in clean
        }
        before = {name: value[: self._begin, positions].T for name, value in clean.items()}
        whole = {name: torch.cat([before[name], measured[name]], dim=1) for name in clean}
        return RowStates(**whole, direct_score=direct_score)

    def _reader(self, layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            residual = activation[self._batch, self._index].float().cpu()
            primary, common = self._clean.primary[layer], self._clean.common[layer]
            self._layers.append(TokenGeometry.of(residual, primary, common))

        return read


def edit_hooks(
    rows: Sequence[Row],
    places: Sequence[Place],
    clean: CleanRun,
    recorded: Mapping[Site, Tensor] | None = None,
) -> list[tuple[Site, Editor]]:
    """The functions that put every row's edits in its place.

    The clean activations that an edit may want are read from the same pass, in which the first
    tokens of batch row 0 are the clean text; or from `recorded` ([token, *shape] for each site in
    `looked_at`), if the pass holds no clean text.
    """
    n_tokens = len(clean.tokens)

    def clean_at(site: Site, activation: Tensor) -> Tensor:
        if recorded is None:
            return activation[0, :n_tokens]
        # Where nobody looks, nothing is recorded.
        return recorded.get(site, activation[0, :0])

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


def looked_at(rows: Iterable[Row]) -> set[Site]:
    """Sites of which edits look at other tokens' clean activations."""
    sites = {
        Site(one.site, one.layer) for row in rows for one in row if not isinstance(one.edit, ALONE)
    }
    for site in [site for site in sites if site.name == "resid_mid"]:
        # It is the sum of two others, through which it is edited.
        sites.remove(site)
        sites |= {Site("resid_pre", site.layer), Site("attn_out", site.layer)}
    return sites


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
        # In a divided model the block's input may lie on the device of the block before.
        residual = before.pop().to(activation.device)
        clean = clean_at(before_attention, residual).to(activation.device)
        clean = clean + clean_at(attention, activation)
        edited = activation.clone()
        for one, (batch, index) in edits:
            value = residual[batch, index] + edited[batch, index]
            edited[batch, index] += apply_edit(one, value, clean, ordinary) - value
        return edited

    return [(before_attention, remember), (attention, edit)]
