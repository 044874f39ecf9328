"""Collectors: what to keep of each activation of a pass.

A collector names the sites that it reads, gets every activation there once, in the order in which
the model computes them, and keeps a small statistic. It gets one text at a time, without the batch
dimension and without padding. A complete one:

>>> class LargestMlpOutput(Collector):
...     sites = ("mlp_out",)
...
...     def start(self, run):
...         self.largest = torch.zeros(run.n_layers, run.n_tokens)
...
...     def update(self, site, layer, activation):
...         self.largest[layer] = activation.abs().amax(dim=-1)
...
...     def result(self):
...         return self.largest
>>> trace(model, text, [LargestMlpOutput()])["LargestMlpOutput"]  # [layer, token]

A site is read in every layer. TransformerLens' name of one layer's hook reads that layer alone:
with `sites = ("blocks.5.hook_mlp_out",)` the only call is `update("mlp_out", 5, activation)`.

`update` must not change the activation, nor keep it: all those of a 0.5B model at 500 tokens are
4 GB. Results belong on the CPU, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.attention_columns import ColumnRequest


@dataclass(frozen=True)
class Run:
    """What a collector knows of the text before it starts."""

    n_layers: int
    n_heads: int
    n_tokens: int
    d_model: int
    tokens: Int[Tensor, " token"]


class Collector:
    """Base of all collectors; subclasses set `sites` and define `start`, `update`, `result`."""

    sites: tuple[str, ...] = ()
    """Names of the sites to read: `host.sites.SITE_HOOKS`, `final_norm` or `attention` in every
    layer, or TransformerLens' name of one layer's hook, such as `blocks.5.hook_mlp_out`."""

    where_present: bool = False
    """Read a site in the layers that have it. By default a model in which some layer lacks a site
    is refused, because a result with fewer layers than the model is easily misread."""

    attention: ColumnRequest = ColumnRequest()
    """What the site `attention` should contain, for those that read it."""

    name: str | None = None
    """Key of the result; by default the name of the class."""

    def start(self, run: Run) -> None:
        """Prepare for one text."""

    def update(self, site: str, layer: int | None, activation: Any) -> None:
        """Add one activation of that text.

        Args:
            site: this library's name of the site, whichever name `sites` has.
            layer: index of the block; None at `final_norm`.
            activation: a tensor without batch dimension and padding, or an `AttentionColumns` at
                the site `attention`.
        """
        raise NotImplementedError

    def result(self) -> Any:
        """The statistic of that text."""
        raise NotImplementedError


class Norms(Collector):
    """Norm of each token's vector at a site.

    Result: Float[Tensor, " layer token"] for sites of the residual stream, [layer, head, token] for
    `q`, `k`, `v`, `z` (key-value heads under grouped-query attention). The name of one layer's hook
    gives one layer.

    Args:
        site: which site.
        name: key of the result; by default the site's name and `_norm`.
    """

    def __init__(self, site: str, name: str | None = None):
        self.sites = (site,)
        self.name = name or f"{site}_norm"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Add the norms of one layer."""
        norms = torch.linalg.vector_norm(activation, dim=-1, dtype=torch.float32)
        self._layers.append(rearrange(norms, "token ... -> ... token").cpu())

    def result(self) -> Float[Tensor, " layer *head token"]:
        """Norms by layer."""
        return torch.stack(self._layers)


class ResidualNorms(Norms):
    """Norm of the residual stream after each block. Result: Float[Tensor, " layer token"]."""

    def __init__(self) -> None:
        super().__init__("resid_post", name="ResidualNorms")


class ChosenVectors(Collector):
    """Vectors of chosen tokens at one or more sites of the residual stream, in float32.

    All residuals of a 0.5B model at 500 tokens are 43 MB for each site; those of ten tokens 1 MB.

    Result: site -> Float[Tensor, " layer chosen d_model"], the tokens in the order of `positions`.

    Args:
        positions: which tokens.
        sites: where: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`.
        name: key of the result.
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
        self._layers: dict[str, list[Tensor]] = {}

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Keep the chosen rows of one layer."""
        chosen = activation[self.positions].float().cpu()
        self._layers.setdefault(site, []).append(chosen)

    def result(self) -> dict[str, Float[Tensor, " layer chosen d_model"]]:
        """The vectors by site."""
        return {site: torch.stack(layers) for site, layers in self._layers.items()}


@dataclass(frozen=True)
class MassiveActivation:
    """Largest activation of every token's residual, by layer; each field is [layer, token]."""

    value: Float[Tensor, " layer token"]
    """The largest-magnitude entry, with its sign."""
    dimension: Int[Tensor, " layer token"]
    """Its residual dimension."""
    ratio: Float[Tensor, " layer token"]
    """Its magnitude over the median magnitude of all entries of all tokens in that layer."""

    def is_massive(
        self, *, min_value: float = 100.0, min_ratio: float = 1000.0
    ) -> Bool[Tensor, " layer token"]:
        """Which are massive activations: |value| > 100 and > 1000 times the median (Sun et al.,
        arXiv 2402.17762). Absolute values depend on a model's scale; the ratio does not."""
        return (self.value.abs() > min_value) & (self.ratio > min_ratio)


class MassiveActivations(Collector):
    """Largest residual entry of every token. Result: `MassiveActivation`."""

    sites = ("resid_post",)

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        shape = (run.n_layers, run.n_tokens)
        self._massive = MassiveActivation(
            value=torch.zeros(shape),
            dimension=torch.zeros(shape, dtype=torch.long),
            ratio=torch.zeros(shape),
        )

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Keep the largest entry of each token."""
        magnitude = activation.abs()
        dimension = magnitude.argmax(dim=-1)
        value = activation.gather(-1, dimension[:, None])[:, 0].float()
        median = magnitude.flatten().median().float().clamp_min(torch.finfo(torch.float32).tiny)
        self._massive.value[layer] = value.cpu()
        self._massive.dimension[layer] = dimension.cpu()
        self._massive.ratio[layer] = (value.abs() / median).cpu()

    def result(self) -> MassiveActivation:
        """The largest entries."""
        return self._massive
