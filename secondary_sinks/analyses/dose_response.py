"""How does a sink depend on the norm that its writer writes?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.counterfactuals import CounterfactualRows, counterfactuals
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.interventions import Intervention
from secondary_sinks.observe.collectors import Norms
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import has_sink, sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.statistics import Correlation, spearman

if TYPE_CHECKING:
    import pandas as pd

SCALES: tuple[float, ...] = tuple(step / 8 for step in range(21))

"""Default multiples of the writer's output: 0 to 2.5 in 21 steps, the clean 1 among them."""

N_TOTALS = 5

"""On how many of the scales the total score is measured."""


def dose_response(
    model: Any,
    text: Text | SinkMap,
    sink: Sink | int,
    scales: Sequence[float] | None = None,
    *,
    writer: int | None = None,
    totals: bool = False,
    sinks: SinkMap | None = None,
    seed: int = 0,
    method: Method = "auto",
    chat: bool = False,
    progress: bool | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> DoseResponse:
    """Scale what the writer writes into one sink's token, and see what kind of sink results.

    The claim that the norm of the written vector decides how much attention a sink draws and for
    how long (arXiv 2512.22213) rests there on correlations between sinks, which differ in much
    besides. Here the same token gets the same vector at different lengths, all else equal.

    What it is not evidence for: that sinks of another norm occur in texts (most doses are lengths
    that the model never writes), that the norm alone differs (later blocks see another token, and
    add other things to it), or anything about another sink: it is one token of one text. The
    correlation's interval resamples doses, not texts.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sink: a sink of that map, or the position of a secondary one.
        scales: multiples of the writer's output; by default 0 to 2.5 in 21 steps.
        writer: layer of the MLP. None takes the last layer up to the onset whose MLP's output the
            sink needs; where that is in doubt ask `attribute_to_mlps`, which has more tests.
        totals: also recompute everything after the token, on a few of the scales, for the total
            score: a full pass each.
        sinks: the text's sink map, if it is there already.
        seed: of the bootstrap.
        method: engine of the rows; see `counterfactuals`.
        chat: the string goes through the chat template.
        progress: show a progress bar; None shows one for more than one pass.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: no scales, or such that are not finite; a sink that is not in the map; a layer
            out of range; no layer that the sink needs; a map of another model or text.
        ModelError: the model cannot be measured.
    """
    doses = list(SCALES if scales is None else scales)
    if not doses:
        raise InputError("no scales: leave them out for 0 to 2.5, or give at least one")
    if not all(math.isfinite(dose) for dose in doses):
        raise InputError(f"scales hold {next(d for d in doses if not math.isfinite(d))}")
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    target = Target.of(found, _the_sink(found, sink))
    position = target.sink.position
    run = partial(counterfactuals, model, found, progress=progress, fwd_hooks=fwd_hooks)
    if writer is None:
        candidates = range(target.sink.l_start + 1)
        sweep = run(
            [Intervention("mlp_out", m, position, Zero()) for m in candidates], method=method
        )
        writer = _last_needed(target, sweep)
    at = [Intervention("mlp_out", writer, position, Scale(dose)) for dose in doses]
    rows = run(at, method=method)
    total_score = torch.full(rows.norm.shape, torch.nan)
    if totals:
        some = sorted({round(k) for k in torch.linspace(0, len(doses) - 1, N_TOTALS).tolist()})
        full = (
            rows if rows.totals is not None else run([at[index] for index in some], method="full")
        )
        some = list(range(len(doses))) if full is rows else some
        if full.totals is not None:
            total_score[some] = full.totals.sink_score[:, :, position]
    length = cast(
        Trace,
        trace(model, cast(Tensor, found.tokens), [Norms("mlp_out", "mlp")], fwd_hooks=fwd_hooks),
    )["mlp"][writer, position]
    return _result(target, writer, torch.tensor(doses), length, rows, total_score, seed)


def _the_sink(sinks: SinkMap, sink: Sink | int) -> Sink:
    if isinstance(sink, Sink):
        if not has_sink(sinks, sink):
            raise InputError(f"{sink!r} is not a sink of this map")
        return sink
    here = [one for one in sinks.secondary if one.position == sink]
    if not here:
        places = [one.position for one in sinks.secondary]
        raise InputError(f"no secondary sink at position {sink}; there are some at {places}")
    return here[0]


def _last_needed(target: Target, sweep: CounterfactualRows) -> int:
    """Writers come after their feeders, so the last layer that is needed is the writer."""
    needed = (target.lifetime(sweep) == 0).nonzero().flatten().tolist()
    if not needed:
        raise InputError(
            f"no MLP up to the onset is needed for {target.sink!r}, so no writer is known: pass "
            "writer=..., or see attribute_to_mlps for what every layer does"
        )
    return int(needed[-1])


def _result(
    target: Target,
    writer: int,
    scales: Tensor,
    length: Tensor,
    rows: CounterfactualRows,
    total_score: Tensor,
    seed: int,
) -> DoseResponse:
    written = scales.abs() * length
    is_sink = torch.zeros_like(rows.is_sink)
    is_sink[:, target.phase] = rows.is_sink[:, target.phase]
    return DoseResponse(
        position=target.sink.position,
        token=target.sink.token,
        layers=target.sink.layers,
        writer=writer,
        scales=scales,
        written_norm=written,
        norm=rows.norm,
        alignment=rows.centered_alignment,
        is_sink=is_sink,
        direct_score=rows.direct_score.mean(dim=2),
        total_score=total_score,
        score_correlation=spearman(written, target.score(rows), seed=seed),
        lifetime_correlation=spearman(written, is_sink.sum(dim=1).float(), seed=seed),
        seed=seed,
        engine=rows.engine,
        model=target.sink_map.model,
    )


@dataclass(frozen=True)
class DoseResponse(Result):
    """One sink under multiples of its writer's output; see `dose_response`."""

    position: int
    token: str
    layers: tuple[int, ...]
    """The clean sink's life."""
    writer: int
    scales: Float[Tensor, "dose"]
    written_norm: Float[Tensor, "dose"]
    """Norm of the scaled MLP output: what is written."""
    norm: Float[Tensor, "dose layer"]
    """Residual norm after each block."""
    alignment: Float[Tensor, "dose layer"]
    """Centered alignment with the primary."""
    is_sink: Bool[Tensor, "dose layer"]
    """Whether the token is a sink, in the layers of its primary phase."""
    direct_score: Float[Tensor, "dose layer"]
    """Mean over heads of the sink score that the token's keys draw from the clean queries."""
    total_score: Float[Tensor, "dose layer"]
    """The same with everything after the token recomputed; NaN at doses where it was not asked."""
    score_correlation: Correlation
    """Spearman's of written norm and `score`, with a bootstrap interval over doses."""
    lifetime_correlation: Correlation
    """Spearman's of written norm and lifetime. NaN where the lifetime does not vary."""
    seed: int
    engine: str
    """Which engine ran the direct rows: "packed" or "full"."""
    model: dict[str, Any]

    @property
    def lifetime(self) -> Int[Tensor, "dose"]:
        """Number of layers of its phase after which the token is a sink."""
        return self.is_sink.sum(dim=1)

    @property
    def score(self) -> Float[Tensor, "dose"]:
        """Mean direct score over the layers that show the clean sink's life; NaN if none does."""
        return self.direct_score[:, self._shown].mean(dim=1)

    @property
    def total(self) -> Float[Tensor, "dose"]:
        """Mean total score over the same layers."""
        return self.total_score[:, self._shown].mean(dim=1)

    @property
    def saturation_dose(self) -> float:
        """Smallest scale from which on the lifetime is that at scale 1: longer vectors change it no
        more. Infinite where it still differs at the largest scale; NaN without a scale of 1."""
        order = self.scales.argsort()
        scales, lifetime = self.scales[order], self.lifetime[order]
        if not (scales == 1).any():
            return math.nan
        differs = (lifetime != lifetime[scales == 1][0]).nonzero().flatten().tolist()
        lasting = scales[differs[-1] + 1 :] if differs else scales
        return float(lasting[0]) if len(lasting) else math.inf

    @property
    def _shown(self) -> list[int]:
        return [layer + 1 for layer in self.layers if layer + 1 < self.norm.shape[1]]

    def __repr__(self) -> str:
        return (
            f"DoseResponse({self.token!r} at {self.position}, MLP {self.writer}, "
            f"{len(self.scales)} doses from {self.scales.min():g} to {self.scales.max():g}: "
            f"rho {self.score_correlation.rho:.2f} with score, "
            f"{self.lifetime_correlation.rho:.2f} with lifetime)"
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
