"""Norms of the residual stream and its alignment with the first tokens of a text.

A large part of every residual can be the same for all tokens. It does not count as evidence of a
sink, so alignment and magnitude are measured a second time without it ("centered"). The *common
component* of a layer is the mean residual of its *background tokens*: those whose norm is at most
1.5 times the lower quartile of the layer's norms. It is the quartile and not the median, because in
a repetitive text most tokens can be sinks. Where so many are that the quartile itself is one, the
tokens that are *alike*, comparable in norm and direction with the largest of the first tokens and
apart from smaller ones, are left out before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.sites import FINAL_NORM
from secondary_sinks.observe.collectors import Collector, Run

ALIKE_NORM, ALIKE_COSINE, ALIKE_GAP = 0.2, 0.9, 3.0
"""A token is alike to another if its norm is at least this share of the other's, their cosine at
least this, and its norm at least so many times the median of those that are not alike."""
ALIKE_JUMP = 10.0
"""In one block an ordinary token does not grow that many times."""
MOST_ALIKE = 0.5
"""Share of alike tokens up to which the quartile alone tells the background tokens."""


@dataclass(frozen=True)
class Geometry:
    """Norms of all tokens' residuals, and alignments with every candidate for the primary sink.

    "Centered" values are those after subtracting the common component from every token.
    """

    candidates: tuple[int, ...]
    """Positions that may be the primary sink."""
    norm: Float[Tensor, " layer token"]
    """Residual norm."""
    centered_norm: Float[Tensor, " layer token"]
    """Residual norm without the common component."""
    alignment: Float[Tensor, " candidate layer token"]
    """Cosine of each token's residual with the candidate's."""
    centered_alignment: Float[Tensor, " candidate layer token"]
    """The same without the common component."""
    persistence: Float[Tensor, " candidate layer"]
    """Cosine of the candidate's centered residual with itself one layer earlier; NaN at layer 0."""
    residual: Float[Tensor, " candidate layer d_model"]
    """The candidate's residual."""
    common: Float[Tensor, " layer d_model"]
    """The common component."""
    background_norm: Float[Tensor, " layer"]
    """Median norm of the background tokens."""
    background_centered_norm: Float[Tensor, " layer"]
    """Their median norm without the common component."""
    share_alike: Float[Tensor, " layer"]
    """Share of tokens alike to one of the first, where they are the majority; elsewhere 0."""


class ResidualGeometry(Collector):
    """Norms and alignments of the residual stream. Result: `Geometry`.

    Args:
        candidates: positions that may be the primary sink; those beyond the text are omitted.
        final_norm: read the last layer after the final norm, as Hugging Face's `hidden_states` are
            (and so the published detector), and not `resid_post`.

    Raises:
        InputError: no candidates, a negative one, or all of them beyond the text.
    """

    def __init__(
        self,
        candidates: tuple[int, ...] = (0, 1, 2, 3),
        *,
        final_norm: bool = False,
        name: str | None = None,
    ):
        if not candidates or min(candidates) < 0:
            raise InputError(f"candidate positions are {candidates}; give at least one, from 0 on")
        self.candidates = tuple(candidates)
        self.final_norm = final_norm
        self.sites = ("resid_post", FINAL_NORM) if final_norm else ("resid_post",)
        self.name = name or "ResidualGeometry"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        candidates = tuple(position for position in self.candidates if position < run.n_tokens)
        if not candidates:
            raise InputError(
                f"candidate positions {self.candidates} lie beyond a text of {run.n_tokens} tokens"
            )
        n_layers, n_tokens, n_candidates = run.n_layers, run.n_tokens, len(candidates)
        self._before: Tensor | None = None
        self._size_before: float | None = None
        self._geometry = Geometry(
            candidates=candidates,
            norm=torch.zeros(n_layers, n_tokens),
            centered_norm=torch.zeros(n_layers, n_tokens),
            alignment=torch.zeros(n_candidates, n_layers, n_tokens),
            centered_alignment=torch.zeros(n_candidates, n_layers, n_tokens),
            persistence=torch.full((n_candidates, n_layers), torch.nan),
            residual=torch.zeros(n_candidates, n_layers, run.d_model),
            common=torch.zeros(n_layers, run.d_model),
            background_norm=torch.zeros(n_layers),
            background_centered_norm=torch.zeros(n_layers),
            share_alike=torch.zeros(n_layers),
        )

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Measure one layer's residuals [token, d_model]."""
        geometry = self._geometry
        last = len(geometry.norm) - 1
        if self.final_norm and site == "resid_post" and layer == last:
            return
        layer = last if layer is None else layer
        candidates = list(geometry.candidates)
        residual = activation.float()
        norm = torch.linalg.vector_norm(residual, dim=-1)
        near = _near(residual, norm, candidates)
        alike = _apart(norm, near)
        background = _background(norm, alike)
        geometry.share_alike[layer] = self._share_alike(norm, near, alike)
        common = mean_of(residual, background)
        centered = residual - common
        centered_norm = torch.linalg.vector_norm(centered, dim=-1)
        directions = centered[candidates]
        geometry.norm[layer] = norm.cpu()
        geometry.centered_norm[layer] = centered_norm.cpu()
        geometry.background_norm[layer] = norm[background].median().cpu()
        geometry.background_centered_norm[layer] = centered_norm[background].median().cpu()
        geometry.alignment[:, layer] = _cosines(residual, norm, residual[candidates]).cpu()
        geometry.centered_alignment[:, layer] = _cosines(centered, centered_norm, directions).cpu()
        geometry.residual[:, layer] = residual[candidates].cpu()
        geometry.common[layer] = common.cpu()
        if self._before is not None:
            before = self._before.to(directions.device)
            persistence = torch.cosine_similarity(before, directions, dim=-1)
            geometry.persistence[:, layer] = persistence.cpu()
        self._before = directions

    def result(self) -> Geometry:
        """Norms and alignments by layer."""
        return self._geometry

    def _share_alike(
        self,
        norm: Float[Tensor, " token"],
        near: Bool[Tensor, " token"],
        alike: Bool[Tensor, " token"],
    ) -> float:
        """Share of alike tokens, also where no smaller ones are left but all grew in one block."""
        size, before = float(norm.median()), self._size_before
        self._size_before = size
        share = float(near.float().mean())
        grew_at_once = before is not None and size >= ALIKE_JUMP * before
        return share if grew_at_once and share > MOST_ALIKE else float(alike.float().mean())


@dataclass(frozen=True)
class TokenGeometry:
    """Norms of residuals and their alignment with the primary's; "centered" is without the common
    component."""

    alignment: Float[Tensor, " *layer token"]
    """Cosine with the primary's residual."""
    centered_alignment: Float[Tensor, " *layer token"]
    norm: Float[Tensor, " *layer token"]
    centered_norm: Float[Tensor, " *layer token"]

    @classmethod
    def of(
        cls,
        residual: Float[Tensor, " *batch token d_model"],
        primary: Float[Tensor, " d_model"],
        common: Float[Tensor, " d_model"],
    ) -> TokenGeometry:
        """Measure the residuals of one layer."""
        centered = residual - common
        return cls(
            alignment=torch.cosine_similarity(residual, primary, dim=-1),
            centered_alignment=torch.cosine_similarity(centered, primary - common, dim=-1),
            norm=residual.norm(dim=-1),
            centered_norm=centered.norm(dim=-1),
        )


def background_tokens(residual: Float[Tensor, " token d_model"]) -> Bool[Tensor, " token"]:
    """Which tokens of a layer define its common component (see the module)."""
    return _background(residual.float().norm(dim=-1))


def mean_of(
    residual: Float[Tensor, " token d_model"], chosen: Bool[Tensor, " token"]
) -> Float[Tensor, " d_model"]:
    """Mean residual of the chosen tokens; for the background tokens this is the common component.

    Computed as a product, which does not copy the chosen residuals.
    """
    mean: Tensor = (chosen / chosen.sum()) @ residual.float()
    return mean


def _background(
    norm: Float[Tensor, " token"], alike: Bool[Tensor, " token"] | None = None
) -> Bool[Tensor, " token"]:
    others = norm if alike is None else norm[~alike]
    return norm <= 1.5 * others.quantile(0.25)


def _near(
    residual: Float[Tensor, " token d_model"], norm: Float[Tensor, " token"], candidates: list[int]
) -> Bool[Tensor, " token"]:
    """Tokens comparable in norm and direction with the largest of the candidates."""
    largest = residual[candidates][norm[candidates].argmax()]
    alignment = torch.cosine_similarity(residual, largest, dim=-1)
    return (norm >= ALIKE_NORM * norm[candidates].max()) & (alignment >= ALIKE_COSINE)


def _apart(norm: Float[Tensor, " token"], near: Bool[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Those of them that are left out of the background: most of the tokens, beyond a gap in norm.

    In many models all tokens point the same way, so a gap must set them apart.
    """
    is_apart = bool((~near).any()) and norm[near].min() >= ALIKE_GAP * norm[~near].median()
    return near if is_apart and near.float().mean() > MOST_ALIKE else torch.zeros_like(near)


def _cosines(
    vectors: Float[Tensor, " token d_model"],
    norms: Float[Tensor, " token"],
    directions: Float[Tensor, " candidate d_model"],
) -> Float[Tensor, " candidate token"]:
    unit = torch.nn.functional.normalize(directions, dim=-1)
    # In this order the tall factor is read contiguously, in half the time.
    cosines: Tensor = (vectors @ unit.T).T / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return cosines.clamp(-1, 1)
