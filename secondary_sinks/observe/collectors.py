"""Collectors: what to keep of each activation when it passes.

A collector names the sites that it reads, gets every activation there once, in the order in which
the model computes them, and keeps a small statistic. It sees one text at a time, without the batch
dimension and without padding, so that there is nothing to get wrong about either. A whole one:

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

`update` must not change the activation, nor keep it: all those of a 0.5B model at 500 tokens are
4 GB. What is kept goes to the CPU in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest


@dataclass(frozen=True)
class Run:
    """What a collector may know of the text before it starts."""

    n_layers: int
    n_heads: int
    n_tokens: int
    d_model: int
    tokens: Int[Tensor, "token"]


class Collector:
    """Base of all collectors; subclasses set `sites` and define `start`, `update`, `result`."""

    sites: tuple[str, ...] = ()
    """Names of the sites to read (`host.sites.SITE_HOOKS`, `final_norm`, or `attention`)."""

    attention: ColumnRequest = ColumnRequest()
    """What the site `attention` should show, for those that read it."""

    name: str | None = None
    """Under which name the result is found; by default the name of the class."""

    def start(self, run: Run) -> None:
        """Prepare for one text."""

    def update(self, site: str, layer: int | None, activation: Any) -> None:
        """Take in one activation of that text, without batch dimension and padding: a tensor, or
        an `AttentionColumns` at the site `attention`."""
        raise NotImplementedError

    def result(self) -> Any:
        """What was found in that text."""
        raise NotImplementedError


class Norms(Collector):
    """Norm of each token's vector at a site.

    Result: Float[Tensor, "layer token"] for sites of the residual stream, [layer, head, token] for
    `q`, `k`, `v`, `z` (key-value heads under grouped-query attention).
    """

    def __init__(self, site: str, name: str | None = None):
        self.sites = (site,)
        self.name = name or f"{site}_norm"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Keep the norms of one layer."""
        norms = torch.linalg.vector_norm(activation, dim=-1, dtype=torch.float32)
        self._layers.append(norms.T.cpu() if norms.ndim == 2 else norms.cpu())

    def result(self) -> Float[Tensor, "layer *head token"]:
        """Norms by layer."""
        return torch.stack(self._layers)


class ResidualNorms(Norms):
    """Norm of the residual stream after each block. Result: Float[Tensor, "layer token"]."""

    def __init__(self) -> None:
        super().__init__("resid_post", name="ResidualNorms")


class SinkScores(Collector):
    """Attention that each token receives, by layer and head.

    Result: Float[Tensor, "layer head token"]. With `convention="later"` (this library's sink score)
    it is the mean over later queries i > t of A[i, t]: a token's attention to itself says nothing
    of what others see in it. Tokens with fewer than `min_queries` later queries get NaN, because
    the last tokens of a text are looked at merely for being near. With `convention="gu"` it is the
    importance score of Gu et al. (arXiv 2410.10781), the mean over i >= t, for every token; see
    `sink_rate` for their thresholded rate.

    A large score is not evidence that the token's content is used: see the value norms, or ablate.
    """

    sites = (ATTENTION,)

    def __init__(
        self,
        convention: Literal["later", "gu"] = "later",
        *,
        min_queries: int = 8,
        name: str | None = None,
    ):
        if convention not in ("later", "gu"):
            raise InputError(f"no convention {convention!r} for sink scores; use 'later' or 'gu'")
        if min_queries < 1:
            raise InputError(f"min_queries is {min_queries}; it must be 1 or more")
        self.convention = convention
        self.min_queries = min_queries
        self.name = name or "SinkScores"

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        self._layers: list[Tensor] = []
        later = torch.arange(run.n_tokens - 1, -1, -1)
        self._n_queries = later + (self.convention == "gu")
        self._hidden = self._n_queries < (1 if self.convention == "gu" else self.min_queries)

    def update(self, site: str, layer: int | None, activation: AttentionColumns) -> None:
        """Take the means of one layer."""
        total = activation.received
        if self.convention == "gu":
            total = total + activation.own
        score = total.cpu() / self._n_queries
        score[:, self._hidden] = torch.nan
        self._layers.append(score)

    def result(self) -> Float[Tensor, "layer head token"]:
        """Scores by layer and head."""
        return torch.stack(self._layers)


def sink_rate(
    score: Float[Tensor, "layer head token"], epsilon: float = 0.3
) -> Float[Tensor, "token"]:
    """Share of (layer, head) pairs in which a token's importance score exceeds `epsilon`.

    Definition of Gu et al. (arXiv 2410.10781), who use `SinkScores(convention="gu")` scores,
    epsilon 0.3 and the first token.

    Raises:
        InputError: `epsilon` outside [0, 1].
    """
    if not 0 <= epsilon <= 1:
        raise InputError(f"epsilon is {epsilon}; attention weights lie in [0, 1]")
    return (score > epsilon).float().mean(dim=(0, 1))


@dataclass(frozen=True)
class MassiveActivation:
    """Largest activation of every token's residual, by layer; each field is [layer, token]."""

    value: Float[Tensor, "layer token"]
    """The largest-magnitude entry, with its sign."""
    dimension: Int[Tensor, "layer token"]
    """The residual dimension in which it stands."""
    ratio: Float[Tensor, "layer token"]
    """Its magnitude over the median magnitude of all entries of all tokens in that layer."""

    def is_massive(
        self, *, min_value: float = 100.0, min_ratio: float = 1000.0
    ) -> Bool[Tensor, "layer token"]:
        """Which are massive activations: |value| > 100 and > 1000 times the median (Sun et al.,
        arXiv 2402.17762). Absolute values depend on a model's scale; the ratio does not."""
        return (self.value.abs() > min_value) & (self.ratio > min_ratio)


class MassiveActivations(Collector):
    """Largest residual entry of every token. Result: `MassiveActivation`."""

    sites = ("resid_post",)

    def start(self, run: Run) -> None:
        """Prepare for one text."""
        shape = (run.n_layers, run.n_tokens)
        self._found = MassiveActivation(
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
        self._found.value[layer] = value.cpu()
        self._found.dimension[layer] = dimension.cpu()
        self._found.ratio[layer] = (value.abs() / median).cpu()

    def result(self) -> MassiveActivation:
        """The largest entries."""
        return self._found
