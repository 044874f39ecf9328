"""Which token is the primary sink, in which layers, and which tokens are sinks with it.

The primary is one of the first tokens. Each candidate has phases: runs of layers in which it is
massive, keeps its direction from one layer to the next, and draws attention. The candidate that
becomes a sink first is chosen, among those that grow about as large as the largest. With its
direction and phases, the criterion (`sinks.criterion`) judges every token.

What is called primary must not depend on how soon the first token rises in a text. So a sink is
primary if it stands at the beginning (of the text, or of a document in it) and lives from the start
of a phase on; every other one is secondary. `Evidence.delay` says how many layers after the start
of the phase it begins, and `Evidence.published_kind` what the paper's rule calls it.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.criterion import (
    Criterion,
    is_aligned,
    life_mean,
    next_layer,
    norm_ratio,
)
from secondary_sinks.sinks.measurements import Measurements
from secondary_sinks.sinks.sink import MIN_COSINE, Evidence, Kind, Sink, kind_by_lifetime

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
    strength: Float[Tensor, " layer token"]
    undecided: tuple[Sink, ...] = ()
    criterion: Criterion | None = None
    """None for the published criterion, which judges no rows."""
    notes: tuple[str, ...] = ()


def detect(
    measured: Measurements, *, primary: int | None = None, thresholds: dict[str, float | int]
) -> Detection:
    """Find the sinks of one text.

    Args:
        measured: residuals and attention of the text.
        primary: position of the primary sink, one of the candidates; by default the candidate that
            becomes a sink first, of those that grow about as large as the largest.
        thresholds: all of `DEFAULTS`.
    """
    geometry = measured.geometry
    indices = range(len(geometry.candidates))
    if primary is not None:
        if primary not in geometry.candidates:
            raise InputError(
                f"primary={primary} is not among the candidate positions {geometry.candidates}"
            )
        indices = indices[geometry.candidates.index(primary) :][:1]
    candidates = [_Candidate.of(measured, index, thresholds) for index in indices]
    chosen = _choose_primary(candidates)
    lives, undecided = chosen.criterion.judge(
        geometry.centered_alignment[chosen.index], geometry.centered_norm, measured.score
    )
    sinks = tuple(sink for token, own in enumerate(lives) for sink in chosen.sinks(token, own))
    return Detection(
        primary=chosen.index,
        phases=chosen.phases,
        sinks=tuple(sorted(sinks, key=lambda sink: (sink.kind, sink.l_start, sink.position))),
        attention_ratio=chosen.attention,
        strength=chosen.strength,
        undecided=tuple(
            replace(sink, kind="undecided")
            for token, own in enumerate(undecided)
            for sink in chosen.sinks(token, own)
        ),
        criterion=chosen.criterion,
        notes=tuple(_notes(candidates, chosen, len({sink.position for sink in sinks}))),
    )


def _notes(candidates: list[_Candidate], chosen: _Candidate, n_sink_tokens: int) -> Iterator[str]:
    """What the choice of the primary leaves out, and where there is little to compare with."""
    geometry, thresholds = chosen.measured.geometry, chosen.criterion.thresholds
    for candidate in candidates:
        middle = [(start + end) // 2 for start, end in candidate.phases]
        along = geometry.centered_alignment[chosen.index, middle, candidate.position]
        if candidate is not chosen and (along < thresholds["min_alignment"]).any():
            yield (
                f"position {candidate.position} is massive as well and draws attention, in another "
                f"direction; find the sinks of that direction with primary={candidate.position}"
            )
    alike = float(geometry.share_alike.max())
    if alike > 0:
        how_many = "few" if alike < 0.99 else "no"
        yield (
            f"{how_many} ordinary tokens to compare with: {alike:.0%} of the tokens are about as "
            "large as one of the first and point the same way. They share the attention that one "
            f"of them would draw; {n_sink_tokens} still stand out"
        )


@dataclass(frozen=True)
class _Candidate:
    """One of the first tokens as the primary, with the criterion that follows from it."""

    measured: Measurements
    index: int
    position: int
    peak: float
    attention: Float[Tensor, " layer token"]
    strength: Float[Tensor, " layer token"]
    criterion: Criterion

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        return self.criterion.phases

    @classmethod
    def of(
        cls, measured: Measurements, index: int, thresholds: dict[str, float | int]
    ) -> _Candidate:
        geometry, score = measured.geometry, measured.score
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
            score,
            position,
            examples=examples,
            visible=measured.visible,
            min_queries=int(thresholds["min_queries"]),
        )
        attention, strength = baseline.ratio(score), baseline.strength(score)

        def draws(run: tuple[int, int]) -> bool:
            life, shown = range(*run), baseline.has_attention
            ratio = life_mean(attention[:, position], life, shown)
            drawn = life_mean(strength[:, position], life, shown)
            return (
                ratio >= thresholds["min_attention_ratio"] and drawn >= thresholds["min_strength"]
            )

        phases = tuple(run for run in layer_runs if draws(run))
        # The last layer is left out: some models write large, unrelated vectors there.
        peak = float((ratio[:-1] if len(ratio) > 1 else ratio).max())
        criterion = Criterion(thresholds, phases, geometry.background_centered_norm, baseline)
        return cls(measured, index, position, peak, attention, strength, criterion)

    def sinks(self, token: int, lives: list[tuple[int, ...]]) -> Iterator[Sink]:
        """The lives of one token as sinks, primary or secondary."""
        measured = self.measured
        starts = {start for start, _ in self.phases}
        is_secondary = token not in measured.beginnings and token != self.position
        for layers in lives:
            # A secondary sink that outlives a break of the primary is still a secondary one.
            is_secondary = is_secondary or layers[0] not in starts
            kind: Kind = "secondary" if is_secondary else "primary"
            name, token_id = measured.token_strings[token], measured.tokens[token]
            yield Sink(token, name, token_id, kind, layers, self._evidence(token, layers))

    def _evidence(self, token: int, layers: tuple[int, ...]) -> Evidence:
        geometry, shown = self.measured.geometry, self.criterion.baseline.has_attention
        at = (list(layers), token)
        inside = [layer for phase in self.phases for layer in range(*phase)]
        n_aligned = int((geometry.alignment[self.index, inside, token].abs() > MIN_COSINE).sum())
        score = next_layer(self.measured.score[:, :, token].mean(dim=1), shown)
        return Evidence(
            alignment=_floats(geometry.alignment[self.index][at]),
            centered_alignment=_floats(geometry.centered_alignment[self.index][at]),
            norm=_floats(geometry.norm[at]),
            norm_ratio=_floats(norm_ratio(geometry.norm, geometry.background_norm)[at]),
            centered_norm_ratio=_floats(
                norm_ratio(geometry.centered_norm, geometry.background_centered_norm)[at]
            ),
            sink_score=_floats(score[list(layers)]),
            attention_ratio=life_mean(self.attention[:, token], layers, shown),
            strength=life_mean(self.strength[:, token], layers, shown),
            n_queries=self.measured.n_tokens - 1 - token,
            delay=layers[0] - max(start for start, _ in self.phases if start <= layers[0]),
            published_kind=kind_by_lifetime(n_aligned, len(geometry.norm)),
        )


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


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
