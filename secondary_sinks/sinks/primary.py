"""Which token is the primary sink, in which layers, and which tokens are sinks with it.

The primary is one of the first tokens. Each candidate has phases: runs of layers in which it is
massive, keeps its direction from one layer to the next, and draws attention. The candidate that
becomes a sink first is chosen, among those that grow about as large as the largest. With its
direction and phases, the criterion (`sinks.criterion`) judges every token. A token whose life
begins with a phase is another primary sink; one whose life begins later is a secondary sink.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.residual_geometry import Geometry
from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.criterion import (
    Criterion,
    is_aligned,
    life_mean,
    next_layer,
    norm_ratio,
)
from secondary_sinks.sinks.sink import Evidence, Kind, Sink

PRIMARY_SHARE = 0.25
"""A candidate is the primary only if its norm ratio is at least this share of the largest one's."""


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
    indices = range(len(geometry.candidates))
    if primary is not None:
        if primary not in geometry.candidates:
            raise InputError(
                f"primary={primary} is not among the candidate positions {geometry.candidates}"
            )
        indices = indices[geometry.candidates.index(primary) :][:1]
    candidates = [_Candidate.of(geometry, score, index, thresholds) for index in indices]
    chosen = _choose_primary(candidates)
    lives = chosen.criterion.lives(
        geometry.centered_alignment[chosen.index], geometry.centered_norm, score
    )
    sinks = []
    phase_starts = {start for start, _ in chosen.phases}
    for token, lives_of_token in enumerate(lives):
        is_secondary = False
        for layers in lives_of_token:
            # A secondary sink that outlives a break of the primary is still a secondary one.
            is_secondary = is_secondary or layers[0] not in phase_starts
            kind: Kind = "secondary" if is_secondary else "primary"
            evidence = _evidence(geometry, chosen, score, token, layers)
            sinks.append(Sink(token, token_strings[token], tokens[token], kind, layers, evidence))
    return Detection(
        primary=chosen.index,
        phases=chosen.phases,
        sinks=tuple(sorted(sinks, key=lambda sink: (sink.kind, sink.l_start, sink.position))),
        attention_ratio=chosen.attention,
        criterion=chosen.criterion,
        notes=tuple(_notes(candidates, chosen, geometry, sinks, thresholds)),
    )


def _notes(
    candidates: list[_Candidate],
    chosen: _Candidate,
    geometry: Geometry,
    sinks: list[Sink],
    thresholds: dict[str, float | int],
) -> Iterator[str]:
    """What the choice of the primary leaves out, and what lies on the border of its definition."""
    for candidate in candidates:
        middle = [(start + end) // 2 for start, end in candidate.phases]
        along = geometry.centered_alignment[chosen.index, middle, candidate.position]
        if candidate is not chosen and (along < thresholds["min_alignment"]).any():
            yield (
                f"position {candidate.position} is massive as well and draws attention, in another "
                f"direction; find the sinks of that direction with primary={candidate.position}"
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
class _Candidate:
    """One of the first tokens as the primary, with the criterion that follows from it."""

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
    ) -> _Candidate:
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
            score, position, examples=examples, min_queries=int(thresholds["min_queries"])
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


def _choose_primary(candidates: list[_Candidate]) -> _Candidate:
    """The candidate that becomes a sink first, among those that grow about as large as the largest.

    Size alone would take a secondary sink near the beginning for the primary where it is larger;
    time alone would take any token that an early layer makes somewhat large.
    """
    largest = max(candidate.peak for candidate in candidates)
    able = [
        candidate
        for candidate in candidates
        if candidate.phases and candidate.peak >= PRIMARY_SHARE * largest
    ]
    if not able:
        return max(candidates, key=lambda candidate: candidate.peak)
    return min(able, key=lambda candidate: (candidate.phases[0][0], -candidate.peak))


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


def _evidence(
    geometry: Geometry, chosen: _Candidate, score: Tensor, token: int, layers: tuple[int, ...]
) -> Evidence:
    at = (list(layers), token)
    norm = geometry.norm
    return Evidence(
        alignment=_floats(geometry.alignment[chosen.index][at]),
        centered_alignment=_floats(geometry.centered_alignment[chosen.index][at]),
        norm=_floats(norm[at]),
        norm_ratio=_floats(norm_ratio(norm, geometry.background_norm)[at]),
        centered_norm_ratio=_floats(
            norm_ratio(geometry.centered_norm, geometry.background_centered_norm)[at]
        ),
        sink_score=_floats(next_layer(score.mean(dim=1))[at]),
        attention_ratio=life_mean(chosen.attention[:, token], layers),
        n_queries=norm.shape[1] - 1 - token,
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
