"""What do ordinary tokens have at a site, on average over many texts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.intervene.edits import Replace
from secondary_sinks.intervene.interventions import SITES
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.selection import check_maps
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd


def mean_activations(
    model: Model,
    sink_maps: SinkMap | Sequence[SinkMap],
    sites: Sequence[str] = ("mlp_out", "attn_out"),
    *,
    fwd_hooks: Sequence[UserHook] = (),
    progress: bool | None = None,
) -> MeanActivations:
    """What do ordinary tokens have at a site, on average over many texts?

    Zero ablation removes what every token gets from a block together with what one token gets; mean
    ablation leaves the former. The mean over the same text (`Mean()`) is of few, related tokens;
    texts of the kind that the model was trained on give a better one:

    >>> means = mean_activations(model, detect_sinks(model, texts))
    >>> edit = Intervention("mlp_out", 5, 3, means.edit("mlp_out", 5))
    >>> counterfactuals(model, sink_map, [edit])

    Ordinary tokens are those of `sinks.controls.ordinary_tokens`, without the first of each text.
    Each token counts alike, so a long text counts more than a short one. Not evidence for: what
    tokens of texts of another kind have there.

    Args:
        model: any TransformerLens model.
        sink_maps: the maps of one or many texts, from `detect_sinks` in this model.
        sites: where to measure; see `Intervention.site`.
        fwd_hooks: the hooks with which the maps were made, in force here as well.
        progress: show a progress bar; None shows one for more than one text.

    Raises:
        InputError: no or unknown sites, no ordinary token in any text, or a map that does not
            belong to this model.
        ModelError: the model lacks a site, or cannot be measured.
    """
    unknown = set(sites) - set(SITES)
    if unknown or not sites:
        raise InputError(f"no site {min(unknown, default='')!r}; there are {', '.join(SITES)}")
    several = check_maps(model, sink_maps, fwd_hooks=fwd_hooks)
    total: dict[str, Tensor] = {}
    n_tokens = 0
    show = len(several) > 1 if progress is None else progress
    for sink_map in tqdm(several, desc="mean activations", disable=not show):
        ordinary = ordinary_tokens(sink_map)
        ordinary[0] = False
        collectors = [_Sums(site, ordinary) for site in sites]
        tokens = sink_map.array("tokens")
        sums = trace_tokens(model, tokens, collectors, fwd_hooks=fwd_hooks)
        for site in sites:
            total[site] = total.get(site, torch.zeros(())) + sums[site]
        n_tokens += int(ordinary.sum())
    if n_tokens == 0:
        raise InputError("no ordinary token in any text: the texts are too short")
    return MeanActivations(
        mean={site: value / n_tokens for site, value in total.items()},
        n_tokens=n_tokens,
        n_texts=len(several),
        provenance=several[0].provenance,
    )


class _Sums(Collector):
    """Sum over ordinary tokens, [layer, *shape]."""

    def __init__(self, site: str, ordinary: Bool[Tensor, " token"]):
        self.sites = (site,)
        self.name = site
        self._ordinary = ordinary

    def start(self, run: Run) -> None:
        self._layers: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        ordinary = activation[self._ordinary.to(activation.device)]
        self._layers.append(ordinary.sum(dim=0, dtype=torch.float32).cpu())

    def result(self) -> Tensor:
        return torch.stack(self._layers)


@dataclass(frozen=True)
class MeanActivations(Result):
    """The mean activations of ordinary tokens of many texts; see `mean_activations`."""

    mean: dict[str, Float[Tensor, " layer *shape"]]
    """By site: the mean over tokens, [layer, d_model], or [layer, head, d_head] at heads' sites."""
    n_tokens: int
    """Number of ordinary tokens in the mean."""
    n_texts: int
    """Number of texts."""
    provenance: Provenance
    """Of the first text."""

    def edit(self, site: str, layer: int, *, head: int | None = None) -> Replace:
        """The edit that replaces an activation at that site and layer with the mean.

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
            f"MeanActivations({self.provenance.model.name!r}, {', '.join(self.mean)}: "
            f"{counted(self.n_tokens, 'ordinary token')} of {counted(self.n_texts, 'text')})"
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
