"""Which MLP made each sink: is it necessary, is it sufficient, does it write the vector itself?

The answer takes four steps, each of which can be read by itself:

1. `sinks.direct_writes` projects what each block adds to the token on the sink direction, in one
   pass. The MLP up to the onset that writes most is the *candidate*.
2. `_Plan` lists the interventions, one row each: every layer's MLP and attention output ablated at
   the sink's token, every layer's MLP output transplanted into ordinary tokens, and the controls of
   the candidate. `counterfactuals` runs them all.
3. `_Plan` reads the rows back; `analyses.target` measures them.
4. `sinks.writers` names the writer and its feeders (`judge`), and compares the candidate with its
   controls (`compare`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance, check_same_model
from secondary_sinks.intervene.counterfactuals import CounterfactualRows, counterfactuals
from secondary_sinks.intervene.edits import Edit, Mean, Resample, Zero
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.interventions import EditSite, Intervention
from secondary_sinks.intervene.mean_activations import MeanActivations
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.direct_writes import DirectWrite, direct_writes
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Kind
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap
from secondary_sinks.sinks.writers import (
    MAX_LEFT,
    Comparison,
    Control,
    ControlKind,
    Verdict,
    compare,
    judge,
    largest_writes,
)

if TYPE_CHECKING:
    import pandas as pd

ABLATIONS: dict[str, tuple[EditSite, Edit]] = {
    "mlp_zero": ("mlp_out", Zero()),
    "mlp_mean": ("mlp_out", Mean()),
    "attention_zero": ("attn_out", Zero()),
    "attention_mean": ("attn_out", Mean()),
}
"""By field of the result: which output is ablated, and how."""

_ControlRow: TypeAlias = tuple[int, str, ControlKind]
"""Index of a row, the test that it belongs to, and what it is."""


def attribute_to_mlps(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    attention: bool = True,
    means: MeanActivations | None = None,
    n_controls: int = 8,
    seed: int = 0,
    method: Method = "auto",
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> MlpAttribution:
    """Which MLP wrote each sink, and which earlier layers does that MLP need?

    >>> sink_map = ss.detect_sinks(model, text)
    >>> attribution = ss.attribute_to_mlps(model, sink_map)
    >>> ss.remove_sinks(model, sink_map, writers=attribution.writers)

    For every sink and every layer: *necessity* (that MLP's output at the token set to zero, and to
    the mean of ordinary tokens; the same for attention blocks), *sufficiency* (that MLP's output at
    the token in the place of the same MLP's output at ordinary tokens nearby), and *direct write*
    (what each block adds along the sink direction `(r - c) / |r - c|`, with `r` the primary's
    residual and `c` the common component after the sink's onset layer; the parts are checked to add
    up). The writer is the layer up to the onset that writes the largest part, if it is also
    necessary and sufficient; feeders are earlier layers that are necessary and write little. The
    rule, with its thresholds, is `sinks.writers.judge`. A sink whose tests disagree has
    `writer=None` and a `reason`. A chosen token that is not a sink is measured in the same way, and
    its reason says that it is not a sink.

    Controls are part of the result: what zeroing the same layer does to matched ordinary tokens and
    to ordinary tokens with the same token id; what random other layers do; and what becomes of the
    matched tokens when they get, in the place of the candidate's output, random directions of its
    norm, or the same layer's output of such other tokens.

    Not evidence for: that the sink matters for the output of the model (no later token is
    measured), or that a feeder acts through the writer's input alone. Without the output of layer 0
    a token loses what tells it from others, so the necessity of layer 0 says little.

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sinks: which sinks or positions; see `SinkMap.select`.
        attention: ablate the attention blocks as well.
        means: means of many texts at `mlp_out` (and at `attn_out` with `attention`), from
            `mean_activations`, for the mean ablations; None takes the mean over the ordinary tokens
            of the same text.
        n_controls: how many matched tokens get each transplant, and how many controls of each kind
            there are at most; a short text has fewer.
        seed: of every random choice.
        method: engine of the rows; see `counterfactuals`.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Returns:
        `MlpAttribution`: a record for each sink, and every effect as [sink, layer].

    Raises:
        InputError: nothing is selected (`SinkMap.select`), or a sink map or means that do not
            belong to this model.
        ModelError: the parts of a residual do not add up in this model, or it cannot be measured.
    """
    if n_controls < 1:
        raise InputError(f"n_controls must be 1 or more, got {n_controls}")
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    if means is not None:
        check_same_model(means.provenance, model, fwd_hooks, what="the mean activations")
    chosen = sink_map.select(sinks)
    targets = [Target.of(sink_map, sink, n_controls=n_controls, seed=seed) for sink in chosen]
    writes = direct_writes(model, sink_map, chosen, fwd_hooks=fwd_hooks)
    plan = _Plan(
        targets,
        largest_writes(writes, chosen),
        attention=attention,
        means=means,
        n_controls=n_controls,
        seed=seed,
    )
    rows = counterfactuals(
        model,
        sink_map,
        plan.interventions,
        method=method,
        progress=progress,
        fwd_hooks=fwd_hooks,
    )
    ablations = plan.ablations(rows)
    transplant = plan.transplant(rows)
    controls = [plan.controls(rows, index) for index in range(len(targets))]
    return MlpAttribution(
        sinks=tuple(
            _record(index, target, ablations, transplant, writes, controls[index], seed)
            for index, target in enumerate(targets)
        ),
        mlp_zero=ablations["mlp_zero"],
        mlp_mean=ablations["mlp_mean"],
        attention_zero=ablations.get("attention_zero"),
        attention_mean=ablations.get("attention_mean"),
        transplant=transplant,
        direct_write=writes,
        controls=tuple(itertools.chain.from_iterable(controls)),
        primary_position=sink_map.primary_position,
        provenance=sink_map.provenance.extended(engine=rows.engine, seed=seed),
    )


@dataclass(frozen=True)
class Ablation:
    """What became of each sink when one block's output at its token was ablated.

    Each field is [sink, layer], the layer that of the ablated block.
    """

    alignment: Float[Tensor, " sink layer"]
    """Centered alignment with the primary, mean over the layers of the clean sink's life."""
    norm: Float[Tensor, " sink layer"]
    """Residual norm, mean over the same layers."""
    length: Float[Tensor, " sink layer"]
    """Length along the sink direction (centered norm times centered alignment), mean over the same
    layers."""
    lifetime: Int[Tensor, " sink layer"]
    """Number of layers of its primary phase after which the token is still a sink."""
    score: Float[Tensor, " sink layer"]
    """Direct sink score, mean over heads and the layers that show the clean sink's life."""


@dataclass(frozen=True)
class Transplant:
    """What became of ordinary tokens that were given each layer's MLP output of a sink's token.

    Each field is [sink, layer]; NaN where the text has no ordinary token to transplant into.
    """

    share: Float[Tensor, " sink layer"]
    """Share of them that became sinks."""
    lifetime: Float[Tensor, " sink layer"]
    """Mean number of layers for which they were."""
    score: Float[Tensor, " sink layer"]
    """Mean direct sink score, over heads and the layers that show the clean sink's life."""


@dataclass(frozen=True)
class SinkAttribution:
    """One sink, the MLP that made it, and how sure that is."""

    position: int
    token: str
    token_id: int
    kind: Kind
    """"chosen" for a token that is not a sink: its "life" is the layers of `SinkMap.select`."""
    onset: int
    lifetime: int
    """0 for a token that is not a sink."""
    norm: float
    """Residual norm, mean over the life."""
    alignment: float
    """Centered alignment, mean over the life."""
    length: float
    """Length along the sink direction (centered norm times centered alignment), mean over the
    life."""
    score: float
    """Sink score, mean over heads and the layers that show the life; NaN where none does."""
    verdict: Verdict
    attention_feeders: tuple[int, ...]
    """Attention blocks up to the onset without whose output at the token there is no sink."""
    comparison: Comparison

    @property
    def writer(self) -> int | None:
        """Layer of the MLP that wrote the sink; None where the tests disagree."""
        return self.verdict.writer

    @property
    def feeders(self) -> tuple[int, ...]:
        """Earlier layers whose MLPs the writer needs."""
        return self.verdict.feeders


@dataclass(frozen=True)
class MlpAttribution(Result):
    """Which MLP wrote each sink of a text, with every layer's effect; see `attribute_to_mlps`."""

    sinks: tuple[SinkAttribution, ...]
    mlp_zero: Ablation
    """Each MLP's output at the token set to zero."""
    mlp_mean: Ablation
    """Each MLP's output at the token set to its mean over ordinary tokens."""
    attention_zero: Ablation | None
    """The same for attention blocks; None with `attention=False`."""
    attention_mean: Ablation | None
    transplant: Transplant
    direct_write: DirectWrite
    controls: tuple[Control, ...]
    primary_position: int
    provenance: Provenance

    @property
    def n_layers(self) -> int:
        """Depth of the model."""
        return self.mlp_zero.norm.shape[1]

    @property
    def writers(self) -> dict[int, int]:
        """Position -> layer of the MLP, for sinks that have a writer; other analyses take it as
        `writers=`. Of a token with several lives it is the writer of the first."""
        writers: dict[int, int] = {}
        for sink in self.sinks:
            if sink.writer is not None:
                writers.setdefault(sink.position, sink.writer)
        return writers

    def __repr__(self) -> str:
        writers = [sink.writer for sink in self.sinks if sink.kind != "chosen"]
        n_chosen = len(self.sinks) - len(writers)
        parts = [spell_writers(writers)] if writers or not n_chosen else []
        if n_chosen:
            are = "that is not a sink" if n_chosen == 1 else "that are not sinks"
            parts.append(f"{counted(n_chosen, 'token')} {are}")
        return f"MlpAttribution({self.provenance.model.name!r}, {'; '.join(parts)})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: its writer, its feeders, and how the tests came out."""
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            verdict, comparison = sink.verdict, sink.comparison
            layer = verdict.candidate
            rows.append(
                {
                    "position": sink.position,
                    "token": sink.token,
                    "kind": sink.kind,
                    "onset": sink.onset,
                    "lifetime": sink.lifetime,
                    "writer": sink.writer,
                    "feeders": sink.feeders,
                    "co_writers": verdict.co_writers,
                    "attention_feeders": sink.attention_feeders,
                    "write_share": verdict.write_share,
                    "runner_up": verdict.runner_up,
                    "runner_up_share": verdict.runner_up_share,
                    "norm": sink.norm,
                    "norm_without": float(self.mlp_zero.norm[index, layer]),
                    "length_left": verdict.length_left,
                    "lifetime_without": int(self.mlp_zero.lifetime[index, layer]),
                    "transplant_share": verdict.transplant_share,
                    "transplant_lifetime": float(self.transplant.lifetime[index, layer]),
                    "necessity_percentile": comparison.necessity_percentile,
                    "sufficiency_percentile": comparison.sufficiency_percentile,
                    "p_value": comparison.p_value,
                    "reason": verdict.reason,
                }
            )
        return pd.DataFrame(rows).astype({"writer": "Int64", "runner_up": "Int64"})

    def layers_frame(self) -> pd.DataFrame:
        """One row for each sink and layer: every effect of that layer's MLP and attention."""
        import pandas as pd

        shape = (len(self.sinks), self.n_layers)
        positions = torch.tensor([sink.position for sink in self.sinks])
        columns = {
            "position": positions.repeat_interleave(self.n_layers),
            "layer": torch.arange(self.n_layers).repeat(len(self.sinks)),
        }
        for group in (*ABLATIONS, "transplant", "direct_write"):
            effects = getattr(self, group)
            for entry in dataclasses.fields(effects) if effects is not None else ():
                value = getattr(effects, entry.name)
                if isinstance(value, Tensor) and value.shape == shape:
                    columns[f"{group}.{entry.name}"] = value.flatten()
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()})

    def controls_frame(self) -> pd.DataFrame:
        """One row for each control, and for each row of the candidates themselves."""
        import pandas as pd

        return pd.DataFrame(self.controls, columns=Control._fields)


def spell_writers(writers: Iterable[int | None]) -> str:
    """The writers of some sinks, the most common first: "writers: MLP 5 of 6 sinks, none of 1"."""
    counts = Counter(writers).most_common()
    if not counts:
        return "no sinks"
    (first, n_first), *others = [
        ("none" if layer is None else f"MLP {layer}", n) for layer, n in counts
    ]
    if not others:
        return f"writer of {counted(n_first, 'sink')}: {first}"
    parts = [f"{first} of {counted(n_first, 'sink')}", *(f"{name} of {n}" for name, n in others)]
    return f"writers: {', '.join(parts)}"


@dataclass(frozen=True)
class RandomDirection:
    """An edit: a random direction, as long as the activation of another token at the site."""

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


class _Plan:
    """The interventions of an attribution, and which row of their result is which."""

    def __init__(
        self,
        targets: Sequence[Target],
        candidates: Sequence[int],
        *,
        attention: bool,
        means: MeanActivations | None,
        n_controls: int,
        seed: int,
    ):
        self.interventions: list[Intervention] = []
        self._targets = targets
        layers = range(int(targets[0].sink_map.n_layers or 0))
        self._ablation_rows: dict[str, Int[Tensor, " sink layer"]] = {}
        for name, (site, edit) in ABLATIONS.items():
            if site == "attn_out" and not attention:
                continue
            corpus = means if isinstance(edit, Mean) else None
            edits = [corpus.edit(site, layer) if corpus else edit for layer in layers]
            self._ablation_rows[name] = torch.tensor(
                [
                    [self._add(site, layer, target.sink.position, edits[layer]) for layer in layers]
                    for target in targets
                ]
            )
        self._transplant_rows = [self._transplants(target, layers) for target in targets]
        self._control_rows = [
            [
                *self._layer_controls(index, candidate, n_controls, seed),
                *self._token_controls(targets[index], candidate, seed),
            ]
            for index, candidate in enumerate(candidates)
        ]

    def _add(self, site: EditSite, layer: int, position: int, edit: Edit) -> int:
        """Add an intervention; returns its row."""
        self.interventions.append(Intervention(site, layer, position, edit))
        return len(self.interventions) - 1

    def _transplants(self, target: Target, layers: range) -> Int[Tensor, " layer matched"]:
        edit = Resample(target.sink.position)
        return torch.tensor(
            [[self._add("mlp_out", m, p, edit) for p in target.matched] for m in layers],
            dtype=torch.long,
        )

    def _layer_controls(
        self, index: int, candidate: int, n_controls: int, seed: int
    ) -> Iterator[_ControlRow]:
        """The rows of a sink's candidate and of random other layers up to the onset; later layers
        cannot have made the sink. All of them are among the ablations and transplants."""
        sink = self._targets[index].sink
        rng = np.random.default_rng([seed, sink.position, sink.l_start, 1])
        others = rng.permutation([m for m in range(sink.l_start + 1) if m != candidate])
        for layer in (candidate, *sorted(int(other) for other in others[:n_controls])):
            kind: ControlKind = "writer" if layer == candidate else "other_layer"
            yield int(self._ablation_rows["mlp_zero"][index, layer]), "necessity", kind
            for row in self._transplant_rows[index][layer]:
                yield int(row), "sufficiency", kind

    def _token_controls(self, target: Target, candidate: int, seed: int) -> Iterator[_ControlRow]:
        """New rows: the candidate ablated at ordinary tokens, and other vectors than the sink's in
        the place of the candidate's output at the matched ones."""
        sink, matched, same_token = target.sink, target.matched, target.same_token
        for position in matched:
            yield self._add("mlp_out", candidate, position, Zero()), "necessity", "ordinary"
        for position in same_token:
            yield self._add("mlp_out", candidate, position, Zero()), "necessity", "same_token"
        for number, position in enumerate(matched):
            drawn = (seed, sink.position, sink.l_start, 2 + number)
            edits: list[tuple[ControlKind, Edit]] = [
                ("random_direction", RandomDirection(sink.position, drawn))
            ]
            if same_token:
                edits.append(("same_token", Resample(same_token[number % len(same_token)])))
            if len(matched) > 1:
                edits.append(("ordinary", Resample(matched[number - 1])))
            for kind, edit in edits:
                yield self._add("mlp_out", candidate, position, edit), "sufficiency", kind

    def ablations(self, rows: CounterfactualRows) -> dict[str, Ablation]:
        """What each ablation did, by its name in `ABLATIONS`."""
        return {
            name: Ablation(**_stacked(self._measured(rows, sink_rows)))
            for name, sink_rows in self._ablation_rows.items()
        }

    def transplant(self, rows: CounterfactualRows) -> Transplant:
        """What the transplants did."""
        means = [
            {
                "share": (measured["lifetime"] > 0).float().mean(dim=1),
                "lifetime": measured["lifetime"].float().mean(dim=1),
                "score": measured["score"].mean(dim=1),
            }
            for measured in self._measured(rows, self._transplant_rows)
        ]
        return Transplant(**_stacked(means))

    def _measured(
        self, rows: CounterfactualRows, sink_rows: Iterable[Tensor]
    ) -> list[dict[str, Tensor]]:
        """The measures of each sink's rows."""
        return [
            target.measure(rows, index)
            for target, index in zip(self._targets, sink_rows, strict=True)
        ]

    def controls(self, rows: CounterfactualRows, index: int) -> list[Control]:
        """The controls of one sink."""
        target = self._targets[index]
        onset, sink_map = target.sink.l_start, target.sink_map
        length = rows.centered_norm[:, onset] * rows.centered_alignment[:, onset]
        clean = sink_map.array("centered_norm") * sink_map.array("centered_alignment")
        controls = []
        for row, test, kind in self._control_rows[index]:
            intervention = rows.rows[row][0]
            layer, position, edit = intervention.layer, intervention.position, intervention.edit
            gain = float(length[row]) - float(clean[onset, position])
            controls.append(
                Control(
                    sink=index,
                    test=test,
                    kind=kind,
                    layer=layer,
                    position=position,
                    source=edit.position if isinstance(edit, Resample) else -1,
                    effect=gain if test == "sufficiency" else -gain,
                    at_once=bool(rows.is_sink[row, layer]),
                    lifetime=int(rows.is_sink[row, target.phase].sum()),
                )
            )
        return controls


def _stacked(of_sinks: Sequence[dict[str, Tensor]]) -> dict[str, Float[Tensor, " sink layer"]]:
    """The fields of a result from those of its sinks."""
    return {name: torch.stack([sink[name] for sink in of_sinks]) for name in of_sinks[0]}


def _record(
    index: int,
    target: Target,
    ablations: Mapping[str, Ablation],
    transplant: Transplant,
    writes: DirectWrite,
    controls: Sequence[Control],
    seed: int,
) -> SinkAttribution:
    sink, length = target.sink, target.clean_length()
    whole = length if length > 0 else math.nan
    without, attention = ablations["mlp_zero"], ablations.get("attention_zero")
    attention_feeders: list[int] = []
    if attention is not None and sink.kind != "chosen":
        gone = (attention.lifetime[index] == 0) | (attention.length[index] <= MAX_LEFT * length)
        attention_feeders = gone[: sink.l_start + 1].nonzero().flatten().tolist()
    return SinkAttribution(
        position=sink.position,
        token=sink.token,
        token_id=sink.token_id,
        kind=sink.kind,
        onset=sink.l_start,
        lifetime=target.clean_lifetime,
        norm=target.clean_norm(),
        alignment=target.clean_alignment(),
        length=length,
        score=target.clean_score(),
        verdict=judge(
            sink,
            writes.excess[index],
            float(writes.excess_projection[index, sink.l_start]),
            without.lifetime[index],
            without.length[index] / whole,
            transplant.share[index],
        ),
        attention_feeders=tuple(attention_feeders),
        comparison=compare(controls, seed=seed),
    )
