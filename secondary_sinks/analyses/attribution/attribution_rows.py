"""The rows of an attribution: every layer's ablation and transplant, and their controls.

A `Target` is one sink with the tokens that it is compared with. A `Sweep` holds the rows of all
sinks and all layers, a `ControlPlan` those that depend on which layer is the candidate. Both make a
list of interventions, remember which row is which, and read the result of `counterfactuals` back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from secondary_sinks.analyses.attribution.attribution_result import Ablation, Transplant
from secondary_sinks.analyses.target import Target
from secondary_sinks.intervene.counterfactuals import CounterfactualRows
from secondary_sinks.intervene.edits import Edit, Mean, Resample, Zero
from secondary_sinks.intervene.interventions import EditSite, Intervention
from secondary_sinks.intervene.mean_activations import MeanActivations
from secondary_sinks.sinks.writers import Control, ControlKind

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
