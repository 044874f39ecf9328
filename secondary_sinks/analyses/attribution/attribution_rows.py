"""The rows of an attribution: every layer's ablation and transplant, and their controls.

A `Target` is one sink with the tokens that it is compared with. A `Sweep` holds the rows of all
sinks and all layers, a `ControlPlan` those that depend on which layer is the candidate. Both make a
list of interventions, remember which row is which, and read the result of `counterfactuals` back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.analyses.attribution.attribution_result import Ablation, Transplant
from secondary_sinks.errors import InputError
from secondary_sinks.intervene.counterfactuals import CounterfactualRows
from secondary_sinks.intervene.edits import Edit, Mean, Resample, Zero
from secondary_sinks.intervene.interventions import EditSite, Intervention
from secondary_sinks.intervene.mean_activations import MeanActivations
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import Control, ControlKind

PLAIN = 2.0
"""Matched tokens have at most this many times the median centered norm while the sink lives: a
token that is massive in a direction of its own says nothing about ordinary ones."""
POOL = 4
"""Matched tokens are drawn from this many times as many that are nearest in position."""

_ABLATIONS: dict[str, tuple[EditSite, Edit]] = {
    "mlp_zero": ("mlp_out", Zero()),
    "mlp_mean": ("mlp_out", Mean()),
    "attention_zero": ("attn_out", Zero()),
    "attention_mean": ("attn_out", Mean()),
}


@dataclass(frozen=True)
class RandomDirection:
    """An edit: a random direction, as long as what another token has at the site."""

    source: int
    """The token whose activation's norm is taken."""
    seed: tuple[int, ...]

    def __call__(self, value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
        """The random vector."""
        drawn = np.random.default_rng(list(self.seed)).standard_normal(tuple(value.shape))
        vector: Tensor = torch.from_numpy(drawn).to(value.device, torch.float32)
        norm = clean[self.source].float().norm()
        scaled: Tensor = (vector / vector.norm() * norm).to(value.dtype)
        return scaled


@dataclass(frozen=True)
class Target:
    """A sink with what its rows are measured by, and the tokens that it is compared with."""

    sink: Sink
    sinks: SinkMap
    phase: slice
    """The primary phase that it lives in."""
    matched: tuple[int, ...]
    """Ordinary tokens nearby."""
    same_token: tuple[int, ...]
    """The same token id where it is no sink."""

    @classmethod
    def of(cls, sinks: SinkMap, sink: Sink, *, n_controls: int = 8, seed: int = 0) -> Target:
        """Choose the tokens to compare with; the choice depends on the seed and on the sink."""
        phase = next(
            (slice(start, end) for start, end in sinks.phases if start <= sink.l_start < end), None
        )
        if phase is None:
            raise InputError(f"{sink!r} lies outside the primary phases {sinks.phases}")
        rng = np.random.default_rng([seed, sink.position, sink.l_start])
        return cls(
            sink=sink,
            sinks=sinks,
            phase=phase,
            matched=_matched(sinks, sink, phase, n_controls, rng),
            same_token=_same_token(sinks, sink, n_controls, rng),
        )

    @property
    def life(self) -> list[int]:
        """Layers of the clean sink's life."""
        return list(self.sink.layers)

    @property
    def shown(self) -> list[int]:
        """Layers whose attention shows that life."""
        depth = int(self.sinks.model["n_layers"])
        return [layer + 1 for layer in self.sink.layers if layer + 1 < depth]

    @property
    def clean_lifetime(self) -> int:
        """Layers of the phase after which the unedited token is a sink."""
        own = [s for s in self.sinks.sinks if s.position == self.sink.position]
        return sum(s.lifetime for s in own if self.phase.start <= s.l_start < self.phase.stop)

    def lifetime(self, rows: CounterfactualRows) -> Int[Tensor, "row"]:
        """Layers of the phase after which each row's token is a sink."""
        return rows.is_sink[:, self.phase].sum(dim=1)

    def score(self, rows: CounterfactualRows) -> Float[Tensor, "row"]:
        """Direct sink score over heads and the layers that show the life."""
        return rows.direct_score[:, self.shown].mean(dim=(1, 2))

    def clean_score(self) -> float:
        """The same of the unedited token; NaN where the map has none."""
        if self.sinks.sink_score is None or not self.shown:
            return math.nan
        return float(self.sinks.sink_score[self.shown, :, self.sink.position].mean())

    def along(self, rows: CounterfactualRows, row: int) -> float:
        """Length of a row's residual along the sink direction after the onset layer."""
        onset = self.sink.l_start
        return float(rows.centered_norm[row, onset] * rows.centered_alignment[row, onset])

    def clean_norm(self) -> float:
        """Residual norm of the unedited token, mean over the life."""
        return _life_mean(self.sinks.norm, self.life, self.sink.position)

    def clean_alignment(self) -> float:
        """Centered alignment of the unedited token, mean over the life."""
        return _life_mean(self.sinks.centered_alignment, self.life, self.sink.position)

    def clean_length(self) -> float:
        """Length of the unedited token along the sink direction, mean over the life."""
        norm, alignment = self.sinks.centered_norm, self.sinks.centered_alignment
        if norm is None or alignment is None:
            return math.nan
        return _life_mean(norm * alignment, self.life, self.sink.position)

    def clean_along(self, position: int) -> float:
        """The same of any unedited token."""
        norm, alignment = self.sinks.centered_norm, self.sinks.centered_alignment
        if norm is None or alignment is None:
            return math.nan
        onset = self.sink.l_start
        return float(norm[onset, position] * alignment[onset, position])


def _matched(
    sinks: SinkMap, sink: Sink, phase: slice, n: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Ordinary tokens near the sink, of other kinds than any sink."""
    tokens, norm = sinks.tokens, sinks.centered_norm
    if tokens is None or norm is None:
        return ()
    ordinary: Bool[Tensor, "token"] = torch.ones(sinks.n_tokens, dtype=torch.bool)
    ordinary[[sinks.primary_position, *(s.position for s in sinks.sinks)]] = False
    n_later = torch.arange(sinks.n_tokens - 1, -1, -1)
    seen = ordinary & (n_later >= int(sinks.thresholds.get("min_queries", 1)))
    ids = torch.tensor([s.token_id for s in sinks.sinks])
    other = seen & ~torch.isin(tokens, ids)
    # Up to the last layer but one, where some models write large, unrelated vectors.
    inside = norm[phase.start : max(phase.start + 1, min(phase.stop, norm.shape[0] - 1))]
    median = inside.median(dim=1, keepdim=True).values
    plain = other & (inside <= PLAIN * median).all(dim=0)
    allowed = next((kind for kind in (plain, other, seen) if int(kind.sum()) >= n), seen)
    positions = allowed.nonzero().flatten()
    distance = ((positions + 1).log() - math.log(sink.position + 1)).abs()
    nearest = positions[distance.argsort(stable=True)[: POOL * n]].numpy()
    return tuple(sorted(rng.permutation(nearest)[:n].tolist()))


def _same_token(sinks: SinkMap, sink: Sink, n: int, rng: np.random.Generator) -> tuple[int, ...]:
    taken = {sinks.primary_position, *(s.position for s in sinks.sinks)}
    tokens = [] if sinks.tokens is None else sinks.tokens.tolist()
    same = [p for p, t in enumerate(tokens[:-1]) if t == sink.token_id and p not in taken]
    return tuple(sorted(rng.permutation(same)[:n].astype(int).tolist()))


def _life_mean(values: Float[Tensor, "layer token"] | None, life: list[int], token: int) -> float:
    return math.nan if values is None else float(values[life, token].mean())


class Sweep:
    """Every layer's ablations and transplants, for all sinks."""

    def __init__(
        self,
        targets: Sequence[Target],
        n_layers: int,
        *,
        attention: bool,
        reference: MeanActivations | None = None,
    ):
        self.interventions: list[Intervention] = []
        self._targets = targets
        self._ablated: dict[str, Int[Tensor, "sink layer"]] = {}
        for name, (site, edit) in _ABLATIONS.items():
            if site == "attn_out" and not attention:
                continue
            of_corpus = reference if isinstance(edit, Mean) else None
            self._ablated[name] = self._add(
                (len(targets), n_layers),
                [
                    Intervention(
                        site,
                        layer,
                        target.sink.position,
                        of_corpus.edit(site, layer) if of_corpus else edit,
                    )
                    for target in targets
                    for layer in range(n_layers)
                ],
            )
        self._transplanted = [
            self._add(
                (n_layers, len(target.matched)),
                [
                    Intervention("mlp_out", layer, position, Resample(target.sink.position))
                    for layer in range(n_layers)
                    for position in target.matched
                ],
            )
            for target in targets
        ]

    def _add(self, shape: tuple[int, ...], interventions: list[Intervention]) -> Tensor:
        first = len(self.interventions)
        self.interventions += interventions
        return torch.arange(first, len(self.interventions)).reshape(shape)

    def ablation(self, rows: CounterfactualRows, name: str) -> Ablation | None:
        """What an ablation did; None where it was not asked for."""
        if name not in self._ablated:
            return None
        lines = []
        for target, index in zip(self._targets, self._ablated[name], strict=True):
            alignment = rows.centered_alignment[index][:, target.life].mean(dim=1)
            norm = rows.norm[index][:, target.life].mean(dim=1)
            length = (rows.centered_norm * rows.centered_alignment)[index][:, target.life].mean(1)
            lifetime, score = target.lifetime(rows)[index], target.score(rows)[index]
            lines.append((alignment, norm, length, lifetime, score))
        return Ablation(*(torch.stack(column) for column in zip(*lines, strict=True)))

    def transplant(self, rows: CounterfactualRows) -> Transplant:
        """What the transplants did."""
        lines = []
        for target, index in zip(self._targets, self._transplanted, strict=True):
            lifetime = target.lifetime(rows)[index].float()
            score = target.score(rows)[index]
            lines.append([(lifetime > 0).float().mean(1), lifetime.mean(1), score.mean(1)])
        return Transplant(*(torch.stack(column) for column in zip(*lines, strict=True)))

    def controls(
        self, rows: CounterfactualRows, index: int, layer: int, n: int, seed: int
    ) -> list[Control]:
        """One sink's rows of the candidate layer, and of random others up to the onset (later ones
        cannot have made the sink, and would be no competition)."""
        target = self._targets[index]
        n_layers = target.sink.l_start + 1
        rng = np.random.default_rng([seed, target.sink.position, target.sink.l_start, 1])
        others = rng.permutation([one for one in range(n_layers) if one != layer])[:n]
        found: list[Control] = []
        for one in (layer, *sorted(int(other) for other in others)):
            kind: ControlKind = "writer" if one == layer else "other_layer"
            ablated = int(self._ablated["mlp_zero"][index, one])
            found.append(_control(rows, ablated, target, index, "necessity", kind))
            found += [
                _control(rows, int(row), target, index, "sufficiency", kind)
                for row in self._transplanted[index][one]
            ]
        return found


class ControlPlan:
    """The controls of each sink's candidate layer."""

    def __init__(self, targets: Sequence[Target], candidates: Sequence[int], seed: int):
        self.interventions: list[Intervention] = []
        self._targets = targets
        self._what: list[tuple[int, str, ControlKind]] = []
        for index, (target, layer) in enumerate(zip(targets, candidates, strict=True)):
            self._plan(index, target, layer, seed)

    def _plan(self, index: int, target: Target, layer: int, seed: int) -> None:
        def add(test: str, kind: ControlKind, position: int, edit: Edit) -> None:
            self.interventions.append(Intervention("mlp_out", layer, position, edit))
            self._what.append((index, test, kind))

        own = target.sink.position
        for position in target.matched:
            add("necessity", "ordinary", position, Zero())
        for position in target.same_token:
            add("necessity", "same_token", position, Zero())
        matched = target.matched
        for number, position in enumerate(matched):
            drawn = (seed, own, target.sink.l_start, 2 + number)
            add("sufficiency", "random_direction", position, RandomDirection(own, drawn))
            if target.same_token:
                source = target.same_token[number % len(target.same_token)]
                add("sufficiency", "same_token", position, Resample(source))
            if len(matched) > 1:
                add("sufficiency", "ordinary", position, Resample(matched[number - 1]))

    def controls(self, rows: CounterfactualRows | None, index: int) -> list[Control]:
        """One sink's controls."""
        if rows is None:
            return []
        return [
            _control(rows, row, self._targets[index], index, test, kind)
            for row, (sink, test, kind) in enumerate(self._what)
            if sink == index
        ]


def _control(
    rows: CounterfactualRows,
    row: int,
    target: Target,
    index: int,
    test: str,
    kind: ControlKind,
) -> Control:
    one = rows.rows[row][0]
    change = target.along(rows, row) - target.clean_along(one.position)
    return Control(
        sink=index,
        test=test,
        kind=kind,
        layer=one.layer,
        position=one.position,
        source=one.edit.position if isinstance(one.edit, Resample) else -1,
        effect=change if test == "sufficiency" else -change,
        at_once=bool(rows.is_sink[row, one.layer]),
        lifetime=int(rows.is_sink[row, target.phase].sum()),
    )
