"""Mean activations of a reference corpus, to put in the place of an activation: mean ablation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.intervene.edits import Replace
from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MeanActivations(Result):
    """What ordinary tokens of many texts have at some sites on average; see `mean_activations`."""

    mean: dict[str, Float[Tensor, "layer *shape"]]
    """By site: the mean over tokens, [layer, d_model], or [layer, head, d_head] at heads' sites."""
    n_tokens: int
    """Ordinary tokens that went into it."""
    n_texts: int
    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`models.host.HostInfo`)."""

    def edit(self, site: str, layer: int, *, head: int | None = None) -> Replace:
        """The edit that puts the mean in the place of an activation at that site and layer.

        Raises:
            InputError: the site was not measured, or the layer or head is out of range.
        """
        if site not in self.mean:
            raise InputError(f"no mean of {site!r}; there are {', '.join(self.mean)}")
        layers = self.mean[site]
        if not 0 <= layer < len(layers):
            raise InputError(f"layer {layer} is out of range: there are {len(layers)}")
        if head is None:
            return Replace(layers[layer])
        if layers.ndim < 3 or not 0 <= head < layers.shape[1]:
            raise InputError(f"site {site!r} has no head {head}")
        return Replace(layers[layer, head])

    def __repr__(self) -> str:
        return (
            f"MeanActivations({self.model.get('name', '?')!r}, {', '.join(self.mean)}: "
            f"{self.n_tokens} ordinary tokens of {self.n_texts} texts)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each site and layer: the norm of the mean."""
        import pandas as pd

        rows = [
            {"site": site, "layer": layer, "norm": float(torch.linalg.vector_norm(value))}
            for site, layers in self.mean.items()
            for layer, value in enumerate(layers)
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "norm"])
