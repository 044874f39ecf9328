"""The default criterion: a sink is aligned, large, and draws attention.

A token is a sink after block l if three things hold at the same time:

* *alignment*: its residual points where the primary sink's does. Both are taken without the layer's
  common component, so that a direction shared by all tokens does not count as evidence of a sink;
* *magnitude*: its norm without the common component is larger than the median background token's;
* *attention*: over its life, later tokens attend to it much more than to ordinary tokens nearby, in
  the heads that read the primary. "Nearby" matters: early tokens are seen by queries with few other
  keys, late ones by their neighbors. The heads matter too: only some read the sink direction, and
  the others would hide these.

All of it happens inside a *primary phase*: a run of layers in which the primary token is massive,
keeps its direction from one layer to the next, and itself draws attention. A model may have several
phases, with different directions.

`Criterion` holds everything that a judgment needs: thresholds, phases, and the baselines of the
text. The same object judges the whole text and any counterfactual row, so a row without an edit has
exactly the life of its token. `detect` chooses the primary, builds the criterion and applies it.

Not evidence for: that the sink matters for the output, or which module wrote it. Those are
questions for an intervention.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.residual_geometry import Geometry
from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.sink import Evidence, Kind, Sink

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
        aligned = is_aligned(
            centered_alignment, centered_norm, self.background_norm, self.thresholds
        )
        ratio = self.baseline.ratio(score, positions)
        drawn = self.baseline.drawn(score, positions)
        where = range(score.shape[2]) if positions is None else positions.tolist()
        return [
            [
                life
                for start, end in self.phases
                for life in runs(aligned[start:end, item], offset=start)
                if self._draws_attention(ratio[:, item], drawn[:, item], life, position)
            ]
            for item, position in enumerate(where)
        ]

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

    def _draws_attention(
        self,
        ratio: Float[Tensor, " layer"],
        drawn: Float[Tensor, " layer"],
        life: tuple[int, ...],
        position: int,
    ) -> bool:
        """The test of attention; it passes where no later token exists that could show it.

        Besides the ratio, the token must draw `LEAST_DRAWN` of what uniform attention would give
        it: a high ratio of two near-zero values is not evidence.
        """
        if position == self.baseline.n_tokens - 1:
            return True
        return (
            life_mean(ratio, life) >= self.thresholds["min_attention_ratio"]
            and life_mean(drawn, life) >= LEAST_DRAWN
        )


@dataclass(frozen=True)
class Detection:
    """What a criterion found, before it is put into a `SinkMap`."""

    primary: int
    """Index of the primary among the candidates."""
    phases: tuple[tuple[int, int], ...]
    sinks: tuple[Sink, ...]
    attention_ratio: Float[Tensor, " layer token"]
    criterion: Criterion | None = None
    """None for the published criterion, which judges no rows."""
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
    score: Float[Tensor, " layer head token"],
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
    candidates = range(len(geometry.candidates))
    if primary is not None:
        if primary not in geometry.candidates:
            raise InputError(
                f"primary={primary} is not among the candidate positions {geometry.candidates}"
            )
        candidates = range(geometry.candidates.index(primary), len(geometry.candidates))[:1]
    views = [_View.of(geometry, score, index, thresholds) for index in candidates]
    view = _choose_primary(views)
    lives = view.criterion.lives(
        geometry.centered_alignment[view.index], geometry.centered_norm, score
    )
    sinks = []
    phase_starts = {start for start, _ in view.phases}
    for token, lives_of_token in enumerate(lives):
        is_secondary = False
        for layers in lives_of_token:
            # A secondary sink that outlives a break of the primary is still a secondary one.
            is_secondary = is_secondary or layers[0] not in phase_starts
            kind: Kind = "secondary" if is_secondary else "primary"
            evidence = _evidence(geometry, view, score, token, layers)
            sinks.append(Sink(token, token_strings[token], tokens[token], kind, layers, evidence))
    return Detection(
        primary=view.index,
        phases=view.phases,
        sinks=tuple(sorted(sinks, key=lambda sink: (sink.kind, sink.l_start, sink.position))),
        attention_ratio=view.attention,
        criterion=view.criterion,
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
    attention: Float[Tensor, " layer token"]
    criterion: Criterion

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        return self.criterion.phases

    @classmethod
    def of(
        cls, geometry: Geometry, score: Tensor, index: int, thresholds: dict[str, float | int]
    ) -> _View:
        position = geometry.candidates[index]
        ratio = norm_ratio(geometry.centered_norm[:, position], geometry.background_centered_norm)
        layer_runs = primary_runs(ratio, geometry.persistence[index], thresholds)
        # The baseline is needed to tell which runs are phases, and comes from tokens that are not
        # aligned in any run.
        aligned = is_aligned(
            geometry.centered_alignment[index],
            geometry.centered_norm,
            geometry.background_centered_norm,
            thresholds,
        )
        examples = torch.ones(score.shape[2], dtype=torch.bool)
        examples[position] = False
        for start, end in layer_runs:
            examples &= ~aligned[start:end].any(dim=0)
        baseline = AttentionBaseline.of(
            score, position, ordinary=examples, min_queries=int(thresholds["min_queries"])
        )
        attention = baseline.ratio(score)
        least = thresholds["min_attention_ratio"]
        phases = tuple(
            run for run in layer_runs if life_mean(attention[:, position], range(*run)) >= least
        )
        # The last layer is left out: some models write large, unrelated vectors there.
        peak = float((ratio[:-1] if len(ratio) > 1 else ratio).max())
        criterion = Criterion(thresholds, phases, geometry.background_centered_norm, baseline)
        return cls(index, position, peak, attention, criterion)


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
    norm_ratio: Float[Tensor, " layer"],
    persistence: Float[Tensor, " layer"],
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


def life_mean(values: Float[Tensor, " layer"], life: range | tuple[int, ...]) -> float:
    """Mean over a life of what the next block shows; NaN if no block shows it."""
    shown = [layer + 1 for layer in life if layer + 1 < len(values)]
    return float(values[shown].nanmean()) if shown else math.nan


def next_layer(values: Float[Tensor, " layer token"]) -> Float[Tensor, " layer token"]:
    """Row l holds what block l + 1 shows; the last row is NaN."""
    return torch.cat([values[1:], torch.full_like(values[:1], torch.nan)])


def _evidence(
    geometry: Geometry, view: _View, score: Tensor, token: int, layers: tuple[int, ...]
) -> Evidence:
    at = (list(layers), token)
    norm = geometry.norm
    return Evidence(
        alignment=_floats(geometry.alignment[view.index][at]),
        centered_alignment=_floats(geometry.centered_alignment[view.index][at]),
        norm=_floats(norm[at]),
        norm_ratio=_floats(norm_ratio(norm, geometry.background_norm)[at]),
        centered_norm_ratio=_floats(
            norm_ratio(geometry.centered_norm, geometry.background_centered_norm)[at]
        ),
        sink_score=_floats(next_layer(score.mean(dim=1))[at]),
        attention_ratio=life_mean(view.attention[:, token], layers),
        n_queries=norm.shape[1] - 1 - token,
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
