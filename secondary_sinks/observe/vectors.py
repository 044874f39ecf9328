"""The vectors of a few tokens, at every layer.

All residuals of a 0.5B model at 500 tokens are 43 MB a site; those of ten tokens are 1 MB. A
comparison of chosen tokens needs no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.collectors import Collector, Run


class ChosenVectors(Collector):
    """Vectors of chosen tokens at one or more sites of the residual stream, in float32.

    Result: site -> Float[Tensor, "layer chosen d_model"], the tokens in the order in which their
    positions were given.

    Args:
        positions: which tokens.
        sites: where: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`.
        name: under which the result is found.
    """

    def __init__(self, positions: Sequence[int], sites: Sequence[str], name: str | None = None):
        self.sites = tuple(sites)
        self.positions = list(positions)
        self.name = name or "ChosenVectors"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        beyond = [position for position in self.positions if not 0 <= position < run.n_tokens]
        if beyond:
            raise InputError(f"position {beyond[0]} lies outside a text of {run.n_tokens} tokens")
        shape = (run.n_layers, len(self.positions), run.d_model)
        self._found = {site: torch.zeros(shape) for site in self.sites}

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Keep the chosen rows of one layer."""
        self._found[site][layer] = activation[self.positions].float().cpu()

    def result(self) -> dict[str, Float[Tensor, "layer chosen d_model"]]:
        """The vectors by site."""
        return self._found
