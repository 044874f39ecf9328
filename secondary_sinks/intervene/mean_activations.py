"""What do ordinary tokens have at a site, on average over many texts?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.errors import InputError
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.edits import Replace
from secondary_sinks.intervene.interventions import SITES
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import sink_map_of

if TYPE_CHECKING:
    import pandas as pd


def mean_activations(
    model: Any,
    texts: Sequence[Text],
    sites: Sequence[str] = ("mlp_out", "attn_out"),
    *,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
    progress: bool | None = None,
) -> MeanActivations:
    """Average activations over the ordinary tokens of a reference corpus.

    Zero ablation takes away what every token gets from a block as well as what is particular to
    one; mean ablation leaves the former. The mean over the same text (`Mean()`) is of few tokens
    that all belong together; a corpus of the kind that the model was made for gives a better one:

    >>> means = ss.mean_activations(model, texts)
    >>> ss.Intervention("mlp_out", 5, 3, means.edit("mlp_out", 5))

    Ordinary tokens are those that are no sinks in their text, the primary and the first token left
    out as well. Each token counts alike, so a long text counts more than a short one.

    Args:
        model: any TransformerLens model.
        texts: a list of texts (see `detect_sinks`).
        sites: where to measure; see `Intervention.site`.
        chat: strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.
        progress: show a progress bar; None shows one for more than one text.

    Raises:
        InputError: no texts, no or unknown sites, or no ordinary token in any text.
        ModelError: the model lacks a site, or cannot be measured.
    """
    if isinstance(texts, (str, Tensor)) or not texts:
        raise InputError("a list of texts is meant")
    unknown = set(sites) - set(SITES)
    if unknown or not sites:
        raise InputError(f"no site {min(unknown, default='')!r}; there are {', '.join(SITES)}")
    total: dict[str, Tensor] = {}
    n_tokens = 0
    show = len(texts) > 1 if progress is None else progress
    for text in tqdm(texts, desc="reference texts", disable=not show):
        sinks = sink_map_of(model, text, chat=chat, fwd_hooks=fwd_hooks)
        ordinary = torch.ones(sinks.n_tokens, dtype=torch.bool)
        ordinary[[0, sinks.primary_position, *(sink.position for sink in sinks.sinks)]] = False
        collectors = [_Sums(site, ordinary) for site in sites]
        tokens = cast(Tensor, sinks.tokens)
        found = cast(Trace, trace(model, tokens, collectors, fwd_hooks=fwd_hooks))
        for site in sites:
            total[site] = total.get(site, torch.zeros(())) + found[site]
        n_tokens += int(ordinary.sum())
    if n_tokens == 0:
        raise InputError("no ordinary token in any text: the texts are too short")
    return MeanActivations(
        mean={site: value / n_tokens for site, value in total.items()},
        n_tokens=n_tokens,
        n_texts=len(texts),
        model=dataclasses.asdict(describe(model)),
    )


class _Sums(Collector):
    """Sum over ordinary tokens, [layer, *shape]."""

    def __init__(self, site: str, ordinary: Bool[Tensor, "token"]):
        self.sites = (site,)
        self.name = site
        self._ordinary = ordinary

    def start(self, run: Run) -> None:
        self._layers: list[Tensor] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        kept = activation[self._ordinary.to(activation.device)]
        self._layers.append(kept.sum(dim=0, dtype=torch.float32).cpu())

    def result(self) -> Tensor:
        return torch.stack(self._layers)


@dataclass(frozen=True)
class MeanActivations(Result):
    """What ordinary tokens of many texts have at some sites on average; see `mean_activations`."""

    mean: dict[str, Float[Tensor, "layer *shape"]]
    """By site: the mean over tokens, [layer, d_model], or [layer, head, d_head] at heads' sites."""
    n_tokens: int
    """Ordinary tokens that went into it."""
    n_texts: int
    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""

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
