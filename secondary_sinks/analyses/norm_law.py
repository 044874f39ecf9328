"""Does the norm that a writer writes go with attention drawn and with lifetime?

Every secondary sink of one or many texts is a point: how long a vector its writer wrote into it,
how much attention it drew, how many layers it lived. Three correlations are told of each pair,
because sinks differ in more than their norm:

* **pooled** over all sinks. Texts differ in length, and every score falls with it;
* **within texts**: ranks are taken in each text, so that no difference between texts plays a part.
  This is the one to quote;
* **given position**: within texts, and with what both share with the position taken off. Early
  tokens have fewer rivals, and in many texts the early sinks are also the long ones.

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
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.result import Result
from secondary_sinks.sinks.corpus import Found, distinct_sinks, listed, repeats_note
from secondary_sinks.sinks.direct_writes import direct_writes
from secondary_sinks.sinks.selection import sink_maps_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import candidates, given_writers
from secondary_sinks.statistics import Correlation, grouped_interval, grouped_spearman

if TYPE_CHECKING:
    import pandas as pd

Written = Literal["written_norm", "written_length"]

Outcome = Literal["score", "lifetime"]


def norm_law(
    model: Any,
    maps_or_texts: Text | SinkMap | Sequence[SinkMap],
    *,
    writers: int | Mapping[int, int] | None = None,
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> NormLaw:
    """Relate what writers write to the attention that the sinks draw and to how long they live.

    For every secondary sink: the norm of its writer's MLP output at its token, the length of that
    output along the sink direction (the primary's residual without the common component, after the
    sink's onset layer), its sink score (mean over heads and the layers that show its life) and its
    lifetime. Spearman's correlations and a power law (`analyses.norm_law` tells how, and which
    number to quote); all intervals resample texts. Sinks that several texts share, because the
    texts begin alike, are counted once.

    What it is not evidence for: that the norm *causes* the attention. Sinks differ in their
    direction, their position and what later layers add; `dose_response` changes the norm alone.

    Args:
        model: any TransformerLens model.
        maps_or_texts: one text or several (see `detect_sinks`), or their sink maps.
        writers: layer of the MLP that wrote the sinks: one for all, or by onset layer. None takes,
            sink by sink, the layer up to the onset whose MLP writes most along the sink direction,
            beyond what ordinary tokens get; `attribute_to_mlps` tests whether it is the writer.
        seed: of the resampling; recorded with the result.
        chat: strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: no secondary sinks, or a writer that is no layer of the model or comes after
            the onset; a sink map of another model or criterion.
        ModelError: the parts of a residual do not add up in this model, or it cannot be measured.
    """
    maps = listed(sink_maps_of(model, maps_or_texts, chat=chat, fwd_hooks=fwd_hooks))
    found = list(distinct_sinks(maps))
    if not found:
        raise InputError(
            "no secondary sinks in these texts, so there is no law to be seen: see "
            "detect_sinks(...).margins() for the tokens that came nearest"
        )
    rows = [
        row
        for text in sorted({one.text for one in found})
        for row in _written(model, maps[text], _of(found, text), writers, fwd_hooks)
    ]
    layer = torch.tensor([int(row[0]) for row in rows])
    norm, length = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    score = torch.tensor([one.sink.sink_score for one in found])
    lifetime = torch.tensor([one.sink.lifetime for one in found])
    position = torch.tensor([one.sink.position for one in found])
    text = [one.text for one in found]
    relations = relate(
        {"written_norm": norm, "written_length": length},
        {"score": score, "lifetime": lifetime.float()},
        position.float(),
        text,
        seed=seed,
    )
    n_texts = len(set(text))
    return NormLaw(
        text=torch.tensor(text),
        n_texts=n_texts,
        position=position,
        tokens=tuple(one.sink.token for one in found),
        onset=torch.tensor([one.sink.l_start for one in found]),
        writer=layer,
        written_norm=norm,
        written_length=length,
        score=score,
        lifetime=lifetime,
        relations=relations,
        seed=seed,
        notes=(*repeats_note(maps, len(found)), *notes_on(relations, n_texts)),
        model=maps[0].model,
    )


def _of(found: Sequence[Found], text: int) -> list[Sink]:
    return [one.sink for one in found if one.text == text]


def _written(
    model: Any,
    sinks: SinkMap,
    chosen: Sequence[Sink],
    writers: int | Mapping[int, int] | None,
    fwd_hooks: Sequence[UserHook],
) -> list[tuple[int, float, float]]:
    """Of each sink of one text: the writer, the norm of its output, its length along the sink
    direction."""
    writes = direct_writes(model, sinks, chosen, fwd_hooks=fwd_hooks)
    if writers is None:
        layers = candidates(writes, chosen)
    else:
        layers = given_writers(writers, chosen, int(sinks.model["n_layers"]), by="onset")
    for layer, sink in zip(layers, chosen, strict=True):
        if layer > sink.l_start:
            raise InputError(f"writer {layer} of {sink!r} comes after its onset {sink.l_start}")
    return [
        (layer, float(writes.mlp_norm[index, layer]), float(writes.mlp[index, layer]))
        for index, layer in enumerate(layers)
    ]


@dataclass(frozen=True)
class PowerLaw:
    """`outcome = factor * written ** exponent`, the factor of a text times the common one."""

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
    residual: Float[Tensor, "sink"]
    """Of each sink: log(outcome) less what the law says of that text and norm; NaN where one of
    the two is not above 0, and where a sink is alone in its text, whose factor fits it anyhow."""


@dataclass(frozen=True)
class NormRelation:
    """One measure of what was written against one of what came of it."""

    written: Written
    outcome: Outcome
    pooled: Correlation
    """Spearman's over all sinks."""
    within_texts: Correlation
    """Spearman's of the ranks in each text: the number to quote."""
    given_position: Correlation
    """The same with the rank of the position taken off."""
    law: PowerLaw


@dataclass(frozen=True)
class NormLaw(Result):
    """What writers wrote, against what kind of sink came of it; see `norm_law`."""

    text: Int[Tensor, "sink"]
    """Index of the text of each sink."""
    n_texts: int
    position: Int[Tensor, "sink"]
    tokens: tuple[str, ...]
    onset: Int[Tensor, "sink"]
    writer: Int[Tensor, "sink"]
    """Layer of the MLP that is taken to have written it."""
    written_norm: Float[Tensor, "sink"]
    """Norm of that MLP's output at the token."""
    written_length: Float[Tensor, "sink"]
    """Length of that output along the sink direction."""
    score: Float[Tensor, "sink"]
    """Sink score, mean over heads and the layers that show the life; NaN near a text's end."""
    lifetime: Int[Tensor, "sink"]
    """Number of layers of the sink's life."""
    relations: tuple[NormRelation, ...]
    """Norm and length against score and lifetime."""
    seed: int
    notes: tuple[str, ...]
    """What a reader must know: repeated sinks, outcomes that do not vary."""
    model: dict[str, Any]

    def relation(
        self, outcome: Outcome = "score", written: Written = "written_norm"
    ) -> NormRelation:
        """The correlations and the law of one pair of measures."""
        return next(
            one for one in self.relations if (one.outcome, one.written) == (outcome, written)
        )

    def __repr__(self) -> str:
        score, lifetime = self.relation("score"), self.relation("lifetime")
        return (
            f"NormLaw({self.model.get('name', '?')!r}, {len(self.tokens)} sinks of {self.n_texts} "
            f"texts: within texts rho {score.within_texts.rho:.2f} with score, "
            f"{lifetime.within_texts.rho:.2f} with lifetime; score ~ norm^{score.law.exponent:.2f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink, with what the law of norm and score leaves over."""
        import pandas as pd

        residual = self.relation("score").law.residual
        return pd.DataFrame(
            {
                "text": self.text.tolist(),
                "position": self.position.tolist(),
                "token": list(self.tokens),
                "onset": self.onset.tolist(),
                "writer": self.writer.tolist(),
                "written_norm": self.written_norm.tolist(),
                "written_length": self.written_length.tolist(),
                "score": self.score.tolist(),
                "lifetime": self.lifetime.tolist(),
                "log_residual": residual.tolist(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row for each pair of measures: correlations and law, with their intervals."""
        import pandas as pd

        rows = []
        for one in self.relations:
            row: dict[str, Any] = {"written": one.written, "outcome": one.outcome}
            for name in ("pooled", "within_texts", "given_position"):
                found = getattr(one, name)
                row |= {name: found.rho, f"{name}_low": found.low, f"{name}_high": found.high}
            law = one.law
            row |= {"exponent": law.exponent, "exponent_low": law.low, "exponent_high": law.high}
            row |= {"factor": law.factor, "explained": law.explained}
            rows.append(row)
        return pd.DataFrame(rows)

    def _notebook_frame(self) -> pd.DataFrame:
        return self.summary()


def relate(
    written: dict[Written, Float[Tensor, "sink"]],
    outcomes: dict[Outcome, Float[Tensor, "sink"]],
    position: Float[Tensor, "sink"],
    text: Sequence[int],
    *,
    seed: int,
) -> tuple[NormRelation, ...]:
    """Every measure of what was written against every outcome."""
    relations = []
    for outcome, y in outcomes.items():
        for name, x in written.items():
            relations.append(
                NormRelation(
                    written=name,
                    outcome=outcome,
                    pooled=grouped_spearman(x, y, text, seed=seed),
                    within_texts=grouped_spearman(x, y, text, within=text, seed=seed),
                    given_position=grouped_spearman(
                        x, y, text, within=text, given=position, seed=seed
                    ),
                    law=power_law(x, y, text, seed=seed),
                )
            )
    return tuple(relations)


def power_law(
    x: Float[Tensor, "sink"], y: Float[Tensor, "sink"], text: Sequence[int], *, seed: int = 0
) -> PowerLaw:
    """Fit `y = factor[text] * x ** exponent` by least squares to the logarithms.

    Points where x or y is not above 0 have no logarithm and are left out.
    """
    kept = ((x > 0) & (y > 0)).numpy()
    log_x, log_y = x[kept].double().log().numpy(), y[kept].double().log().numpy()
    labels = np.asarray(text)[kept]
    inner_x, inner_y = _less_mean(log_x, labels), _less_mean(log_y, labels)

    def exponent_of(index: Any) -> float:
        square = float(inner_x[index] @ inner_x[index])
        return float(inner_x[index] @ inner_y[index]) / square if square > 1e-18 else math.nan

    def factor_of(index: Any) -> float:
        own = labels[index]
        exponent = exponent_of(index)
        left = log_y[index] - exponent * log_x[index]
        means = [left[own == label].mean() for label in np.unique(own)]
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
    shown = np.where(alone, np.nan, left)
    residual[torch.from_numpy(kept)] = torch.from_numpy(shown).float()
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


def _less_mean(values: Any, labels: Any) -> Any:
    centered = values.copy()
    for label in np.unique(labels):
        centered[labels == label] -= values[labels == label].mean()
    return centered


def notes_on(relations: Sequence[NormRelation], n_texts: int) -> tuple[str, ...]:
    """What cannot be said of these sinks, and why."""
    notes = []
    for outcome in ("score", "lifetime"):
        own = [one for one in relations if one.outcome == outcome]
        if all(math.isnan(one.within_texts.rho) for one in own):
            notes.append(
                f"no correlation with the {outcome} within texts: it does not vary between the "
                "sinks of a text, or there are too few of them"
            )
    if n_texts < 2:
        notes.append("all sinks are of one text, so there are no intervals: pass several texts")
    return tuple(notes)
