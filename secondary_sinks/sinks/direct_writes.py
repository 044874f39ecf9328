"""What each block writes into a token's residual along the sink direction, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


def direct_writes(
    model: Any,
    sink_map: SinkMap,
    sinks: Sequence[Sink],
    *,
    fwd_hooks: Sequence[UserHook] = (),
) -> DirectWrite:
    """Project every block's output at every sink's token on that sink's direction.

    The direction is that of the primary's residual without the common component after the sink's
    onset layer, of length 1. The residual stream is a sum, so the parts up to a layer must add up
    to the projection of the residual after it; that is checked.

    Raises:
        ModelError: they do not.
    """
    directions = sink_directions(sink_map, [sink.l_start for sink in sinks])
    positions = [sink.position for sink in sinks]
    collector = Projections(positions, directions, ordinary_tokens(sink_map))
    trace_result = trace_tokens(model, sink_map.array("tokens"), [collector], fwd_hooks=fwd_hooks)
    return checked_write(model, trace_result["Projections"])


def sink_directions(sink_map: SinkMap, layers: Sequence[int]) -> Float[Tensor, " layer d_model"]:
    """The sink direction after each of these layers: `(r - c) / |r - c|`, with `r` the primary's
    residual and `c` the common component."""
    centered = sink_map.array("primary_residual") - sink_map.array("common_residual")
    return torch.nn.functional.normalize(centered[list(layers)], dim=-1)


_Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]
"""By site, [sink, layer]: parts, means of ordinary tokens, norms; and the precision."""


def checked_write(model: Any, found: _Found) -> DirectWrite:
    """What `Projections` found, once it is seen that the parts add up.

    Raises:
        ModelError: they do not.
    """
    parts, ordinary, norms, eps = found
    norm = norms["resid_post"]
    embedding = parts["resid_pre"][:, 0]
    summed = embedding[:, None] + (parts["mlp_out"] + parts["attn_out"]).cumsum(dim=1)
    # Rounding of a massive residual stays in the sum after the massive part was erased.
    scale = norm.cummax(dim=1).values
    error = float(((summed - parts["resid_post"]).abs() / scale).max())
    allowed = max(1e-4, 2 * eps * norm.shape[1] ** 0.5)
    if not error <= allowed:
        raise ModelError(
            f"in {name_of(model)!r} the outputs of the blocks do not add up to the residual "
            f"stream along the sink direction (relative error {error:.1e}), so no part of it can "
            "be ascribed to an MLP; a hook that edits the residual stream itself does this: remove "
            "it (model.reset_hooks(), fwd_hooks=())"
        )
    return DirectWrite(
        embedding=embedding,
        mlp=parts["mlp_out"],
        mlp_norm=norms["mlp_out"],
        attention=parts["attn_out"],
        projection=parts["resid_post"],
        ordinary_mlp=ordinary["mlp_out"],
        ordinary_attention=ordinary["attn_out"],
        ordinary_projection=ordinary["resid_post"],
        error=error,
    )


class Projections(Collector):
    """Projections of what a few tokens get, and of what ordinary tokens get on average."""

    sites = ("resid_pre", "attn_out", "mlp_out", "resid_post")

    def __init__(
        self,
        positions: Sequence[int],
        directions: Float[Tensor, " sink d_model"],
        ordinary: Bool[Tensor, " token"],
    ):
        self._positions = list(positions)
        self._directions = directions
        self._ordinary = ordinary

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        shape = (len(self._positions), run.n_layers)
        self._parts = {site: torch.zeros(shape) for site in self.sites}
        self._means = {site: torch.zeros(shape) for site in self.sites}
        self._norms = {site: torch.zeros(shape) for site in self.sites}
        self._eps = 0.0

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Project one layer's activation."""
        own = activation[self._positions].float().cpu()
        self._parts[site][:, layer] = (own * self._directions).sum(dim=-1)
        mean = activation[self._ordinary.to(activation.device)].float().mean(dim=0).cpu()
        self._means[site][:, layer] = self._directions @ mean
        self._norms[site][:, layer] = own.norm(dim=-1)
        if site == "resid_post":
            self._eps = max(self._eps, torch.finfo(activation.dtype).eps)

    def result(self) -> _Found:
        """Parts, means of ordinary tokens, norms, and the precision of the model."""
        return self._parts, self._means, self._norms, self._eps


@dataclass(frozen=True)
class DirectWrite:
    """What each block contributes to a token's residual along the sink direction.

    The direction of a sink is the unit vector of the primary's residual without the common
    component, `(r - c) / |r - c|`, after the sink's onset layer; it is the same for all layers.
    `embedding + mlp.cumsum(1) + attention.cumsum(1) == projection`, up to rounding.
    """

    embedding: Float[Tensor, " sink"]
    mlp: Float[Tensor, " sink layer"]
    mlp_norm: Float[Tensor, " sink layer"]
    """Norm of each MLP's output at the token, in any direction."""
    attention: Float[Tensor, " sink layer"]
    projection: Float[Tensor, " sink layer"]
    """Of the residual after each block."""
    ordinary_mlp: Float[Tensor, " sink layer"]
    """Mean over ordinary tokens of what the MLP writes along the same direction."""
    ordinary_attention: Float[Tensor, " sink layer"]
    """The same of what the attention writes."""
    ordinary_projection: Float[Tensor, " sink layer"]
    """Mean over ordinary tokens of the residual's projection."""
    error: float
    """Largest deviation from the identity, over the largest residual norm up to that layer."""

    @property
    def excess(self) -> Float[Tensor, " sink layer"]:
        """What each MLP writes beyond what ordinary tokens get."""
        return self.mlp - self.ordinary_mlp

    @property
    def attention_excess(self) -> Float[Tensor, " sink layer"]:
        """What each attention block writes beyond what ordinary tokens get."""
        return self.attention - self.ordinary_attention

    @property
    def excess_projection(self) -> Float[Tensor, " sink layer"]:
        """The residual's projection beyond that of ordinary tokens."""
        return self.projection - self.ordinary_projection
