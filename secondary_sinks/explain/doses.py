"""What a dose-response returns: one sink under multiples of its writer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.explain.statistics import Correlation
from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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

    def plot(self, **kwargs: Any) -> Figure:
        """Curves over the written norm; see `secondary_sinks.report.dose.plot_dose_response`."""
        from secondary_sinks.report.dose import plot_dose_response

        return plot_dose_response(self, **kwargs)
