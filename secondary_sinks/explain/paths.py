"""What a path effect returns: one receiver's reading with and without a writer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Receiver = Literal["k", "v", "mlp"]

MEASURES: dict[str, str] = {
    "k": "direct sink score",
    "v": "norm of the value",
    "mlp": "MLP output along the sink direction",
}
"""What is measured of each receiver."""


@dataclass(frozen=True)
class PathEffect(Result):
    """A receiver's reading of one token: clean, with one path cut, and with all of them cut.

    The last axis is the head for keys, the key-value head for values, and of length 1 for MLPs.
    """

    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`models.host.HostInfo`)."""
    token: str
    position: int
    writer: int
    """Layer whose MLP output is taken out."""
    edit: str
    """What takes its place."""
    write_norm: float
    """Norm of what is taken out: the clean output minus what takes its place."""
    receiver: Receiver
    layers: tuple[int, ...]
    """Layers of the receivers, each of them cut by itself."""
    clean: Float[Tensor, "layer part"]
    without_path: Float[Tensor, "layer part"]
    """With the write gone from what this receiver alone reads, all else clean."""
    without_write: Float[Tensor, "layer part"]
    """With the writer itself edited, and the token's whole trajectory recomputed."""

    @property
    def effect(self) -> Float[Tensor, "layer part"]:
        """Effect of the write through this receiver alone: clean minus `without_path`."""
        return self.clean - self.without_path

    @property
    def total(self) -> Float[Tensor, "layer part"]:
        """Effect of the write on the same reading by all paths: clean minus `without_write`."""
        return self.clean - self.without_write

    @property
    def share(self) -> Float[Tensor, "layer"]:
        """Effect over total, both averaged over parts. Not confined to [0, 1]: paths may work
        against each other. NaN where the write has no effect at all."""
        total = self.total.mean(dim=1)
        return self.effect.mean(dim=1) / total.masked_fill(total == 0, torch.nan)

    def __repr__(self) -> str:
        strongest = int(self.effect.mean(dim=1).abs().nan_to_num().argmax())
        where = (
            ", ".join(map(str, self.layers))
            if len(self.layers) < 4
            else (f"{self.layers[0]}-{self.layers[-1]}")
        )
        return (
            f"PathEffect(MLP {self.writer} -> {self.receiver} of layers {where} at token "
            f"{self.position}: {MEASURES[self.receiver]} {self.clean[strongest].mean():.4g} -> "
            f"{self.without_path[strongest].mean():.4g} at {self.layers[strongest]})"
        )

    def _notebook_frame(self) -> pd.DataFrame:
        return self.to_frame().drop(columns="part").groupby("layer", as_index=False).mean()

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer and part (head, key-value head, or the MLP)."""
        import pandas as pd

        n_parts = self.clean.shape[1]
        columns = {
            name: getattr(self, name).flatten().numpy()
            for name in ("clean", "without_path", "without_write", "effect", "total")
        }
        layers = [layer for layer in self.layers for _ in range(n_parts)]
        parts = list(range(n_parts)) * len(self.layers)
        return pd.DataFrame({"layer": layers, "part": parts, **columns})

    def plot(self, **kwargs: Any) -> Figure:
        """Curves by layer; see `secondary_sinks.report.patching.plot_path`."""
        from secondary_sinks.report.patching import plot_path

        return plot_path(self, **kwargs)
