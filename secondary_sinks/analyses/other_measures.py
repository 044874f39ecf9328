"""Which tokens do other published measures name, and how spread out is attention?

* **evidence**: the sinks of `detect_sinks`, primary and secondary;
* **reference**: those of the published criterion of arXiv 2512.22213, alignment alone;
* **gu**: tokens whose importance score (mean attention of the queries i >= t) exceeds epsilon in
  more than `min_rate` of all (layer, head) pairs (Gu et al., arXiv 2410.10781, who report the rate
  of the first token; that a token is *named* by a rate is this library's reading);
* **massive**: tokens with a massive activation after some block (Sun et al., arXiv 2402.17762).

They ask different things, so that they differ is no error of any of them: a massive activation is
one large entry and says nothing of attention, an importance score knows no direction.

Tokens with few later queries are left out of the comparison. Averaged over one query, the attention
to a text's last token is its attention to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.observe.attention_collectors import (
    AttentionEntropy,
    Entropies,
    SinkScores,
    sink_rate,
)
from secondary_sinks.observe.collectors import Collector, MassiveActivation, MassiveActivations
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.result import Result
from secondary_sinks.sinks.detect_sinks import detect_sinks
from secondary_sinks.sinks.selection import sink_map_of
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("evidence", "reference", "gu", "massive")

"""Names of the measures, in the order of `OtherMeasures.named`."""


def other_measures(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    epsilon: float = 0.3,
    min_rate: float = 0.0,
    min_value: float = 100.0,
    min_ratio: float = 1000.0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> OtherMeasures:
    """Set published measures of sinks beside the detection, and measure attention's entropy.

    The evidence criterion, the published one of arXiv 2512.22213, the importance score of Gu et
    al. and the massive activations of Sun et al., each with its own thresholds;
    `analyses.other_measures` tells when each names a token. The entropy of each query's attention, in
    nats and over that of uniform attention, shows where attention gathers.

    What it is not evidence for: that a measure which disagrees is wrong (they ask different
    things), or that low entropy is due to sinks: attention to the token before has one as well.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        epsilon: importance score above which a head has a sink (Gu et al.).
        min_rate: share of all (layer, head) pairs above which a token counts as named by it.
        min_value: magnitude of a massive activation (Sun et al.); depends on a model's scale.
        min_ratio: its least ratio to the median magnitude of the layer.
        chat: the string goes through the chat template; also of a sink map's text, since the
            published criterion has a rule of its own for templates.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: thresholds out of range, several texts, or a sink map of another model, text or
            criterion.
        ModelError: the model cannot be measured.
    """
    if not 0 <= min_rate < 1:
        raise InputError(f"min_rate is {min_rate}; it is a share, from 0 to below 1")
    if min_value < 0 or min_ratio < 0:
        raise InputError(
            f"min_value is {min_value}, min_ratio {min_ratio}; neither may be negative"
        )
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    tokens = cast(Tensor, found.tokens)
    collectors: list[Collector] = [
        SinkScores("gu", name="importance"),
        MassiveActivations(),
        AttentionEntropy(),
    ]
    traced = cast(Trace, trace(model, tokens, collectors, fwd_hooks=fwd_hooks))
    reference = cast(
        SinkMap,
        detect_sinks(model, tokens, criterion="published", chat=chat, fwd_hooks=fwd_hooks),
    )
    massive = cast(MassiveActivation, traced["MassiveActivations"])
    is_massive = massive.is_massive(min_value=min_value, min_ratio=min_ratio)
    rate = sink_rate(traced["importance"], epsilon)
    n_layers, n_tokens = massive.value.shape
    min_queries = int(found.thresholds["min_queries"])
    named = torch.stack(
        [
            _at([sink.position for sink in found.sinks], n_tokens),
            _at([sink.position for sink in reference.sinks if sink.kind != "noise"], n_tokens),
            rate > min_rate,
            is_massive.any(dim=0),
        ]
    )
    live = {layer + 1 for sink in found.secondary for layer in sink.layers}
    return OtherMeasures(
        token_strings=found.token_strings,
        named=named,
        compared=torch.arange(n_tokens - 1, -1, -1) >= min_queries,
        secondary=_at([sink.position for sink in found.secondary], n_tokens),
        importance=traced["importance"],
        sink_rate=rate,
        massive_value=massive.value,
        massive_dimension=massive.dimension,
        massive_ratio=massive.ratio,
        is_massive=is_massive,
        entropy=traced["AttentionEntropy"],
        live_layers=tuple(sorted(layer for layer in live if layer < n_layers)),
        epsilon=epsilon,
        min_rate=min_rate,
        min_queries=min_queries,
        model=found.model,
    )


def _at(positions: Sequence[int], n_tokens: int) -> Tensor:
    mask = torch.zeros(n_tokens, dtype=torch.bool)
    mask[list(positions)] = True
    return mask


@dataclass(frozen=True)
class OtherMeasures(Result):
    """What four measures say of each token, and the entropy of attention; see `other_measures`."""

    token_strings: tuple[str, ...]
    named: Bool[Tensor, "measure token"]
    """Which tokens each of `MEASURES` names."""
    compared: Bool[Tensor, "token"]
    """Tokens with enough later queries to be compared."""
    secondary: Bool[Tensor, "token"]
    """Secondary sinks of the evidence criterion, among those it names."""
    importance: Float[Tensor, "layer head token"]
    """Importance score of Gu et al.: mean attention of the queries i >= t."""
    sink_rate: Float[Tensor, "token"]
    """Share of (layer, head) pairs in which it exceeds `epsilon`."""
    massive_value: Float[Tensor, "layer token"]
    """Largest-magnitude entry of the residual after each block, with its sign."""
    massive_dimension: Int[Tensor, "layer token"]
    massive_ratio: Float[Tensor, "layer token"]
    """Its magnitude over the median magnitude of all entries of that layer."""
    is_massive: Bool[Tensor, "layer token"]
    entropy: Entropies
    live_layers: tuple[int, ...]
    """Layers whose attention sees secondary sinks."""
    epsilon: float
    min_rate: float
    min_queries: int
    model: dict[str, Any]

    def of(self, measure: str) -> list[int]:
        """Positions that a measure names, among the compared ones.

        Raises:
            InputError: no such measure.
        """
        if measure not in MEASURES:
            raise InputError(f"no measure {measure!r}; there are {', '.join(MEASURES)}")
        kept = self.named[MEASURES.index(measure)] & self.compared
        return [int(position) for position in kept.nonzero().flatten().tolist()]

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(self.of(name))}" for name in MEASURES)
        return (
            f"OtherMeasures({self.model.get('name', '?')!r}, "
            f"{int(self.compared.sum())} tokens compared; named by {counts})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each compared token that some measure names."""
        import pandas as pd

        kept = (self.named.any(dim=0) & self.compared).nonzero().flatten()
        largest = self.massive_value.abs().argmax(dim=0)[kept]
        columns: dict[str, Any] = {
            "position": kept.tolist(),
            "token": [self.token_strings[position] for position in kept.tolist()],
        }
        columns |= {name: self.named[row, kept].tolist() for row, name in enumerate(MEASURES)}
        columns |= {
            "secondary": self.secondary[kept].tolist(),
            "sink_rate": self.sink_rate[kept].tolist(),
            "importance": self.importance.amax(dim=(0, 1))[kept].tolist(),
            "massive_value": self.massive_value[largest, kept].tolist(),
            "massive_dimension": self.massive_dimension[largest, kept].tolist(),
            "massive_ratio": self.massive_ratio[largest, kept].tolist(),
        }
        return pd.DataFrame(columns)

    def agreement(self) -> pd.DataFrame:
        """One row for each pair of measures: how many tokens each names, both, and one only.

        `jaccard` is the share of both among either, `kappa` Cohen's; NaN where neither names one.
        """
        import pandas as pd
        from sklearn.metrics import cohen_kappa_score

        rows = []
        for first, second in combinations(range(len(MEASURES)), 2):
            a, b = (self.named[row, self.compared] for row in (first, second))
            either, both = int((a | b).sum()), int((a & b).sum())
            varies = bool(a.any() | b.any()) and not bool((a & b).all())
            rows.append(
                {
                    "first": MEASURES[first],
                    "second": MEASURES[second],
                    "n_first": int(a.sum()),
                    "n_second": int(b.sum()),
                    "both": both,
                    "jaccard": both / either if either else float("nan"),
                    "kappa": float(cohen_kappa_score(a, b)) if varies else float("nan"),
                }
            )
        return pd.DataFrame(rows)

    def entropy_frame(self) -> pd.DataFrame:
        """One row for each layer and head: its mean entropy, in nats and normalized."""
        import pandas as pd

        n_layers, n_heads = self.entropy.by_head.shape
        layer, head = torch.meshgrid(torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
        columns = {"layer": layer, "head": head, "entropy": self.entropy.by_head}
        columns["normalized"] = self.entropy.normalized_by_head
        return pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})
