"""The default criterion: a sink is aligned, large, and looked at.

A token is a sink after block l if, at the same time,

* *alignment*: its residual points where the primary sink's does. Both are taken without the layer's
  common component (the mean residual of ordinary tokens), so that a direction that all tokens share
  makes nobody a sink;
* *magnitude*: what it has beyond the common component is larger than the median token's;
* *attention*: over that life, later tokens look at it much more than at ordinary tokens nearby.
  "Nearby" matters: early tokens are seen by queries with little else to look at, late ones by their
  neighbours, so each is compared with ordinary tokens of about the same position.

All of it happens inside a *primary phase*: a run of layers in which the primary token is massive,
keeps its direction from one layer to the next, and itself draws attention. A model may have several
phases, with different directions. A token whose life begins with the phase is another primary sink;
one whose life begins later is a secondary sink.

What the numbers do not say: that the sink matters for the output, or which module made it. Those are
questions for an intervention.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.explain.sinks import Evidence, Kind, Sink
from secondary_sinks.observe.collectors import Geometry

if TYPE_CHECKING:
    import pandas as pd

    from secondary_sinks.explain.sinks import SinkMap

DEFAULTS: dict[str, float | int] = {
    "min_alignment": 0.9,
    "min_norm_ratio": 1.5,
    "min_attention_ratio": 4.0,
    "min_primary_ratio": 3.0,
    "min_queries": 8,
}
"""Thresholds of the criterion.

* `min_alignment`: the paper's 0.9, here without the common component. It asks that the vector
  written along the sink direction be about twice as long as everything else the token has.
* `min_norm_ratio`: norm over the median token's, both without the common component.
* `min_attention_ratio`: head-averaged sink score over that of ordinary tokens nearby. Ordinary
  tokens stay below 3 (99 % of them); sinks begin at about 10.
* `min_primary_ratio`: norm ratio from which on the primary token counts as massive.
* `min_queries`: tokens with fewer later queries are not used as examples of ordinary attention and
  have no sink score of their own.
"""

N_NEIGHBORS = 32
"""Ordinary tokens nearby that make the attention baseline of a token."""


@dataclass(frozen=True)
class Detection:
    """What the criterion found, before it is put into a `SinkMap`."""

    primary_position: int
    phases: tuple[tuple[int, int], ...]
    sinks: tuple[Sink, ...]
    alignment: Float[Tensor, "layer token"]
    centered_alignment: Float[Tensor, "layer token"]
    attention_ratio: Float[Tensor, "layer token"]


def check_thresholds(thresholds: dict[str, float | int]) -> dict[str, float | int]:
    """Defaults with the given thresholds in their place.

    Raises:
        InputError: an unknown threshold or one out of range.
    """
    unknown = set(thresholds) - set(DEFAULTS)
    if unknown:
        raise InputError(f"no threshold {sorted(unknown)[0]!r}; there are {', '.join(DEFAULTS)}")
    merged = DEFAULTS | thresholds
    if not 0 < merged["min_alignment"] < 1:
        raise InputError(f"min_alignment is {merged['min_alignment']}; a cosine in (0, 1) is meant")
    for name, least in (
        ("min_norm_ratio", 0.0),
        ("min_attention_ratio", 0.0),
        ("min_primary_ratio", 1.0),
        ("min_queries", 1),
    ):
        if not merged[name] >= least or math.isinf(merged[name]):
            raise InputError(f"{name} is {merged[name]}; it must be {least:g} or more")
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
            candidate whose residual grows largest against the median token's.
        thresholds: all of `DEFAULTS`.
    """
    norm_ratio = geometry.centered_norm / _row_median(geometry.centered_norm)
    index = _primary_index(geometry, norm_ratio, primary)
    position = geometry.candidates[index]
    centered = geometry.centered_alignment[index]
    aligned = (centered >= thresholds["min_alignment"]) & (
        norm_ratio >= thresholds["min_norm_ratio"]
    )
    persists = geometry.persistence[index] >= thresholds["min_alignment"]
    massive = norm_ratio[:, position] >= thresholds["min_primary_ratio"]
    runs = primary_runs(massive, persists)
    attention = attention_ratio(
        score, ordinary=~_in_runs(aligned, runs), min_queries=int(thresholds["min_queries"])
    )
    phases = tuple(
        run
        for run in runs
        if _life_attention(attention, position, range(*run)) >= thresholds["min_attention_ratio"]
    )
    measured = _Measured(geometry, index, centered, norm_ratio, score, attention)
    sinks = []
    for start, end in phases:
        for token in range(centered.shape[1]):
            for layers in lives(aligned[start:end, token], offset=start):
                seen = _life_attention(attention, token, layers)
                if not _is_looked_at(seen, token, layers, score, thresholds):
                    continue
                kind: Kind = "primary" if layers[0] == start else "secondary"
                evidence = measured.evidence(token, layers, seen)
                sinks.append(
                    Sink(token, token_strings[token], tokens[token], kind, layers, evidence)
                )
    return Detection(
        primary_position=position,
        phases=phases,
        sinks=tuple(sorted(sinks, key=lambda sink: (sink.kind, sink.l_start, sink.position))),
        alignment=geometry.alignment[index],
        centered_alignment=centered,
        attention_ratio=attention,
    )


def primary_runs(
    massive: Bool[Tensor, "layer"], persists: Bool[Tensor, "layer"]
) -> list[tuple[int, int]]:
    """Runs [start, end) of layers in which the primary is massive and keeps its direction.

    A layer belongs to the run of the layer before it if the residual still points the same way;
    a turn begins another run. A single layer is no run: on the way to a phase the first token is
    often somewhat large already, in a direction that does not last.
    """
    runs: list[tuple[int, int]] = []
    for layer, is_massive in enumerate(massive.tolist()):
        if not is_massive:
            continue
        if runs and runs[-1][1] == layer and persists[layer]:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return [run for run in runs if run[1] - run[0] > 1]


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


def attention_ratio(
    score: Float[Tensor, "layer head token"],
    *,
    ordinary: Bool[Tensor, "token"],
    min_queries: int,
) -> Float[Tensor, "layer token"]:
    """Attention that a token draws, over what ordinary tokens nearby draw.

    The head-averaged sink score is first divided by the score that uniform attention would give a
    token at that position (a token at the very beginning is seen by queries with little else to
    look at). The baseline of a token is then the median, in each layer, of the `N_NEIGHBORS`
    ordinary tokens that are nearest in position among those with at least `min_queries` later
    queries. The last token, at which nobody can look, has NaN.
    """
    n_tokens = score.shape[2]
    mean = score.mean(dim=1) / uniform_score(n_tokens)
    n_queries = torch.arange(n_tokens - 1, -1, -1)
    examples = (ordinary & (n_queries >= min_queries)).nonzero().flatten()
    if len(examples) == 0:
        examples = (n_queries >= 1).nonzero().flatten()
    k = min(N_NEIGHBORS, len(examples))
    # Examples are sorted, so the k nearest of a position are a window of k of them.
    place = torch.searchsorted(examples, torch.arange(n_tokens))
    first = (place - k // 2).clamp(0, len(examples) - k)
    baselines = mean[:, examples].unfold(1, k, 1).median(dim=-1).values
    baseline = baselines[:, first]
    # Not a division by nothing: a token that nobody looks at, among such, has ratio 0.
    return mean / baseline.clamp_min(torch.finfo(torch.float32).tiny)


def uniform_score(n_tokens: int) -> Float[Tensor, "token"]:
    """Sink score of every token if each query looked at all it can see alike; NaN for the last."""
    weight = 1 / torch.arange(1, n_tokens + 1, dtype=torch.float64)
    later = weight.flip(0).cumsum(0).flip(0) - weight
    return (later / torch.arange(n_tokens - 1, -1, -1)).float()


def margins(sinks: SinkMap, n: int | None) -> pd.DataFrame:
    """See `SinkMap.margins`."""
    import pandas as pd

    thresholds = sinks.thresholds
    centered_alignment, attention = sinks.centered_alignment, sinks.attention_ratio
    centered_norm = sinks.centered_norm
    if centered_alignment is None or attention is None or centered_norm is None:
        raise InputError("this map holds no measurements")
    passed = torch.stack(
        [
            centered_alignment / thresholds["min_alignment"],
            centered_norm / _row_median(centered_norm) / thresholds["min_norm_ratio"],
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
    columns = "position token layer alignment magnitude attention closeness failed".split()
    return pd.DataFrame(rows, columns=columns)


@dataclass(frozen=True)
class _Measured:
    """The measurements from which a sink's evidence is read."""

    geometry: Geometry
    index: int
    centered: Tensor
    norm_ratio: Tensor
    score: Tensor
    attention: Tensor

    def evidence(self, token: int, layers: tuple[int, ...], seen: float) -> Evidence:
        norm = self.geometry.norm
        after = _next_layer(self.score.mean(dim=1))
        rows = list(layers)
        return Evidence(
            alignment=_floats(self.geometry.alignment[self.index, rows, token]),
            centered_alignment=_floats(self.centered[rows, token]),
            norm=_floats(norm[rows, token]),
            norm_ratio=_floats((norm / _row_median(norm))[rows, token]),
            sink_score=_floats(after[rows, token]),
            attention_ratio=seen,
            n_queries=norm.shape[1] - 1 - token,
        )


def _primary_index(geometry: Geometry, norm_ratio: Tensor, primary: int | None) -> int:
    if primary is not None:
        if primary not in geometry.candidates:
            raise InputError(
                f"primary={primary} is not among the candidate positions {geometry.candidates}"
            )
        return geometry.candidates.index(primary)
    # The last layer is left out: some models write large, unrelated vectors there.
    inner = norm_ratio[:-1] if norm_ratio.shape[0] > 1 else norm_ratio
    return int(inner[:, list(geometry.candidates)].amax(dim=0).argmax())


def _is_looked_at(
    seen: float,
    token: int,
    layers: tuple[int, ...],
    score: Tensor,
    thresholds: dict[str, float | int],
) -> bool:
    """Whether the attention test passes; where no later token exists, it cannot be asked."""
    n_layers, _, n_tokens = score.shape
    if token == n_tokens - 1:
        return True
    if layers == (n_layers - 1,):
        return False  # no later block: nothing could show that anybody looks
    return seen >= thresholds["min_attention_ratio"]


def _life_attention(
    attention: Tensor, token: int, layers: range | tuple[int, ...]
) -> float:
    """Mean attention ratio over a life; layer l shows in block l + 1. NaN if nothing shows it."""
    shown = [layer + 1 for layer in layers if layer + 1 < attention.shape[0]]
    return float(attention[shown, token].mean()) if shown else math.nan


def _in_runs(aligned: Tensor, runs: list[tuple[int, int]]) -> Bool[Tensor, "token"]:
    candidates = torch.zeros(aligned.shape[1], dtype=torch.bool)
    for start, end in runs:
        candidates |= aligned[start:end].any(dim=0)
    return candidates


def _next_layer(values: Float[Tensor, "layer token"]) -> Float[Tensor, "layer token"]:
    """Row l holds what block l + 1 shows; the last row is NaN."""
    return torch.cat([values[1:], torch.full_like(values[:1], torch.nan)])


def _row_median(values: Float[Tensor, "layer token"]) -> Float[Tensor, "layer 1"]:
    return values.median(dim=1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
