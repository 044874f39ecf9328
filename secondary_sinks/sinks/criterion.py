"""The default criterion: a sink is aligned, large, and looked at.

A token is a sink after block l if, at the same time,

* *alignment*: its residual points where the primary sink's does. Both are taken without the layer's
  common component (the mean residual of ordinary tokens), so that a direction that all tokens share
  makes nobody a sink;
* *magnitude*: what it has beyond the common component is larger than the median token's;
* *attention*: over that life, later tokens look at it much more than at ordinary tokens nearby,
  in the heads that look at the primary. "Nearby" matters: early tokens are seen by queries with
  little else to look at, late ones by their neighbors. The heads matter as well: the sink direction
  is read by some of them only, and the others would drown these.

All of it happens inside a *primary phase*: a run of layers in which the primary token is massive,
keeps its direction from one layer to the next, and itself draws attention. A model may have several
phases, with different directions. A token whose life begins with the phase is another primary sink;
one whose life begins later is a secondary sink.

What the numbers do not say: that the sink matters for the output, or which module made it. Those
are questions for an intervention.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.collectors import Geometry
from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.sink_map import Evidence, Kind, Sink

if TYPE_CHECKING:
    import pandas as pd

    from secondary_sinks.sinks.sink_map import SinkMap

DEFAULTS: dict[str, float | int] = {
    "min_alignment": 0.9,
    "min_norm_ratio": 1.5,
    "min_attention_ratio": 3.0,
    "min_primary_ratio": 3.0,
    "min_queries": 8,
}
"""Thresholds of the criterion.

* `min_alignment`: the paper's 0.9, here without the common component. It asks that the vector
  written along the sink direction be about twice as long as everything else the token has.
* `min_norm_ratio`: norm over the median ordinary token's, both without the common component.
* `min_attention_ratio`: attention drawn over that of ordinary tokens nearby (`sinks.attention_baseline`).
  Sinks of planted models begin at 14, decoys end at 0.2, ordinary tokens scatter around 1.
* `min_primary_ratio`: norm ratio from which on the primary token counts as massive.
* `min_queries`: tokens with fewer later queries are not used as examples of ordinary attention and
  have no sink score of their own.
"""

LEAST_DRAWN = 0.1
"""Attention that a sink draws at least, over that of uniform attention."""

PRIMARY_SHARE = 0.25
"""A candidate is the primary only if its norm ratio is this share of the largest one's or more."""


@dataclass(frozen=True)
class Detection:
    """What the criterion found, before it is put into a `SinkMap`."""

    primary_position: int
    phases: tuple[tuple[int, int], ...]
    sinks: tuple[Sink, ...]
    alignment: Float[Tensor, "layer token"]
    centered_alignment: Float[Tensor, "layer token"]
    attention_ratio: Float[Tensor, "layer token"]
    notes: tuple[str, ...] = ()


def check_thresholds(thresholds: dict[str, float | int]) -> dict[str, float | int]:
    """Defaults with the given thresholds in their place.

    Raises:
        InputError: an unknown threshold or one out of range.
    """
    unknown = set(thresholds) - set(DEFAULTS)
    if unknown:
        raise InputError(f"no threshold {sorted(unknown)[0]!r}; there are {', '.join(DEFAULTS)}")
    merged = DEFAULTS | thresholds
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in merged.values()):
        raise InputError(f"thresholds must be numbers: {thresholds}")
    merged = {name: float(value) for name, value in merged.items()}
    if merged["min_queries"] != int(merged["min_queries"]):
        raise InputError(f"min_queries is {merged['min_queries']}; a whole number is meant")
    merged["min_queries"] = int(merged["min_queries"])
    for name, least in (
        ("min_norm_ratio", 0.0),
        ("min_attention_ratio", 0.0),
        ("min_primary_ratio", 1.0),
        ("min_queries", 1),
    ):
        if not merged[name] >= least or math.isinf(merged[name]):
            raise InputError(f"{name} is {merged[name]}; it must be {least:g} or more")
    if not 0 < merged["min_alignment"] < 1:
        raise InputError(f"min_alignment is {merged['min_alignment']}; a cosine in (0, 1) is meant")
    return merged


def detect(
    geometry: Geometry,
    score: Float[Tensor, "layer head token"],
    tokens: list[int],
    token_strings: tuple[str, ...],
    *,
    primary: int | None = None,
    thresholds: dict[str, float | int],
) -> Detection:
    """Find the sinks of one text.

    Args:
        geometry: residual norms and alignments.
        score: mean attention from later queries, for every token that has at least one.
        tokens: token ids.
        token_strings: what they read as.
        primary: position of the primary sink, one of `geometry.candidates`; by default the
            candidate that becomes a sink first, of those that grow about as large as the largest.
        thresholds: all of `DEFAULTS`.
    """
    norm_ratio = _over(geometry.centered_norm, geometry.ordinary_centered_norm)
    indices = range(len(geometry.candidates))
    if primary is not None:
        if primary not in geometry.candidates:
            raise InputError(
                f"primary={primary} is not among the candidate positions {geometry.candidates}"
            )
        indices = range(geometry.candidates.index(primary), geometry.candidates.index(primary) + 1)
    views = [_View.of(geometry, norm_ratio, score, index, thresholds) for index in indices]
    view = _choose_primary(views)
    sinks = []
    secondary: set[int] = set()
    for start, end in view.phases:
        for token in range(score.shape[2]):
            for layers in lives(view.aligned[start:end, token], offset=start):
                seen = _life_mean(view.attention, token, layers)
                if not _is_looked_at(view, token, layers, thresholds):
                    continue
                # A secondary sink that outlives a break of the primary is still a secondary one.
                begins = layers[0] == start and token not in secondary
                kind: Kind = "primary" if begins else "secondary"
                if not begins:
                    secondary.add(token)
                evidence = _evidence(geometry, view, score, token, layers, seen)
                sinks.append(
                    Sink(token, token_strings[token], tokens[token], kind, layers, evidence)
                )
    return Detection(
        primary_position=view.position,
        phases=view.phases,
        sinks=tuple(sorted(sinks, key=lambda sink: (sink.kind, sink.l_start, sink.position))),
        alignment=geometry.alignment[view.index],
        centered_alignment=geometry.centered_alignment[view.index],
        attention_ratio=view.attention,
        notes=tuple(_notes(views, view, geometry, sinks, thresholds)),
    )


def _notes(
    views: list[_View],
    chosen: _View,
    geometry: Geometry,
    sinks: list[Sink],
    thresholds: dict[str, float | int],
) -> Iterator[str]:
    """What the choice of the primary leaves out, and what lies on the border of its definition."""
    for view in views:
        middle = [(start + end) // 2 for start, end in view.phases]
        along = geometry.centered_alignment[chosen.index, middle, view.position]
        if view is not chosen and (along < thresholds["min_alignment"]).any():
            yield (
                f"position {view.position} also is massive and draws attention, in a direction of "
                f"its own; the sinks of that direction are found with primary={view.position}"
            )
    beyond = sorted(
        {s.position for s in sinks if s.kind == "primary" and s.position > max(geometry.candidates)}
    )
    if beyond:
        yield (
            f"{len(beyond)} tokens far from the beginning become sinks in the first layer of a "
            f"primary phase and count as primary (positions {', '.join(map(str, beyond[:5]))}"
            f"{', ...' if len(beyond) > 5 else ''}); in other texts the first token may rise "
            "earlier and make the same tokens secondary"
        )


@dataclass(frozen=True)
class _View:
    """The text as seen with one candidate for the primary."""

    index: int
    position: int
    peak: float
    aligned: Bool[Tensor, "layer token"]
    attention: Float[Tensor, "layer token"]
    drawn: Float[Tensor, "layer token"]
    phases: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        norm_ratio: Tensor,
        score: Tensor,
        index: int,
        thresholds: dict[str, float | int],
    ) -> _View:
        position = geometry.candidates[index]
        aligned = (geometry.centered_alignment[index] >= thresholds["min_alignment"]) & (
            norm_ratio >= thresholds["min_norm_ratio"]
        )
        runs = primary_runs(norm_ratio[:, position], geometry.persistence[index], thresholds)
        ordinary = torch.ones(score.shape[2], dtype=torch.bool)
        ordinary[position] = False
        for start, end in runs:
            ordinary &= ~aligned[start:end].any(dim=0)
        baseline = AttentionBaseline.of(
            score, position, ordinary=ordinary, min_queries=int(thresholds["min_queries"])
        )
        attention = baseline.ratio(score)
        least = thresholds["min_attention_ratio"]
        phases = tuple(run for run in runs if _life_mean(attention, position, range(*run)) >= least)
        # The last layer is left out: some models write large, unrelated vectors there.
        inner = norm_ratio[:-1] if norm_ratio.shape[0] > 1 else norm_ratio
        peak = float(inner[:, position].max())
        drawn = baseline.drawn(score)
        return cls(index, position, peak, aligned, attention, drawn, phases)


def _choose_primary(views: list[_View]) -> _View:
    """The candidate that becomes a sink first, among those that grow about as large as the largest.

    Size alone would take a secondary sink near the beginning for the primary where it is the larger
    one; time alone would take any token that an early layer makes somewhat large.
    """
    largest = max(view.peak for view in views)
    able = [view for view in views if view.phases and view.peak >= PRIMARY_SHARE * largest]
    if not able:
        return max(views, key=lambda view: view.peak)
    return min(able, key=lambda view: (view.phases[0][0], -view.peak))


def primary_runs(
    norm_ratio: Float[Tensor, "layer"],
    persistence: Float[Tensor, "layer"],
    thresholds: dict[str, float | int],
) -> list[tuple[int, int]]:
    """Runs [start, end) of layers in which the primary is massive and keeps its direction.

    A layer belongs to the run of the layer before it if the residual still points the same way; a
    turn begins another run. A single layer is no run: on the way to a phase the first token is
    often somewhat large already, in a direction that does not last.

    The vector may be written over two or three layers, and how much of it comes first depends on
    the token. So a run begins with the first layer after which the primary is larger than ordinary
    tokens and has the greater part of its (squared) length along the next layer's residual, massive
    or not.

    Args:
        norm_ratio: norm of the primary over the median token's.
        persistence: cosine of the primary's residual with itself one layer earlier.
        thresholds: all of `DEFAULTS`.
    """
    massive = norm_ratio >= thresholds["min_primary_ratio"]
    persists = persistence >= thresholds["min_alignment"]
    cores: list[tuple[int, int]] = []
    for layer in massive.nonzero().flatten().tolist():
        if cores and cores[-1][1] == layer and persists[layer]:
            cores[-1] = (cores[-1][0], layer + 1)
        else:
            cores.append((layer, layer + 1))
    runs: list[tuple[int, int]] = []
    for start, end in cores:
        if end - start < 2:
            continue
        earliest = runs[-1][1] if runs else 0
        while (
            start > earliest
            and persistence[start] ** 2 > 0.5
            and norm_ratio[start - 1] >= thresholds["min_norm_ratio"]
        ):
            start -= 1
        runs.append((start, end))
    return runs


def lives(alive: Bool[Tensor, "layer"], *, offset: int = 0) -> list[tuple[int, ...]]:
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


def margins(sinks: SinkMap, n: int | None) -> pd.DataFrame:
    """See `SinkMap.margins`."""
    import pandas as pd

    thresholds = sinks.thresholds
    centered_alignment, attention = sinks.centered_alignment, sinks.attention_ratio
    norm, ordinary = sinks.centered_norm, sinks.ordinary_centered_norm
    if centered_alignment is None or attention is None or norm is None or ordinary is None:
        raise InputError("this map holds no measurements")
    passed = torch.stack(
        [
            centered_alignment / thresholds["min_alignment"],
            _over(norm, ordinary) / thresholds["min_norm_ratio"],
            _next_layer(attention) / thresholds["min_attention_ratio"],
        ]
    )  # [test, layer, token]
    inside = torch.zeros(passed.shape[1], dtype=torch.bool)
    for start, end in sinks.phases or ((0, passed.shape[1]),):
        inside[start:end] = True
    closeness = passed.nan_to_num(nan=0.0).amin(dim=0)
    closeness[~inside] = -torch.inf
    nearest, layer = closeness.max(dim=0)
    called = {sink.position for sink in sinks.sinks} | {sinks.primary_position}
    tests = ("alignment", "magnitude", "attention")
    rows = []
    for token in nearest.argsort(descending=True).tolist():
        if token in called:
            continue
        values = passed[:, layer[token], token]
        rows.append(
            {
                "position": token,
                "token": sinks.token_strings[token],
                "layer": int(layer[token]),
                "alignment": float(values[0]),
                "magnitude": float(values[1]),
                "attention": float(values[2]),
                "closeness": float(nearest[token]),
                "failed": tests[int(values.nan_to_num(nan=0.0).argmin())],
            }
        )
        if n is not None and len(rows) == n:
            break
    columns = ["position", "token", "layer", *tests, "closeness", "failed"]
    return pd.DataFrame(rows, columns=columns)


def _evidence(
    geometry: Geometry,
    view: _View,
    score: Tensor,
    token: int,
    layers: tuple[int, ...],
    seen: float,
) -> Evidence:
    rows = list(layers)
    norm = geometry.norm
    return Evidence(
        alignment=_floats(geometry.alignment[view.index, rows, token]),
        centered_alignment=_floats(geometry.centered_alignment[view.index, rows, token]),
        norm=_floats(norm[rows, token]),
        norm_ratio=_floats(_over(norm, geometry.ordinary_norm)[rows, token]),
        centered_norm_ratio=_floats(
            _over(geometry.centered_norm, geometry.ordinary_centered_norm)[rows, token]
        ),
        sink_score=_floats(_next_layer(score.mean(dim=1))[rows, token]),
        attention_ratio=seen,
        n_queries=norm.shape[1] - 1 - token,
    )


def _is_looked_at(
    view: _View, token: int, layers: tuple[int, ...], thresholds: dict[str, float | int]
) -> bool:
    """Whether the attention test passes; where no later token exists, it cannot be asked.

    Beside the ratio, the token must draw a fair part of what uniform attention would give it: where
    the primary takes all there is, ordinary tokens draw nothing, and ten times nothing is no sink.
    """
    n_layers, n_tokens = view.attention.shape
    if token == n_tokens - 1:
        return True
    if layers == (n_layers - 1,):
        return False  # no later block: nothing could show that anybody looks
    ratio = _life_mean(view.attention, token, layers)
    drawn = _life_mean(view.drawn, token, layers)
    return ratio >= thresholds["min_attention_ratio"] and drawn >= LEAST_DRAWN


def _life_mean(
    values: Float[Tensor, "layer token"], token: int, layers: range | tuple[int, ...]
) -> float:
    """Mean over a life of what the next block shows; NaN if nothing shows it."""
    shown = [layer + 1 for layer in layers if layer + 1 < values.shape[0]]
    return float(values[shown, token].mean()) if shown else math.nan


def _next_layer(values: Float[Tensor, "layer token"]) -> Float[Tensor, "layer token"]:
    """Row l holds what block l + 1 shows; the last row is NaN."""
    return torch.cat([values[1:], torch.full_like(values[:1], torch.nan)])


def _over(
    norm: Float[Tensor, "layer token"], ordinary: Float[Tensor, "layer"]
) -> Float[Tensor, "layer token"]:
    return norm / ordinary.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
