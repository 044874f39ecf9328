"""How alike a sink and the primary sink are, stage by stage, in the MLP that wrote the sink.

If the MLP recognized something that both have, they would be alike where it reads; if it turns
different things into one, they are alike only where it writes. The cosine of each stage says which,
and only against ordinary tokens: in some stages all tokens are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RESIDUAL_STAGES = ("input", "output", "written")
"""Stages that are vectors of the residual stream's space, the same for all layers; the coordinates
of the others are neurons, of one layer each."""


@dataclass(frozen=True)
class SinkStages:
    """One sink whose stages were compared."""

    position: int
    token: str
    onset: int
    writer: int
    """Layer of the MLP that was looked into."""
    emergence: int
    """Layer in which the primary sink itself emerges: the first of its phase."""
    n_matched: int
    """Number of ordinary tokens that it is compared with."""


@dataclass(frozen=True, eq=False)
class MlpStages(Result):
    """Cosines with the primary's stages; see `mlp_stage_alignment`."""

    sinks: tuple[SinkStages, ...]
    stages: tuple[str, ...]
    """Stages in the order of computation: `input` (after the norm before the MLP), `gate` (before
    the activation function), `activation`, `up`, `product`, `output`, and `written` where a norm
    follows the MLP. An MLP without a gate has `pre` and `activation`; a mixture of experts shows
    its input and output alone."""
    cosine: Float[Tensor, "sink stage"]
    """Cosine of the sink's stage with the primary's, in the MLP of the writer's layer."""
    ordinary: Float[Tensor, "sink stage matched"]
    """The same of ordinary tokens nearby; NaN where there are fewer."""
    norm: Float[Tensor, "sink stage"]
    """Norm of the sink's stage."""
    primary_norm: Float[Tensor, "sink stage"]
    ordinary_norm: Float[Tensor, "sink stage matched"]
    emergence_cosine: Float[Tensor, "sink stage"]
    """Cosine of the sink's stage in the writer's layer with the primary's in the layer where the
    primary emerges; NaN for stages whose coordinates are neurons."""
    emergence_ordinary: Float[Tensor, "sink stage matched"]
    """The same of ordinary tokens."""
    primary_position: int
    seed: int
    model: dict[str, Any]

    def __repr__(self) -> str:
        median = self.cosine.nanmedian(dim=0).values
        shown = ", ".join(
            f"{stage} {value:.2f}" for stage, value in zip(self.stages, median, strict=True)
        )
        name, n = self.model.get("name", "?"), len(self.sinks)
        return f"MlpStages({name!r}, {n} sink{'' if n == 1 else 's'}, median cosine: {shown})"

    def ordinary_band(
        self, low: float = 0.1, high: float = 0.9
    ) -> tuple[Float[Tensor, "stage"], Float[Tensor, "stage"], Float[Tensor, "stage"]]:
        """Median and two quantiles of the ordinary tokens of all sinks together."""
        pooled = self.ordinary.permute(1, 0, 2).flatten(1)
        found = torch.nanquantile(pooled, torch.tensor([0.5, low, high]), dim=1)
        return found[0], found[1], found[2]

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink and stage; `ordinary_...` are over its matched tokens."""
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            for number, stage in enumerate(self.stages):
                near = self.ordinary[index, number]
                band = torch.nanquantile(near, torch.tensor([0.5, 0.1, 0.9])).tolist()
                rows.append(
                    {
                        "position": sink.position,
                        "token": sink.token,
                        "writer": sink.writer,
                        "stage": stage,
                        "cosine": float(self.cosine[index, number]),
                        "ordinary_median": band[0],
                        "ordinary_low": band[1],
                        "ordinary_high": band[2],
                        "norm": float(self.norm[index, number]),
                        "primary_norm": float(self.primary_norm[index, number]),
                        "ordinary_norm": float(self.ordinary_norm[index, number].nanmedian()),
                        "emergence_cosine": float(self.emergence_cosine[index, number]),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, **kwargs: Any) -> Figure:
        """Cosine by stage; see `secondary_sinks.report.mlp_stages.plot_mlp_stages`."""
        from secondary_sinks.report.mlp_stages import plot_mlp_stages

        return plot_mlp_stages(self, **kwargs)


def stage_cosines(
    tokens: Mapping[str, Float[Tensor, "token _"]],
    reference: Mapping[str, Float[Tensor, "1 _"]],
    stages: Sequence[str],
) -> Float[Tensor, "token stage"]:
    """Cosine of every token's stage with the reference's; NaN where either is missing or zero."""
    n = max((len(values) for values in tokens.values()), default=0)
    found = torch.full((n, len(stages)), torch.nan)
    for number, stage in enumerate(stages):
        if stage in tokens and stage in reference:
            one, other = tokens[stage], reference[stage]
            lengths = one.norm(dim=-1) * other.norm(dim=-1)
            found[:, number] = torch.where(lengths > 0, (one * other).sum(-1) / lengths, torch.nan)
    return found.clamp(-1, 1)


def stage_norms(
    tokens: Mapping[str, Float[Tensor, "token _"]], stages: Sequence[str]
) -> Float[Tensor, "token stage"]:
    """Norm of every token's stage; NaN where it is missing."""
    n = max((len(values) for values in tokens.values()), default=0)
    found = torch.full((n, len(stages)), torch.nan)
    for number, stage in enumerate(stages):
        if stage in tokens:
            found[:, number] = tokens[stage].norm(dim=-1)
    return found
