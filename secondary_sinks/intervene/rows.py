"""What every engine returns for its rows, and the hooks that edit and measure them.

An engine decides where in the model's input a row is (`Place`): behind the clean tokens of the same
sequence, in a copy of the text, or alone. Editing and measuring are the same for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.host.forward import Editor
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import LOCAL_EDITS
from secondary_sinks.intervene.interventions import Intervention, Row, apply_edit
from secondary_sinks.observe.residual_geometry import TokenGeometry
from secondary_sinks.sinks.criterion import Criterion

Place = tuple[int, int]
"""Batch row and sequence index of a row's token."""


@dataclass(frozen=True)
class RowStates:
    """Trajectories of the edited tokens, before anything is judged."""

    alignment: Float[Tensor, " row layer"]
    centered_alignment: Float[Tensor, " row layer"]
    norm: Float[Tensor, " row layer"]
    centered_norm: Float[Tensor, " row layer"]
    direct_score: Float[Tensor, " row layer head"]
    """Mean attention to the row's key of the clean later queries that see its token; NaN where none
    does, as for the last token."""

    @classmethod
    def joined(cls, parts: Sequence[RowStates]) -> RowStates:
        """The rows of all parts, in order."""
        names = vars(parts[0])
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def is_sink(
        self, judge: Criterion, positions: Int[Tensor, " row"]
    ) -> Bool[Tensor, " row layer"]:
        """After which blocks each row is a sink; `positions` are those of their tokens."""
        score = rearrange(self.direct_score, "row layer head -> layer head row")
        return judge.is_sink(self.centered_alignment.T, self.centered_norm.T, score, positions)

    def take(self, index: Int[Tensor, " row"]) -> RowStates:
        """The rows at `index`."""
        return RowStates(**{name: value[index] for name, value in vars(self).items()})

    def difference_from(self, expected: RowStates) -> float:
        """Largest relative difference from the same rows as another engine has them.

        Residuals are compared relative to the largest norm that they had up to that layer: what is
        left of a massive vector after it was erased has the rounding of the massive one.
        """
        size = expected.norm.cummax(dim=1).values
        largest = expected.direct_score.nan_to_num(0).max().clamp_min(1e-30)
        alignment = self.centered_alignment - expected.centered_alignment
        differences = (
            (self.norm - expected.norm) / size,
            alignment * expected.centered_norm / size,
            (self.direct_score - expected.direct_score) / largest,
        )
        compared_with = (expected.norm, expected.centered_alignment, expected.direct_score)
        # NaN is right where it is expected: no query sees the last token of a text.
        return max(
            float(change[~torch.isnan(right)].abs().nan_to_num(nan=float("inf")).max())
            for change, right in zip(differences, compared_with, strict=True)
            if not torch.isnan(right).all()
        )


def clean_states(clean: CleanRun, positions: Sequence[int]) -> RowStates:
    """The clean tokens at some positions, which rows without an edit must equal."""
    index = list(positions)
    geometry = {name: value[:, index].T for name, value in vars(clean.geometry).items()}
    score = rearrange(clean.score[:, :, index], "layer head row -> row layer head")
    return RowStates(**geometry, direct_score=score)


def clean_scores(
    clean: CleanRun, positions: Int[Tensor, " row"], begin: int
) -> Float[Tensor, " row layer head"]:
    """Direct scores of rows before their pass, which begins at layer `begin`: those of the clean
    tokens; NaN from there on."""
    n_layers, n_heads = clean.score.shape[:2]
    score = torch.full((len(positions), n_layers, n_heads), torch.nan)
    before = clean.score[:begin, :, positions]
    score[:, :begin] = rearrange(before, "layer head row -> row layer head")
    return score


class RowMeter:
    """Measures each row's residual against the clean run, layer by layer.

    Args:
        clean: the clean run of the text.
        places: where each row is.
        begin: the first layer of the pass; before it every row equals its clean token.
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
        self, positions: Int[Tensor, " row"], direct_score: Float[Tensor, " row layer head"]
    ) -> RowStates:
        """What was measured of rows of the tokens at `positions`, with their direct scores."""
        whole = {}
        for name, clean in vars(self._clean.geometry).items():
            measured = torch.stack([getattr(layer, name) for layer in self._layers], dim=1)
            whole[name] = torch.cat([clean[: self._begin, positions].T, measured], dim=1)
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
    """The functions that apply every row's edits at its place.

    The clean activations that edits may use are read from the same pass, in which the first tokens
    of batch row 0 are the clean text; or from `recorded` ([token, *shape] for each site of
    `sites_of_other_tokens`), if the pass holds no clean text.
    """
    n_tokens = len(clean.tokens)

    def clean_at(site: Site, activation: Tensor) -> Tensor:
        if recorded is None:
            return activation[0, :n_tokens]
        # Nothing is recorded where no edit uses it.
        return recorded.get(site, activation[0, :0])

    edits_at: dict[Site, list[tuple[Intervention, Place]]] = defaultdict(list)
    for row, place in zip(rows, places, strict=True):
        for intervention in row:
            edits_at[Site(intervention.site, intervention.layer)].append((intervention, place))
    hooks: list[tuple[Site, Editor]] = []
    # `resid_mid` comes last, so that it sees an edited `attn_out` of its layer.
    for site in sorted(edits_at, key=lambda site: site.name == "resid_mid"):
        editors = _resid_mid_editors if site.name == "resid_mid" else _editors
        hooks.extend(editors(site, edits_at[site], clean_at, clean.ordinary))
    return hooks


def sites_of_other_tokens(rows: Iterable[Row]) -> set[Site]:
    """Sites at which edits use other tokens' clean activations."""
    sites = {
        Site(intervention.site, intervention.layer)
        for row in rows
        for intervention in row
        if type(intervention.edit) not in LOCAL_EDITS
    }
    for site in [site for site in sites if site.name == "resid_mid"]:
        # It is the sum of two others, through which it is edited.
        sites.remove(site)
        sites |= {Site("resid_pre", site.layer), Site("attn_out", site.layer)}
    return sites


_Edits = list[tuple[Intervention, Place]]
_CleanAt = Callable[[Site, Tensor], Tensor]


def _editors(
    site: Site, edits: _Edits, clean_at: _CleanAt, ordinary: Tensor
) -> list[tuple[Site, Editor]]:
    def edit(activation: Tensor) -> Tensor:
        clean = clean_at(site, activation)
        edited = activation.clone()
        for intervention, place in edits:
            edited[place] = apply_edit(intervention, edited[place], clean, ordinary)
        return edited

    return [(site, edit)]


def _resid_mid_editors(
    site: Site, edits: _Edits, clean_at: _CleanAt, ordinary: Tensor
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
        # In a divided model the block's input may be on the device of the block before.
        residual = before.pop().to(activation.device)
        clean = clean_at(before_attention, residual).to(activation.device)
        clean = clean + clean_at(attention, activation)
        edited = activation.clone()
        for intervention, place in edits:
            value = residual[place] + edited[place]
            edited[place] += apply_edit(intervention, value, clean, ordinary) - value
        return edited

    return [(before_attention, remember), (attention, edit)]
