"""How does a sink depend on the norm that its writer writes?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.intervene.counterfactuals import CounterfactualRows, counterfactuals
from secondary_sinks.intervene.edits import Scale
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.interventions import Intervention
from secondary_sinks.observe.collectors import Norms
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Kind, Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers
from secondary_sinks.statistics import Correlation, spearman

if TYPE_CHECKING:
    import pandas as pd

SCALES: tuple[float, ...] = tuple(step / 8 for step in range(21))
"""Default multiples of the writer's output: 0 to 2.5 in 21 steps, the clean 1 among them."""

N_TOTALS = 5
"""Number of scales at which the total score is measured."""


def dose_response(
    model: Model,
    sink_map: SinkMap,
    sink: Sink | int,
    scales: Sequence[float] | None = None,
    *,
    writer: int | None = None,
    totals: bool = False,
    seed: int = 0,
    method: Method = "auto",
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> DoseResponse:
    """How do a sink's attention and lifetime change with the norm that its writer writes?

    >>> curve = ss.dose_response(model, sink_map, sink_map.secondary[0])
    >>> curve.to_frame()[["scale", "lifetime", "direct_score"]]

    The claim that the norm of the written vector decides how much attention a sink draws and for
    how long (arXiv 2512.22213) rests there on correlations between sinks, which differ in much
    besides. Here the same token gets the same vector at different lengths, all else equal.

    Not evidence for: that sinks of another norm occur in texts (most doses are lengths that the
    model never writes), that the norm alone differs (later blocks see another token, and add other
    things to it), or anything about another sink: it is one token of one text. The correlation's
    interval resamples doses, not texts.

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sink: a sink of the map, or a position: its first secondary life where it has several. A
            position without a sink is measured in the same way (`SinkMap.select`).
        scales: multiples of the writer's output; by default 0 to 2.5 in 21 steps.
        writer: layer of the MLP; None takes the largest write (`sinks.writers.resolve_writers`).
            Where that is in doubt, `attribute_to_mlps` has more tests.
        totals: at a few of the scales, also recompute everything after the token, for the total
            score: a full pass each.
        seed: of the bootstrap.
        method: engine of the rows; see `counterfactuals`.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Raises:
        InputError: no scales, or scales that are not finite; a sink that is not in the map, or a
            position outside the text; a layer out of range; a map that does not belong to this
            model.
        ModelError: the model cannot be measured.
    """
    doses = list(SCALES if scales is None else scales)
    if not doses:
        raise InputError("scales is empty: give at least one scale, or None for 0 to 2.5")
    if not all(math.isfinite(dose) for dose in doses):
        raise InputError(f"scales contains {next(d for d in doses if not math.isfinite(d))}")
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    lives = sink_map.select(sink)
    target = Target.of(sink_map, next((s for s in lives if s.kind == "secondary"), lives[0]))
    position = target.sink.position
    writers = resolve_writers(model, sink_map, [target.sink], writer, fwd_hooks=fwd_hooks)
    layer = writers.layers[0]
    run = partial(counterfactuals, model, sink_map, progress=progress, fwd_hooks=fwd_hooks)
    interventions = [Intervention("mlp_out", layer, position, Scale(dose)) for dose in doses]
    rows = run(interventions, method=method)
    tokens, collectors = sink_map.array("tokens"), [Norms("mlp_out", "mlp")]
    clean = trace_tokens(model, tokens, collectors, fwd_hooks=fwd_hooks)
    dose_tensor = torch.tensor(doses)
    written_norm = dose_tensor.abs() * clean["mlp"][layer, position]
    measured = target.measure(rows, torch.arange(len(rows)))
    is_sink = torch.zeros_like(rows.is_sink)
    is_sink[:, target.phase] = rows.is_sink[:, target.phase]
    return DoseResponse(
        position=position,
        token=target.sink.token,
        kind=target.sink.kind,
        layers=target.sink.layers,
        writer=layer,
        writer_rule=writers.rule,
        scales=dose_tensor,
        written_norm=written_norm,
        norm=rows.norm,
        alignment=rows.centered_alignment,
        is_sink=is_sink,
        direct_score=rows.direct_score.mean(dim=2),
        total_score=(
            _total_scores(rows, partial(run, method="full"), interventions)
            if totals
            else torch.full(rows.norm.shape, torch.nan)
        ),
        score_correlation=spearman(written_norm, measured["score"], seed=seed),
        lifetime_correlation=spearman(written_norm, measured["lifetime"].float(), seed=seed),
        provenance=sink_map.provenance.extended(engine=rows.engine, seed=seed),
    )


@dataclass(frozen=True)
class DoseResponse(Result):
    """One sink under multiples of its writer's output; see `dose_response`."""

    position: int
    token: str
    kind: Kind
    """"chosen" for a token that is not a sink."""
    layers: tuple[int, ...]
    """The clean sink's life; of a chosen token, the layers that `SinkMap.select` gave it."""
    writer: int
    """Layer of the MLP whose output is scaled."""
    writer_rule: WriterRule
    scales: Float[Tensor, " dose"]
    written_norm: Float[Tensor, " dose"]
    """Norm of the scaled MLP output."""
    norm: Float[Tensor, " dose layer"]
    """Residual norm after each block."""
    alignment: Float[Tensor, " dose layer"]
    """Centered alignment with the primary."""
    is_sink: Bool[Tensor, " dose layer"]
    """Whether the token is a sink, in the layers of its primary phase."""
    direct_score: Float[Tensor, " dose layer"]
    """Mean over heads of the sink score that the token's keys draw from the clean queries."""
    total_score: Float[Tensor, " dose layer"]
    """The same with everything after the token recomputed; NaN at doses where it was not run."""
    score_correlation: Correlation
    """Spearman's of written norm and `score`, with a bootstrap interval over doses."""
    lifetime_correlation: Correlation
    """Spearman's of written norm and lifetime. NaN where the lifetime does not vary."""
    provenance: Provenance

    @property
    def lifetime(self) -> Int[Tensor, " dose"]:
        """Number of layers of its phase after which the token is a sink."""
        return self.is_sink.sum(dim=1)

    @property
    def score(self) -> Float[Tensor, " dose"]:
        """Mean direct score over the layers that show the clean sink's life; NaN if none does."""
        return self.direct_score[:, self._shown].nanmean(dim=1)

    @property
    def total(self) -> Float[Tensor, " dose"]:
        """Mean total score over the same layers."""
        return self.total_score[:, self._shown].nanmean(dim=1)

    @property
    def saturation_dose(self) -> float:
        """Smallest scale from which on the lifetime is that at scale 1: longer vectors do not
        change it any more. Infinite where it still differs at the largest scale; NaN without a
        scale of 1, or if the token is not a sink at that scale."""
        order = self.scales.argsort()
        scales, lifetime = self.scales[order], self.lifetime[order]
        if not (lifetime[scales == 1] > 0).any():
            return math.nan
        differs = (lifetime != lifetime[scales == 1][0]).nonzero().flatten().tolist()
        lasting = scales[differs[-1] + 1 :] if differs else scales
        return float(lasting[0]) if len(lasting) else math.inf

    @property
    def _shown(self) -> list[int]:
        return [layer + 1 for layer in self.layers if layer + 1 < self.norm.shape[1]]

    def __repr__(self) -> str:
        kind = ", not a sink" if self.kind == "chosen" else ""
        low, high = f"{self.scales.min():g}", f"{self.scales.max():g}"
        doses = f"{counted(len(self.scales), 'dose')} from {low} to {high}"
        if low == high:
            doses = f"{counted(len(self.scales), 'dose')} of {low}"
        correlations = ", ".join(
            f"no correlation with {name}"
            if math.isnan(correlation.rho)
            else f"rho {correlation.rho:.2f} with {name}"
            for name, correlation in (
                ("score", self.score_correlation),
                ("lifetime", self.lifetime_correlation),
            )
        )
        return (
            f"DoseResponse({self.token!r} at {self.position}{kind}, MLP {self.writer}, {doses}: "
            f"{correlations})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each dose; norm and alignment are those after the onset layer."""
        import pandas as pd

        onset = self.layers[0]
        return pd.DataFrame(
            {
                "scale": self.scales.tolist(),
                "written_norm": self.written_norm.tolist(),
                "norm": self.norm[:, onset].tolist(),
                "alignment": self.alignment[:, onset].tolist(),
                "lifetime": self.lifetime.tolist(),
                "direct_score": self.score.tolist(),
                "total_score": self.total.tolist(),
            }
        )


def _total_scores(
    rows: CounterfactualRows,
    run_full: Callable[[list[Intervention]], CounterfactualRows],
    interventions: list[Intervention],
) -> Float[Tensor, " dose layer"]:
    """Total scores at all doses if the rows are full passes, else at `N_TOTALS` of them."""
    position = interventions[0].position
    if rows.totals is not None:
        return rows.totals.sink_score[:, :, position]
    steps = torch.linspace(0, len(interventions) - 1, N_TOTALS).tolist()
    some = sorted({round(step) for step in steps})
    total_score = torch.full(rows.norm.shape, torch.nan)
    totals = run_full([interventions[index] for index in some]).totals
    if totals is not None:
        total_score[some] = totals.sink_score[:, :, position]
    return total_score
