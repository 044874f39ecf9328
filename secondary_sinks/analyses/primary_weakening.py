"""Does the primary sink weaken while secondary sinks live?

The attention of block l + 1 reads the residual after block l, so a secondary sink that is alive
after block l is *seen* in block l + 1, and the primary's sink score is taken there. One point is
one text at one such layer. The correlation of all points (`pooled`) is confounded: a score changes
with depth whether or not there are secondary sinks, which all begin and end in the same layers; and
it falls with the length of a text, while the number of secondary sinks grows. So there are three:

* **pooled**: all points. Confounded by depth and length; reported because it is often shown;
* **within layers**: ranks are taken in each layer, across texts. Free of depth, not of length;
* **adjusted**: the mean of each layer and of each text is subtracted from both quantities. What is
  left compares a text at layers with and without secondary sinks against what other texts do there.
  This is the one to quote, as far as an observation goes.

The number of secondary sinks is comparable between layers. Norm ratios are not: they shrink with
depth, because ordinary residuals grow, while keys are read after a norm. For them, look at the
correlation within layers.

Intervals resample texts, because the layers of one text are not independent samples. The causal
answer, from runs without the sinks (`SinkRemoval`), stands beside these where it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.analyses.remove_sinks import SinkRemoval
from secondary_sinks.errors import InputError
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.distinct_sinks import shared_beginnings
from secondary_sinks.sinks.selection import check_one_model
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.statistics import (
    Correlation,
    bootstrap_interval,
    grouped_interval,
    spearman,
)

if TYPE_CHECKING:
    import pandas as pd

Strength = Literal["number", "norm", "score"]

STRENGTHS: tuple[Strength, ...] = ("number", "norm", "score")


def primary_weakening(
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    removals: SinkRemoval | Sequence[SinkRemoval] = (),
    seed: int = 0,
) -> PrimaryWeakening:
    """Does the primary draw less attention in the layers and texts with more secondary sinks?

    The strength of the live secondary sinks is their number, the sum of their norm ratios, or the
    sum of their sink scores. Quote the `adjusted` correlation with their number, which leaves out
    the mean of each layer and text; the module `analyses.primary_weakening` says what is wrong with
    the others. The texts must differ in their secondary sinks and are best of one length.

    Not evidence for: that secondary sinks *take* the attention from the primary. Texts with more of
    them may differ in other ways; pass the results of `remove_sinks` for the causal answer. The
    correlation with their sink scores is partly arithmetic, since all the attention of a query adds
    up to 1.

    >>> sink_maps = ss.detect_sinks(model, texts)
    >>> removals = [ss.remove_sinks(model, sink_map) for sink_map in sink_maps[:3]]
    >>> ss.primary_weakening(sink_maps, removals=removals).summary()

    Args:
        sink_maps: maps of one or many texts of one model, from `detect_sinks`.
        removals: results of `remove_sinks` for secondary sinks of some of these texts.
        seed: of the resampling.

    Raises:
        InputError: no maps, maps of several models or without measurements, or removals in other
            texts or of other tokens than secondary sinks.
    """
    several = check_one_model(sink_maps)
    removals = [removals] if isinstance(removals, SinkRemoval) else list(removals)
    n_layers = several[0].norm.shape[0]  # type: ignore[union-attr]
    shape = (len(several), n_layers)
    strengths = {name: torch.zeros(shape) for name in STRENGTHS}
    primary, in_phase = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for text, sink_map in enumerate(several):
        score = sink_map.sink_score.mean(dim=1)  # type: ignore[union-attr]
        primary[text] = score[:, sink_map.primary_position]
        for start, end in sink_map.phases:
            in_phase[text, start + 1 : end + 1] = True
        for sink in sink_map.secondary:
            shown = [layer + 1 for layer in sink.layers if layer + 1 < n_layers]
            strengths["number"][text, shown] += 1
            ratios = sink.evidence.norm_ratio if sink.evidence else (math.nan,) * sink.lifetime
            strengths["norm"][text, shown] += torch.tensor(ratios)[: len(shown)]
            # The score of a sink with too few later queries is not known.
            strengths["score"][text, shown] += score[shown, sink.position].nan_to_num(0.0)
    in_phase &= ~torch.isnan(primary)
    relations = tuple(
        _relate(name, strengths[name], primary, in_phase, seed=seed) for name in STRENGTHS
    )
    return PrimaryWeakening(
        primary=primary,
        counted=in_phase,
        n_tokens=tuple(sink_map.n_tokens for sink_map in several),
        relations=relations,
        causal=_causal(removals, several, seed=seed) if removals else None,
        notes=_notes(several, strengths["number"], relations),
        provenance=several[0].provenance.extended(seed=seed),
        **strengths,
    )


@dataclass(frozen=True)
class Weakening:
    """The primary's sink score against one measure of the live secondary sinks."""

    strength: Strength
    pooled: Correlation
    within_layers: Correlation
    adjusted: Correlation
    """Pearson's, without the mean of each layer and text: the number to quote."""
    slope: float
    """Change of the primary's sink score for one more unit of strength, without the same means; NaN
    where the rest does not vary."""
    slope_low: float
    slope_high: float


@dataclass(frozen=True)
class CausalWeakening:
    """What removing the secondary sinks does to the primary, in the removals that were given."""

    change: Float[Tensor, " removal"]
    """Primary's sink score without the secondary sinks minus that with them, mean over heads and
    the layers that saw them. Positive: they weakened it."""
    control_change: Float[Tensor, " removal"]
    """The same of the control edits, mean over controls; NaN without."""
    per_sink: Float[Tensor, " removal"]
    """The change over the mean number of secondary sinks that those layers saw."""
    by_layer: Float[Tensor, " removal layer"]
    """The change at every layer."""
    mean: float
    low: float
    high: float
    """Mean of `change` with its 95 % bootstrap interval over removals; NaN for a single one."""


@dataclass(frozen=True)
class PrimaryWeakening(Result):
    """The primary's sink score against the live secondary sinks; see `primary_weakening`."""

    primary: Float[Tensor, " text layer"]
    """The primary's sink score, mean over heads."""
    number: Float[Tensor, " text layer"]
    """How many secondary sinks the attention of that layer sees."""
    norm: Float[Tensor, " text layer"]
    """Sum of their norm ratios."""
    score: Float[Tensor, " text layer"]
    """Sum of their sink scores in that layer."""
    counted: Bool[Tensor, " text layer"]
    """Layers that show a primary phase of the text: only these enter the numbers."""
    n_tokens: tuple[int, ...]
    relations: tuple[Weakening, ...]
    """By number, norm and score of the secondary sinks."""
    causal: CausalWeakening | None
    """None without removals."""
    notes: tuple[str, ...]
    provenance: Provenance

    def relation(self, strength: Strength = "number") -> Weakening:
        """The correlations with one measure of strength."""
        return next(relation for relation in self.relations if relation.strength == strength)

    def __repr__(self) -> str:
        removed = (
            f", removal changes it by {self.causal.mean:+.3f} in "
            f"{counted(len(self.causal.change), 'text')}"
            if self.causal
            else ""
        )
        return (
            f"PrimaryWeakening({self.provenance.model.name!r}, "
            f"{counted(len(self.primary), 'text')}: adjusted correlation with the number of live "
            f"secondary sinks {self.relation().adjusted.rho:.2f}{removed})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each text and layer."""
        import pandas as pd

        text, layer = torch.meshgrid(
            torch.arange(self.primary.shape[0]),
            torch.arange(self.primary.shape[1]),
            indexing="ij",
        )
        columns = {"text": text, "layer": layer, "primary": self.primary, "number": self.number}
        columns |= {"norm": self.norm, "score": self.score, "counted": self.counted}
        return pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})

    def summary(self) -> pd.DataFrame:
        """One row for each measure of strength, with all three correlations and the slope."""
        import pandas as pd

        rows = []
        for relation in self.relations:
            row: dict[str, Any] = {"strength": relation.strength}
            for name in ("pooled", "within_layers", "adjusted"):
                value = getattr(relation, name)
                row |= {name: value.rho, f"{name}_low": value.low, f"{name}_high": value.high}
            for name in ("slope", "slope_low", "slope_high"):
                row[name] = getattr(relation, name)
            rows.append(row)
        return pd.DataFrame(rows)

    def _notebook_frame(self) -> pd.DataFrame:
        return self.summary()


def _relate(
    name: Strength,
    strength: Float[Tensor, " text layer"],
    primary: Float[Tensor, " text layer"],
    in_phase: Bool[Tensor, " text layer"],
    *,
    seed: int,
) -> Weakening:
    text, layer = (index[in_phase].tolist() for index in _indices(in_phase))
    x, y = strength[in_phase], primary[in_phase]
    inner = [_without_means(table, in_phase) for table in (strength, primary)]

    def slope_of(index: Any) -> float:
        square = float(inner[0][index] @ inner[0][index])
        return float(inner[0][index] @ inner[1][index]) / square if square > 1e-12 else math.nan

    def correlation_of(index: Any) -> float:
        a, b = inner[0][index], inner[1][index]
        size = math.sqrt(float(a @ a) * float(b @ b))
        return float(a @ b) / size if size > 1e-12 else math.nan

    everything = np.arange(len(x))
    rho, slope = correlation_of(everything), slope_of(everything)
    low, high = grouped_interval(text, correlation_of, seed=seed)
    slope_low, slope_high = grouped_interval(text, slope_of, seed=seed)
    return Weakening(
        strength=name,
        pooled=spearman(x, y, text, seed=seed),
        within_layers=spearman(x, y, text, within=layer, seed=seed),
        adjusted=Correlation(rho, low, high),
        slope=slope,
        slope_low=slope_low,
        slope_high=slope_high,
    )


def _indices(in_phase: Bool[Tensor, " text layer"]) -> tuple[Tensor, ...]:
    axes = [torch.arange(size) for size in in_phase.shape]
    return torch.meshgrid(*axes, indexing="ij")


def _without_means(
    values: Float[Tensor, " text layer"], in_phase: Bool[Tensor, " text layer"]
) -> Any:
    """Values in a phase minus the mean of their text and layer (least squares, any gaps)."""
    wanted = values[in_phase].double().numpy()
    ends = [index[in_phase].numpy() for index in _indices(in_phase)]
    columns = [labels[:, None] == np.unique(labels)[None] for labels in ends]
    design = np.concatenate(columns, axis=1).astype(float)
    left = wanted - design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    # Rounding leaves small values where nothing is left; they must not count as variation.
    left[np.abs(left) < 1e-6 * float(np.abs(wanted).max(initial=0.0))] = 0.0
    return left


def remainders(weakening: PrimaryWeakening, strength: Strength) -> tuple[Any, Any]:
    """Strength and score of every counted point without the mean of its text and layer."""
    x = _without_means(getattr(weakening, strength), weakening.counted)
    return x, _without_means(weakening.primary, weakening.counted)


def _causal(
    removals: Sequence[SinkRemoval], sink_maps: Sequence[SinkMap], *, seed: int
) -> CausalWeakening:
    known = {(one.provenance.weights, one.token_strings) for one in sink_maps}
    changes, controls, per_sink, by_layer = [], [], [], []
    for removal in removals:
        if removal.reverse:
            raise InputError(f"{removal!r} adds sinks; pass removals made with reverse=False")
        if any(sink.kind != "secondary" for sink in removal.sinks):
            raise InputError(
                f"{removal!r} edits tokens that are not secondary sinks; pass removals made with "
                "sinks='secondary'"
            )
        if (removal.provenance.weights, removal.token_strings) not in known:
            raise InputError(
                f"{removal!r} is in another text or model than the maps; pass the map of its text "
                "as well"
            )
        n_live = sum(sink.lifetime for sink in removal.sinks) / max(1, len(removal.live_layers))
        changes.append(removal.primary_edited - removal.primary_clean)
        controls.append(float(removal.primary_control.mean()) - removal.primary_clean)
        per_sink.append(changes[-1] / n_live)
        by_layer.append(torch.tensor(removal.to_frame()["change"].to_numpy()))
    change = torch.tensor(changes)
    several = len(changes) > 1
    low, high = bootstrap_interval(change, seed=seed) if several else (math.nan, math.nan)
    return CausalWeakening(
        change=change,
        control_change=torch.tensor(controls),
        per_sink=torch.tensor(per_sink),
        by_layer=torch.stack(by_layer).float(),
        mean=float(change.mean()),
        low=low,
        high=high,
    )


def _notes(
    sink_maps: Sequence[SinkMap],
    number: Float[Tensor, " text layer"],
    relations: Sequence[Weakening],
) -> tuple[str, ...]:
    notes = []
    lengths = [sink_map.n_tokens for sink_map in sink_maps]
    if max(lengths) > 1.5 * min(lengths):
        notes.append(
            f"texts are {min(lengths)} to {max(lengths)} tokens long, and scores fall with length; "
            "cut them to one length with max_tokens"
        )
    if len(sink_maps) < 2:
        notes.append("one text cannot separate the effect of secondary sinks from depth: pass more")
    elif bool((number == number[:1]).all()):
        notes.append(
            "all texts have the same number of secondary sinks in every layer, so they differ only "
            "in the norms and scores of these"
        )
    n_shared = sum(
        bool(sink_map.secondary) and all(sink.position < n for sink in sink_map.secondary)
        for sink_map, n in zip(sink_maps, shared_beginnings(sink_maps), strict=True)
    )
    if n_shared:
        notes.append(
            f"all secondary sinks of {counted(n_shared, 'text')} (of {len(sink_maps)}) are in a "
            "beginning shared with an earlier text"
        )
    if all(math.isnan(relation.adjusted.rho) for relation in relations):
        notes.append("the secondary sinks of these texts do not differ: there is nothing to relate")
    return tuple(notes)
