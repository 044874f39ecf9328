"""Does the primary sink weaken while secondary sinks live?

The attention of block l + 1 reads the residual after block l, so a secondary sink that is alive
after block l is *seen* in block l + 1, and the primary's sink score is taken there. One point is
one text at one such layer. What goes wrong with the obvious number, the correlation of all points
(`pooled`): a score changes with depth, whether or not there are secondary sinks, which all begin
and end in the same layers; and it falls with the length of a text, while the number of secondary
sinks grows. So three numbers are told:

* **pooled**: all points. Confounded by both; told because it is what is often shown;
* **within layers**: ranks are taken in each layer, across texts. Free of depth, not of length;
* **adjusted**: each layer's mean and each text's mean are taken off both. What is left compares the
  same text at layers with and without its secondary sinks, against what other texts do there. This
  is the one to quote, as far as an observation goes.

Of the measures of strength the number of secondary sinks is comparable between layers. Norm ratios
are not: they shrink with depth, because ordinary residuals grow, while keys are read after a norm.
With them, the correlation within layers is the one that means something.

Intervals resample texts: layers of one text are no independent witnesses. The causal answer is
another: take the sinks out and see (`SinkRemoval`), and it stands beside these where it is given.
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
from secondary_sinks.result import Result
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
    maps: SinkMap | Sequence[SinkMap],
    *,
    removals: SinkRemoval | Sequence[SinkRemoval] = (),
    seed: int = 0,
) -> PrimaryWeakening:
    """Relate the primary's sink score, layer by layer, to the secondary sinks that live there.

    Their strength is their number, the sum of their norm ratios, or the sum of their sink scores.
    The headline is the `adjusted` correlation with their number, without each layer's and each
    text's mean; `analyses.primary_weakening` tells why, and what is wrong with the others. It needs
    texts that differ in their secondary sinks, best of one length.

    What it is not evidence for: that secondary sinks *take* the attention from the primary. Texts
    that make more of them may differ otherwise; pass the results of `remove_sinks` for the causal
    answer beside it. The correlation with their sink scores is partly arithmetic, since all the
    attention of a query adds up to 1: what one key gets the others lose.

    Args:
        maps: sink maps of one or many texts of one model, from `detect_sinks`.
        removals: results of `remove_sinks` in some of these texts.
        seed: of the resampling; recorded with the result.

    Raises:
        InputError: no maps, maps of several models or without measurements, or removals in other
            texts than theirs.
    """
    given = [removals] if isinstance(removals, SinkRemoval) else list(removals)
    return weakening(maps, given, seed=seed)


@dataclass(frozen=True)
class Weakening:
    """The primary's sink score against one measure of the live secondary sinks."""

    strength: Strength
    pooled: Correlation
    within_layers: Correlation
    adjusted: Correlation
    """Pearson's of what is left without each layer's and each text's mean: the number to quote."""
    slope: float
    """Change of the primary's sink score for one more unit of strength, from the same remainders;
    NaN where they do not vary."""
    slope_low: float
    slope_high: float


@dataclass(frozen=True)
class CausalWeakening:
    """What taking the secondary sinks out does to the primary, in the removals that were given."""

    change: Float[Tensor, "removal"]
    """Primary's sink score without the secondary sinks less that with them: mean over heads and the
    layers that saw them. Positive: they weakened it."""
    control_change: Float[Tensor, "removal"]
    """The same of the control edits, mean over controls; NaN without."""
    per_sink: Float[Tensor, "removal"]
    """The change over the mean number of secondary sinks that those layers saw."""
    by_layer: Float[Tensor, "removal layer"]
    """The change at every layer."""
    mean: float
    low: float
    high: float
    """Mean of `change` with its 95 % bootstrap interval over removals; NaN for a single one."""


@dataclass(frozen=True)
class PrimaryWeakening(Result):
    """The primary's sink score against the live secondary sinks; see `primary_weakening`."""

    primary: Float[Tensor, "text layer"]
    """The primary's sink score, mean over heads."""
    number: Float[Tensor, "text layer"]
    """How many secondary sinks the attention of that layer sees."""
    norm: Float[Tensor, "text layer"]
    """Sum of their norm ratios."""
    score: Float[Tensor, "text layer"]
    """Sum of their sink scores in that layer."""
    counted: Bool[Tensor, "text layer"]
    """Layers that show a primary phase of the text: only these enter the numbers."""
    n_tokens: tuple[int, ...]
    relations: tuple[Weakening, ...]
    """By number, norm and score of the secondary sinks."""
    causal: CausalWeakening | None
    """None without removals."""
    seed: int
    notes: tuple[str, ...]
    model: dict[str, Any]

    def relation(self, strength: Strength = "number") -> Weakening:
        """The correlations with one measure of strength."""
        return next(one for one in self.relations if one.strength == strength)

    def __repr__(self) -> str:
        found = self.relation().adjusted
        removed = (
            f", removal changes it by {self.causal.mean:+.3f} in {len(self.causal.change)} texts"
            if self.causal
            else ""
        )
        return (
            f"PrimaryWeakening({self.model.get('name', '?')!r}, {len(self.primary)} texts: "
            "adjusted correlation with the number of live secondary sinks "
            f"{found.rho:.2f}{removed})"
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
        for one in self.relations:
            row: dict[str, Any] = {"strength": one.strength}
            for name in ("pooled", "within_layers", "adjusted"):
                found = getattr(one, name)
                row |= {name: found.rho, f"{name}_low": found.low, f"{name}_high": found.high}
            row |= {"slope": one.slope, "slope_low": one.slope_low, "slope_high": one.slope_high}
            rows.append(row)
        return pd.DataFrame(rows)

    def _notebook_frame(self) -> pd.DataFrame:
        return self.summary()


def weakening(
    maps: SinkMap | Sequence[SinkMap], removals: Sequence[SinkRemoval], *, seed: int
) -> PrimaryWeakening:
    """Put the points of all texts together and relate them; see `primary_weakening`."""
    several = check_one_model(maps)
    n_layers = several[0].norm.shape[0]  # type: ignore[union-attr]
    shape = (len(several), n_layers)
    found = {name: torch.zeros(shape) for name in STRENGTHS}
    primary, counted = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for text, one in enumerate(several):
        score = one.sink_score.mean(dim=1)  # type: ignore[union-attr]
        primary[text] = score[:, one.primary_position]
        for start, end in one.phases:
            counted[text, start + 1 : end + 1] = True
        for sink in one.secondary:
            seen = [layer + 1 for layer in sink.layers if layer + 1 < n_layers]
            found["number"][text, seen] += 1
            ratios = sink.evidence.norm_ratio if sink.evidence else (math.nan,) * len(sink.layers)
            found["norm"][text, seen] += torch.tensor(ratios)[: len(seen)]
            # Sinks so near the end that nobody could look at them draw nothing that was measured.
            found["score"][text, seen] += score[seen, sink.position].nan_to_num(0.0)
    counted &= ~torch.isnan(primary)
    relations = tuple(_relate(name, found[name], primary, counted, seed=seed) for name in STRENGTHS)
    return PrimaryWeakening(
        primary=primary,
        counted=counted,
        n_tokens=tuple(one.n_tokens for one in several),
        relations=relations,
        causal=_causal(removals, several, seed=seed) if removals else None,
        seed=seed,
        notes=_notes(several, found["number"], relations),
        model=several[0].model,
        **found,
    )


def _relate(
    name: Strength,
    strength: Float[Tensor, "text layer"],
    primary: Float[Tensor, "text layer"],
    counted: Bool[Tensor, "text layer"],
    *,
    seed: int,
) -> Weakening:
    text, layer = (index[counted].tolist() for index in _indices(counted))
    x, y = strength[counted], primary[counted]
    inner = [_without_means(table, counted) for table in (strength, primary)]

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


def _indices(counted: Bool[Tensor, "text layer"]) -> tuple[Tensor, ...]:
    axes = [torch.arange(size) for size in counted.shape]
    return torch.meshgrid(*axes, indexing="ij")


def _without_means(values: Float[Tensor, "text layer"], counted: Bool[Tensor, "text layer"]) -> Any:
    """Counted values less the mean of their text and of their layer (least squares, any gaps)."""
    wanted = values[counted].double().numpy()
    ends = [index[counted].numpy() for index in _indices(counted)]
    columns = [own[:, None] == np.unique(own)[None] for own in ends]
    design = np.concatenate(columns, axis=1).astype(float)
    left = wanted - design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    # Rounding leaves a trace where nothing is left; it must not pass for a value that varies.
    left[np.abs(left) < 1e-6 * float(np.abs(wanted).max(initial=0.0))] = 0.0
    return left


def remainders(found: PrimaryWeakening, strength: Strength) -> tuple[Any, Any]:
    """Strength and score of every counted point without its text's and its layer's mean."""
    x = _without_means(getattr(found, strength), found.counted)
    return x, _without_means(found.primary, found.counted)


def _causal(
    removals: Sequence[SinkRemoval], maps: Sequence[SinkMap], *, seed: int
) -> CausalWeakening:
    known = {(one.model.get("name"), one.token_strings) for one in maps}
    changes, controls, per_sink, by_layer = [], [], [], []
    for one in removals:
        if one.reverse:
            raise InputError("a removal that adds sinks (reverse=True); pass those that take away")
        if (one.model.get("name"), one.token_strings) not in known:
            raise InputError(
                f"a removal in another text or model than the maps: {one!r}; pass the map of its "
                "text as well"
            )
        frame = one.to_frame()
        live = sum(len(sink.layers) for sink in one.sinks) / max(1, len(one.live_layers))
        changes.append(one.primary_edited - one.primary_clean)
        has_controls = len(one.control_where) > 0
        mean = float(one.primary_control.mean()) if has_controls else math.nan
        controls.append(mean - one.primary_clean)
        per_sink.append(changes[-1] / live)
        by_layer.append(torch.tensor(frame["change"].to_numpy(), dtype=torch.float32))
    change = torch.tensor(changes)
    several = len(changes) > 1
    low, high = bootstrap_interval(change, seed=seed) if several else (math.nan, math.nan)
    return CausalWeakening(
        change=change,
        control_change=torch.tensor(controls),
        per_sink=torch.tensor(per_sink),
        by_layer=torch.stack(by_layer),
        mean=float(change.mean()),
        low=low,
        high=high,
    )


def _notes(
    maps: Sequence[SinkMap],
    number: Float[Tensor, "text layer"],
    relations: Sequence[Weakening],
) -> tuple[str, ...]:
    notes = []
    lengths = [one.n_tokens for one in maps]
    if max(lengths) > 1.5 * min(lengths):
        notes.append(
            f"texts are {min(lengths)} to {max(lengths)} tokens long, and scores fall with length; "
            "cut them to one length with max_tokens"
        )
    if len(maps) < 2:
        notes.append("one text cannot tell secondary sinks from depth: pass several")
    elif bool((number == number[:1]).all()):
        notes.append(
            "all texts have the same number of secondary sinks in every layer, so only small "
            "differences of their norms are left to compare by"
        )
    shared = [one.secondary and all(sink.position < n for sink in one.secondary)
              for one, n in zip(maps, shared_beginnings(maps), strict=True)]  # fmt: skip
    if any(shared):
        notes.append(
            f"{sum(map(bool, shared))} of {len(maps)} texts have no secondary sink but those of the"
            " beginning that they share with an earlier text"
        )
    if all(math.isnan(one.adjusted.rho) for one in relations):
        notes.append("the secondary sinks of these texts do not differ, so nothing can be related")
    return tuple(notes)
