"""What a patching scan returns: one number for each site, layer and pair of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Direction = Literal["denoising", "noising"]
Scan = Literal["exact", "attribution"]


@dataclass(frozen=True)
class PatchResult(Result):
    """A metric of one run (the *base*) with single activations taken from another (the *source*).

    Denoising patches clean activations into the corrupted run, noising the other way round.
    """

    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`models.host.HostInfo`)."""
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    """(clean position, corrupted position) of each column."""
    tokens: tuple[str, ...]
    """The base run's token of each column."""
    direction: Direction
    scan: Scan
    metric: str
    """Name of the metric."""
    position: tuple[int, int]
    """(clean position, corrupted position) of the token that the metric is about."""
    metric_layers: tuple[int, ...]
    """Layers over which the metric is averaged."""
    base: float
    """The metric with nothing patched."""
    source: float
    """The metric of the run that the activations come from."""
    value: Float[Tensor, "site layer pair"]
    """The metric of the patched run; with `scan="attribution"` a first-order estimate of it."""
    checked: Int[Tensor, "check 3"]
    """Indices (site, layer, pair) of the estimated cells that were run exactly as well."""
    checked_value: Float[Tensor, "check"]
    """The exact metric of those cells."""

    @property
    def effect(self) -> Float[Tensor, "site layer pair"]:
        """Change of the metric against the base run, in the metric's own unit."""
        return self.value - self.base

    @property
    def normalized(self) -> Float[Tensor, "site layer pair"]:
        """Effect over the difference of the two runs: 0 is the base run, 1 the source.

        Not confined to [0, 1]. NaN where the two runs have the same metric.
        """
        gap = self.source - self.base
        return self.effect / (gap if abs(gap) > 1e-12 else math.nan)

    @property
    def error(self) -> float:
        """Root mean square error of the estimates over the checked cells, relative to that of the
        exact effects there; NaN where nothing was estimated or checked.

        The cells with the largest estimates were checked: a cell whose effect the gradient misses
        altogether is not among them.
        """
        if not len(self.checked):
            return math.nan
        estimated = self.value[tuple(self.checked.T)]
        exact = self.checked_value - self.base
        size = exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return float((estimated - self.checked_value).square().mean().sqrt() / size)

    def __repr__(self) -> str:
        checked = (
            f", error {self.error:.2g} in {len(self.checked)} cells" if self.checked.numel() else ""
        )
        return (
            f"PatchResult({self.direction}, {self.scan}{checked}: {self.metric} {self.base:.4g} -> "
            f"{self.source:.4g}, {' '.join(self.sites)} x {len(self.layers)} layers x "
            f"{len(self.pairs)} tokens, {self._best()})"
        )

    def _best(self) -> str:
        index = int(self.effect.abs().argmax())
        n_layers, n_pairs = self.value.shape[1:]
        site, layer, pair = (
            index // (n_layers * n_pairs),
            index // n_pairs % n_layers,
            index % n_pairs,
        )
        clean, corrupted = self.pairs[pair]
        at = corrupted if self.direction == "denoising" else clean
        return f"largest at {self.sites[site]} {self.layers[layer]} token {at}"

    def _notebook_frame(self) -> pd.DataFrame:
        frame = self.to_frame()
        order = frame["effect"].abs().sort_values(ascending=False).index
        return frame.loc[order].head(10)

    def to_frame(self) -> pd.DataFrame:
        """One row for each cell; `exact` holds the exact metric where it is known."""
        import pandas as pd

        site, layer, pair = torch.meshgrid(
            *(torch.arange(size) for size in self.value.shape), indexing="ij"
        )
        exact = (
            self.value.clone() if self.scan == "exact" else torch.full_like(self.value, torch.nan)
        )
        exact[tuple(self.checked.T)] = self.checked_value
        columns = pair.flatten().tolist()
        return pd.DataFrame(
            {
                "site": [self.sites[i] for i in site.flatten().tolist()],
                "layer": [self.layers[i] for i in layer.flatten().tolist()],
                "clean_position": [self.pairs[i][0] for i in columns],
                "corrupted_position": [self.pairs[i][1] for i in columns],
                "token": [self.tokens[i] for i in columns],
                "value": self.value.flatten().numpy(),
                "effect": self.effect.flatten().numpy(),
                "normalized": self.normalized.flatten().numpy(),
                "exact": exact.flatten().numpy(),
            }
        )

    def plot(self, **kwargs: Any) -> Figure:
        """Heat maps; see `secondary_sinks.report.patching.plot_patching`."""
        from secondary_sinks.report.patching import plot_patching

        return plot_patching(self, **kwargs)
