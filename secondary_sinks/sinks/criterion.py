"""The default criterion: a sink is aligned, large, and draws attention.

A token is a sink after block l if three things hold at the same time:

* *alignment*: its residual points where the primary sink's does. Both are taken without the layer's
  common component, so that a direction shared by all tokens does not count as evidence of a sink;
* *magnitude*: its norm without the common component is larger than the median background token's;
* *attention*: over its life, later tokens attend to it much more than to ordinary tokens nearby, in
  the heads that read the primary, and enough that it matters among all heads
  (`sinks.attention_baseline`).

A life has at least two layers: on the way to a phase many tokens lean towards the primary for one.

All of it happens inside a *primary phase*: a run of layers in which the primary token is massive,
keeps its direction from one layer to the next, and itself draws attention. A model may have several
phases, with different directions.

`Criterion` holds everything that a judgment needs: thresholds, phases, and the baselines of the
text. The same object judges the whole text and any counterfactual row, so a row without an edit has
exactly the life of its token. `sinks.primary` chooses the primary, finds its phases, and builds it.

Not evidence for: that the sink matters for the output, or which module wrote it. Those are
questions for an intervention.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.sinks.attention_baseline import AttentionBaseline

DEFAULTS: dict[str, float | int] = {
    "min_alignment": 0.9,
    "min_norm_ratio": 1.5,
    "min_attention_ratio": 7.0,
    "min_strength": 0.35,
    "min_lifetime": 2,
    "min_primary_ratio": 3.0,
    "min_queries": 8,
}
"""Thresholds of the criterion.

* `min_alignment`: the paper's 0.9, here without the common component. It asks that the vector
  written along the sink direction be about twice as long as everything else the token has.
* `min_norm_ratio`: norm over the median background token's, both without the common component.
* `min_attention_ratio`: attention drawn over that of ordinary tokens nearby. Ordinary tokens of
  three models scatter around 1.3, one in a hundred of them above 5 to 7; sinks begin at 13.
* `min_strength`: attention drawn, in a unit that does not depend on the length of the text. See
  `experiments/detection.py` for the sinks and other tokens of three models.
* `min_lifetime`: number of layers.
* `min_primary_ratio`: norm ratio from which the primary token counts as massive.
* `min_queries`: tokens with fewer later queries do not count in the attention baseline and have no
  sink score of their own.
"""


@dataclass(frozen=True)
class Criterion:
    """The evidence criterion, ready to judge residuals and scores of one text.

    An *item* is a token of the text, or a counterfactual row in the place of one.
    """

    thresholds: dict[str, float | int]
    """All of `DEFAULTS`."""
    phases: tuple[tuple[int, int], ...]
    """Primary phases: runs [start, end) of layers."""
    background_norm: Float[Tensor, " layer"]
    """Median norm of the background tokens without the common component."""
    baseline: AttentionBaseline

    def lives(
        self,
        centered_alignment: Float[Tensor, " layer item"],
        centered_norm: Float[Tensor, " layer item"],
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> list[list[tuple[int, ...]]]:
        """The lives of each item: runs of layers after which it is a sink, in order.

        Args:
            centered_alignment: cosine with the primary's residual, without the common component.
            centered_norm: norm without the common component.
            score: mean attention from later queries; NaN in layers where it was not measured,
                which then say nothing.
            positions: where each item stands; by default item t is token t.
        """
        return self.judge(centered_alignment, centered_norm, score, positions)[0]

    def judge(
        self,
        centered_alignment: Float[Tensor, " layer item"],
        centered_norm: Float[Tensor, " layer item"],
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> tuple[list[list[tuple[int, ...]]], list[list[tuple[int, ...]]]]:
        """The lives of each item, and what would be lives if a later token existed that could
        attend to it; the arguments are those of `lives`."""
        aligned = is_aligned(
            centered_alignment, centered_norm, self.background_norm, self.thresholds
        )
        has_attention = self.baseline.has_attention
        ratio = next_layer(self.baseline.ratio(score, positions), has_attention)
        strength = next_layer(self.baseline.strength(score, positions), has_attention)
        lives: list[list[tuple[int, ...]]] = []
        undecided: list[list[tuple[int, ...]]] = []
        for item in range(score.shape[2]):
            possible = [
                life
                for start, end in self.phases
                for life in runs(aligned[start:end, item], offset=start)
                if len(life) >= self.thresholds["min_lifetime"]
            ]
            lives.append([life for life in possible if self._draws(ratio, strength, life, item)])
            unseen = bool(torch.isnan(ratio[:, item]).all())
            undecided.append(possible if unseen else [])
        return lives, undecided

    def _draws(
        self,
        ratio: Float[Tensor, " layer item"],
        strength: Float[Tensor, " layer item"],
        life: tuple[int, ...],
        item: int,
    ) -> bool:
        """The test of attention, over a whole life."""
        rows = list(life)
        return bool(
            ratio[rows, item].nanmean() >= self.thresholds["min_attention_ratio"]
            and strength[rows, item].nanmean() >= self.thresholds["min_strength"]
        )

    def is_sink(
        self,
        centered_alignment: Float[Tensor, " layer item"],
        centered_norm: Float[Tensor, " layer item"],
        score: Float[Tensor, " layer head item"],
        positions: Int[Tensor, " item"] | None = None,
    ) -> Bool[Tensor, " item layer"]:
        """After which blocks each item is a sink; the arguments are those of `lives`."""
        alive = torch.zeros(centered_norm.shape[::-1], dtype=torch.bool)
        judged = self.lives(centered_alignment, centered_norm, score, positions)
        for item, lives_of_item in enumerate(judged):
            for life in lives_of_item:
                alive[item, list(life)] = True
        return alive


def check_thresholds(thresholds: dict[str, float | int]) -> dict[str, float | int]:
    """Defaults with the given thresholds in their place.

    Raises:
        InputError: an unknown threshold or one out of range.
    """
    unknown = set(thresholds) - set(DEFAULTS)
    if unknown:
        raise InputError(f"no threshold {sorted(unknown)[0]!r}; use {', '.join(DEFAULTS)}")
    merged = DEFAULTS | thresholds
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in merged.values()):
        raise InputError(f"thresholds must be numbers, got {thresholds}")
    merged = {name: float(value) for name, value in merged.items()}
    for name in ("min_queries", "min_lifetime"):
        if not math.isfinite(merged[name]) or merged[name] != int(merged[name]):
            raise InputError(f"{name} must be an integer, got {merged[name]}")
        merged[name] = int(merged[name])
    for name, least in (
        ("min_norm_ratio", 0.0),
        ("min_attention_ratio", 0.0),
        ("min_strength", 0.0),
        ("min_lifetime", 1),
        ("min_primary_ratio", 1.0),
        ("min_queries", 1),
    ):
        if not merged[name] >= least or math.isinf(merged[name]):
            raise InputError(f"{name} must be a number from {least:g} up, got {merged[name]}")
    if not 0 < merged["min_alignment"] < 1:
        raise InputError(
            f"min_alignment must be a cosine between 0 and 1, got {merged['min_alignment']}"
        )
    return merged


def runs(alive: Bool[Tensor, " layer"], *, offset: int = 0) -> list[tuple[int, ...]]:
    """Unbroken runs of layers; a single missing layer between two of them is bridged.

    Bridging keeps a sink on the border of a threshold from falling to pieces.
    """
    layers = (alive.nonzero().flatten() + offset).tolist()
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer - runs[-1][-1] <= 2:
            runs[-1].extend(range(runs[-1][-1] + 1, layer + 1))
        else:
            runs.append([layer])
    return [tuple(run) for run in runs]


def is_aligned(
    centered_alignment: Float[Tensor, " layer item"],
    centered_norm: Float[Tensor, " layer item"],
    background_norm: Float[Tensor, " layer"],
    thresholds: dict[str, float | int],
) -> Bool[Tensor, " layer item"]:
    """Where the tests of alignment and magnitude pass."""
    return (centered_alignment >= thresholds["min_alignment"]) & (
        norm_ratio(centered_norm, background_norm) >= thresholds["min_norm_ratio"]
    )


def norm_ratio(
    norm: Float[Tensor, " layer *item"], background: Float[Tensor, " layer"]
) -> Float[Tensor, " layer *item"]:
    """Norms over the median background token's."""
    per_layer = background.clamp_min(torch.finfo(torch.float32).tiny)
    return norm / per_layer.reshape(-1, *[1] * (norm.ndim - 1))


def life_mean(
    values: Float[Tensor, " layer"],
    life: range | tuple[int, ...],
    has_attention: Bool[Tensor, " layer"] | None = None,
) -> float:
    """Mean over a life of what the next block with attention shows; NaN if no block shows it."""
    return float(next_layer(values, has_attention)[list(life)].nanmean()) if life else math.nan


def next_layer(
    values: Float[Tensor, " layer *token"], has_attention: Bool[Tensor, " layer"] | None = None
) -> Float[Tensor, " layer *token"]:
    """Row l holds what the next block with attention shows; NaN where there is none.

    That is block l + 1, unless some blocks of the model have no attention.
    """
    shown = torch.full_like(values, torch.nan)
    for layer in range(len(values) - 2, -1, -1):
        is_next = has_attention is None or bool(has_attention[layer + 1])
        shown[layer] = values[layer + 1] if is_next else shown[layer + 1]
    return shown
