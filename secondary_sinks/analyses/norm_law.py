"""Does the norm that a writer writes go with the attention drawn and with the lifetime?

Every sink of one or many texts is a point: how long a vector its writer wrote into it, how much
attention it drew, and for how many layers it lived. Each pair has three correlations, because sinks
differ in more than their norm:

* **pooled** over all sinks. Texts differ in length, and every score falls with it;
* **within texts**: ranks are taken in each text, so that differences between texts have no
  influence. This is the one to quote;
* **given position**: within texts, without what both share with the position. Early tokens have
  fewer rivals, and in many texts the early sinks are also the long ones.

The power law `score = factor * norm ** exponent` is fitted by least squares to the logarithms, with
a factor for each text and one exponent for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.direct_writes import direct_writes
from secondary_sinks.sinks.distinct_sinks import SinkKinds, distinct_sinks, repeats_note
from secondary_sinks.sinks.selection import check_maps
from secondary_sinks.sinks.sink import Kind
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers
from secondary_sinks.statistics import Correlation, grouped_interval, spearman

if TYPE_CHECKING:
    import pandas as pd

Written = Literal["written_norm", "written_length"]

Outcome = Literal["score", "lifetime"]

MIN_SPREAD = 0.01
"""Least standard deviation of the logarithm of what is written, within texts, for a power law: over
a range of less than a percent any exponent fits."""


def norm_law(
    model: Model,
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    sinks: SinkKinds = "secondary",
    writers: int | Mapping[int, int] | None = None,
    seed: int = 0,
    fwd_hooks: Sequence[UserHook] = (),
) -> NormLaw:
    """Does what a writer writes go with the attention that the sink draws and with its lifetime?

    For every sink: the norm of its writer's MLP output at its token, the length of that output
    along the sink direction (the primary's residual without the common component, after the sink's
    onset layer), its sink score (mean over heads and the layers that show its life) and its
    lifetime; between them Spearman's correlations and a power law (see the module for which number
    to quote). All intervals resample texts. Sinks that several texts share, because the texts begin
    alike, are counted once.

    >>> law = ss.norm_law(model, ss.detect_sinks(model, texts))
    >>> law.relation("score").within_texts
    >>> law.plot()

    Not evidence for: that the norm *causes* the attention. Sinks differ in their direction, their
    position and what later layers add; `dose_response` changes the norm alone.

    Args:
        model: any TransformerLens model.
        sink_maps: the maps of one or many texts, from `detect_sinks` in this model.
        sinks: "secondary", "primary" or "all".
        writers: the layer of the MLP that wrote the sinks: one for all, or by onset layer. By
            default the largest write of each sink (`sinks.writers.resolve_writers`).
        seed: of the resampling.
        fwd_hooks: the hooks with which the maps were made, in force here as well.

    Raises:
        InputError: no such sinks, a writer that is not a layer of the model or comes after the
            onset, or a map that does not belong to this model.
        ModelError: the parts of a residual do not add up in this model, or it cannot be measured.
    """
    several = check_maps(model, sink_maps, fwd_hooks=fwd_hooks)
    counted_sinks = distinct_sinks(several, sinks)
    if not counted_sinks:
        raise InputError(
            f"no {sinks} sinks in {counted(len(several), 'text')}, so there is nothing to relate: "
            "see margins() of their sink maps for the tokens that came nearest"
        )
    layers, norms, lengths = [], [], []
    rules: set[WriterRule] = set()
    for index in sorted({text for text, _ in counted_sinks}):
        sink_map, chosen = several[index], [s for text, s in counted_sinks if text == index]
        writes = direct_writes(model, sink_map, chosen, fwd_hooks=fwd_hooks)
        resolved = resolve_writers(model, sink_map, chosen, writers, by="onset", writes=writes)
        rules.add(resolved.rule)
        for row, (layer, sink) in enumerate(zip(resolved.layers, chosen, strict=True)):
            if layer > sink.l_start:
                raise InputError(f"writer {layer} of {sink!r} comes after its onset {sink.l_start}")
            layers.append(layer)
            norms.append(float(writes.mlp_norm[row, layer]))
            lengths.append(float(writes.mlp[row, layer]))
    norm, length = torch.tensor(norms), torch.tensor(lengths)
    score = torch.tensor([sink.sink_score for _, sink in counted_sinks])
    lifetime = torch.tensor([sink.lifetime for _, sink in counted_sinks])
    position = torch.tensor([sink.position for _, sink in counted_sinks])
    text = [text for text, _ in counted_sinks]
    n_texts = len(set(text))
    relations = relate(
        {"written_norm": norm, "written_length": length},
        {"score": score, "lifetime": lifetime.float()},
        position.float(),
        text,
        seed=seed,
    )
    return NormLaw(
        text=torch.tensor(text),
        n_texts=n_texts,
        position=position,
        tokens=tuple(sink.token for _, sink in counted_sinks),
        kinds=tuple(sink.kind for _, sink in counted_sinks),
        onset=torch.tensor([sink.l_start for _, sink in counted_sinks]),
        writer=torch.tensor(layers),
        writer_rule=rules.pop() if len(rules) == 1 else "mixed",
        written_norm=norm,
        written_length=length,
        score=score,
        lifetime=lifetime,
        relations=relations,
        notes=(*repeats_note(several, sinks), *notes_on(relations, n_texts)),
        provenance=several[0].provenance.extended(seed=seed),
    )


@dataclass(frozen=True)
class PowerLaw:
    """`outcome = factor * written ** exponent`, times a factor for each text."""

    exponent: float
    """NaN where it cannot be fitted: nothing varies within a text."""
    low: float
    high: float
    """95 % interval of the exponent, resampling texts."""
    factor: float
    """Geometric mean of the texts' factors."""
    factor_low: float
    factor_high: float
    explained: float
    """Share of the variance of log(outcome) within texts that the law explains."""
    residual: Float[Tensor, " sink"]
    """Of each sink: log(outcome) minus the law's value for that text and norm. NaN where one of the
    two is not above 0, and where a sink is alone in its text, whose factor fits it exactly."""


@dataclass(frozen=True)
class NormRelation:
    """One measure of what was written against one outcome."""

    written: Written
    outcome: Outcome
    pooled: Correlation
    """Spearman's over all sinks."""
    within_texts: Correlation
    """Spearman's of the ranks in each text: the number to quote."""
    given_position: Correlation
    """The same without what both share with the rank of the position."""
    law: PowerLaw


@dataclass(frozen=True)
class NormLaw(Result):
    """What writers wrote, and which sinks came of it; see `norm_law`."""

    text: Int[Tensor, " sink"]
    """Index of the text of each sink."""
    n_texts: int
    """Texts that these sinks stand in."""
    position: Int[Tensor, " sink"]
    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    """"secondary" or "primary", of each sink."""
    onset: Int[Tensor, " sink"]
    writer: Int[Tensor, " sink"]
    """Layer of the MLP that is taken as its writer."""
    writer_rule: WriterRule
    """How the writers were chosen."""
    written_norm: Float[Tensor, " sink"]
    """Norm of that MLP's output at the token."""
    written_length: Float[Tensor, " sink"]
    """Length of that output along the sink direction."""
    score: Float[Tensor, " sink"]
    """Sink score, mean over heads and the layers that show the life; NaN near a text's end."""
    lifetime: Int[Tensor, " sink"]
    """Number of layers of the sink's life."""
    relations: tuple[NormRelation, ...]
    """Norm and length against score and lifetime."""
    notes: tuple[str, ...]
    """What a reader must know: repeated sinks, outcomes that do not vary."""
    provenance: Provenance
    """Of the first text, with the seed of the resampling."""

    def relation(
        self, outcome: Outcome = "score", written: Written = "written_norm"
    ) -> NormRelation:
        """The correlations and the law of one pair of measures."""
        return next(
            pair for pair in self.relations if (pair.outcome, pair.written) == (outcome, written)
        )

    def __repr__(self) -> str:
        score, lifetime = self.relation("score"), self.relation("lifetime")
        return (
            f"NormLaw({self.provenance.model.name!r}, {counted(len(self.tokens), 'sink')} of "
            f"{counted(self.n_texts, 'text')}: within texts rho {score.within_texts.rho:.2f} with "
            f"score, {lifetime.within_texts.rho:.2f} with lifetime; "
            f"score ~ norm^{score.law.exponent:.2f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink, with what the law of norm and score leaves over."""
        import pandas as pd

        return pd.DataFrame(
            {
                "text": self.text.tolist(),
                "position": self.position.tolist(),
                "token": list(self.tokens),
                "kind": list(self.kinds),
                "onset": self.onset.tolist(),
                "writer": self.writer.tolist(),
                "written_norm": self.written_norm.tolist(),
                "written_length": self.written_length.tolist(),
                "score": self.score.tolist(),
                "lifetime": self.lifetime.tolist(),
                "log_residual": self.relation("score").law.residual.tolist(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row for each pair of measures: correlations and law, with their intervals."""
        import pandas as pd

        rows = []
        for pair in self.relations:
            row: dict[str, Any] = {"written": pair.written, "outcome": pair.outcome}
            for name in ("pooled", "within_texts", "given_position"):
                value: Correlation = getattr(pair, name)
                row |= {name: value.rho, f"{name}_low": value.low, f"{name}_high": value.high}
            law = pair.law
            row |= {"exponent": law.exponent, "exponent_low": law.low, "exponent_high": law.high}
            row |= {"factor": law.factor, "explained": law.explained}
            rows.append(row)
        return pd.DataFrame(rows)

    def _notebook_frame(self) -> pd.DataFrame:
        return self.summary()


def relate(
    written: dict[Written, Float[Tensor, " sink"]],
    outcomes: dict[Outcome, Float[Tensor, " sink"]],
    position: Float[Tensor, " sink"],
    text: Sequence[int],
    *,
    seed: int,
) -> tuple[NormRelation, ...]:
    """Every measure of what was written against every outcome."""
    return tuple(
        NormRelation(
            written=name,
            outcome=outcome,
            pooled=spearman(x, y, text, seed=seed),
            within_texts=spearman(x, y, text, within=text, seed=seed),
            given_position=spearman(x, y, text, within=text, given=position, seed=seed),
            law=power_law(x, y, text, seed=seed),
        )
        for outcome, y in outcomes.items()
        for name, x in written.items()
    )


def power_law(
    x: Float[Tensor, " sink"], y: Float[Tensor, " sink"], text: Sequence[int], *, seed: int = 0
) -> PowerLaw:
    """Fit `y = factor[text] * x ** exponent` by least squares to the logarithms.

    Points where x or y is not above 0 have no logarithm and are left out.
    """
    positive = ((x > 0) & (y > 0)).numpy()
    log_x, log_y = x[positive].double().log().numpy(), y[positive].double().log().numpy()
    labels = np.asarray(text)[positive]
    inner_x, inner_y = _centered(log_x, labels), _centered(log_y, labels)

    def exponent_of(index: Any) -> float:
        square = float(inner_x[index] @ inner_x[index])
        if not square > MIN_SPREAD**2 * len(index):
            return math.nan
        return float(inner_x[index] @ inner_y[index]) / square

    def factor_of(index: Any) -> float:
        left = log_y[index] - exponent_of(index) * log_x[index]
        means = [left[labels[index] == label].mean() for label in np.unique(labels[index])]
        return math.exp(float(np.mean(means))) if means else math.nan

    everything = np.arange(len(labels))
    residual = torch.full((len(x),), torch.nan)
    exponent = exponent_of(everything)
    variance = float(inner_y @ inner_y)
    if math.isnan(exponent) or not variance > 1e-18:
        nan = math.nan
        return PowerLaw(nan, nan, nan, nan, nan, nan, nan, residual)
    left = inner_y - exponent * inner_x
    alone = np.array([(labels == label).sum() == 1 for label in labels])
    residual[torch.from_numpy(positive)] = torch.from_numpy(np.where(alone, np.nan, left)).float()
    low, high = grouped_interval(labels.tolist(), exponent_of, seed=seed)
    factor_low, factor_high = grouped_interval(labels.tolist(), factor_of, seed=seed)
    return PowerLaw(
        exponent=exponent,
        low=low,
        high=high,
        factor=factor_of(everything),
        factor_low=factor_low,
        factor_high=factor_high,
        explained=1 - float(left @ left) / variance,
        residual=residual,
    )


def _centered(values: Any, labels: Any) -> Any:
    """Values without the mean of their label."""
    centered = values.copy()
    for label in np.unique(labels):
        centered[labels == label] -= values[labels == label].mean()
    return centered


def notes_on(relations: Sequence[NormRelation], n_texts: int) -> tuple[str, ...]:
    """What cannot be said of these sinks, and why."""
    notes = [
        f"no correlation with the {outcome} within texts: it does not vary between the sinks of a "
        "text, or there are too few of them"
        for outcome in ("score", "lifetime")
        if all(math.isnan(r.within_texts.rho) for r in relations if r.outcome == outcome)
    ]
    if n_texts < 2:
        notes.append("all sinks are of one text, so there are no intervals: pass several texts")
    return tuple(notes)
