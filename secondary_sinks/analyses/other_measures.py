"""Which tokens do other published measures name, and how spread out is attention?

* **evidence**: the sinks of the map, primary and secondary;
* **published**: those of the criterion of arXiv 2512.22213, alignment alone;
* **gu**: tokens whose importance score (mean attention of the queries i >= t) exceeds epsilon in
  more than `min_rate` of all (layer, head) pairs (Gu et al., arXiv 2410.10781, who report the rate
  of the first token; that a token is *named* by a rate is this library's reading);
* **massive**: tokens with a massive activation after some block (Sun et al., arXiv 2402.17762).

They measure different things, so a difference is not an error of any of them: a massive activation
is one large entry and says nothing of attention, an importance score ignores direction.

Tokens with few later queries are left out of the comparison. Averaged over one query, the attention
to a text's last token is its attention to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.observe.attention_collectors import (
    AttentionEntropy,
    Entropies,
    SinkScores,
    Visible,
    sink_rate,
)
from secondary_sinks.observe.collectors import Collector, MassiveActivation, MassiveActivations
from secondary_sinks.observe.residual_geometry import ResidualGeometry
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result
from secondary_sinks.sinks import published_criterion
from secondary_sinks.sinks.measurements import Measurements
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("evidence", "published", "gu", "massive")
"""Names of the measures, in the order of `OtherMeasures.named`."""


def other_measures(
    model: Model,
    sink_map: SinkMap,
    *,
    epsilon: float = 0.3,
    min_rate: float = 0.0,
    min_value: float = 100.0,
    min_ratio: float = 1000.0,
    fwd_hooks: Sequence[UserHook] = (),
) -> OtherMeasures:
    """Which tokens do other published measures name, and how spread out is attention?

    The evidence criterion, the published one of arXiv 2512.22213, the importance score of Gu et
    al. and the massive activations of Sun et al., each with its own thresholds;
    `analyses.other_measures` says when each names a token. The entropy of each query's attention,
    in nats and over that of uniform attention, shows where attention gathers.

    >>> measures = other_measures(model, sink_map)
    >>> measures.agreement()
    >>> measures.plot()

    Not evidence for: that a measure which disagrees is wrong (they measure different things), or
    that low entropy is due to sinks: attention to the preceding token has one as well.

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model. Whether its text went through a chat template
            matters to the published criterion, and is read from it.
        epsilon: importance score above which a head has a sink (Gu et al.).
        min_rate: share of all (layer, head) pairs above which a token counts as named by it.
        min_value: magnitude of a massive activation (Sun et al.); depends on a model's scale.
        min_ratio: its least ratio to the median magnitude of the layer.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Raises:
        InputError: thresholds out of range, or a sink map that does not belong to this model.
        ModelError: the model cannot be measured.
    """
    if not 0 <= min_rate < 1:
        raise InputError(f"min_rate is {min_rate}; it is a share, from 0 to below 1")
    if min_value < 0 or min_ratio < 0:
        raise InputError(
            f"min_value is {min_value}, min_ratio {min_ratio}; neither may be negative"
        )
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    collectors: list[Collector] = [
        SinkScores("gu", name="importance"),
        MassiveActivations(),
        AttentionEntropy(),
        ResidualGeometry(published_criterion.CHAT_CANDIDATES, final_norm=True, name="geometry"),
    ]
    tokens = sink_map.array("tokens")
    trace_result = trace_tokens(model, tokens, collectors, fwd_hooks=fwd_hooks)
    measured = Measurements(
        tokens=tuple(tokens.tolist()),
        token_strings=sink_map.token_strings,
        geometry=trace_result["geometry"],
        score=sink_map.array("mean_attention"),
        visible=Visible(sink_map.array("n_seeing"), sink_map.array("uniform_attention")),
        beginnings=frozenset(sink_map.beginnings),
    )
    is_chat = sink_map.provenance.chat_template is not None
    published = published_criterion.detect(measured, chat=is_chat)
    massive: MassiveActivation = trace_result["MassiveActivations"]
    is_massive = massive.is_massive(min_value=min_value, min_ratio=min_ratio)
    rate = sink_rate(trace_result["importance"], epsilon)
    n_layers, n_tokens = massive.value.shape
    min_queries = int(sink_map.thresholds["min_queries"])
    live = {layer + 1 for sink in sink_map.secondary for layer in sink.layers} - {n_layers}
    return OtherMeasures(
        token_strings=sink_map.token_strings,
        named=torch.stack(
            [
                _tokens_of(sink_map.sinks, n_tokens),
                _tokens_of((s for s in published.sinks if s.kind != "noise"), n_tokens),
                rate > min_rate,
                is_massive.any(dim=0),
            ]
        ),
        compared=torch.arange(n_tokens - 1, -1, -1) >= min_queries,
        secondary=_tokens_of(sink_map.secondary, n_tokens),
        importance=trace_result["importance"],
        sink_rate=rate,
        massive_value=massive.value,
        massive_dimension=massive.dimension,
        massive_ratio=massive.ratio,
        is_massive=is_massive,
        entropy=trace_result["AttentionEntropy"],
        live_layers=tuple(sorted(live)),
        epsilon=epsilon,
        min_rate=min_rate,
        min_queries=min_queries,
        provenance=sink_map.provenance,
    )


@dataclass(frozen=True)
class OtherMeasures(Result):
    """What four measures say of each token, and the entropy of attention; see `other_measures`."""

    token_strings: tuple[str, ...]
    named: Bool[Tensor, " measure token"]
    """Which tokens each of `MEASURES` names."""
    compared: Bool[Tensor, " token"]
    """Tokens with enough later queries to be compared."""
    secondary: Bool[Tensor, " token"]
    """Secondary sinks of the evidence criterion, among those it names."""
    importance: Float[Tensor, " layer head token"]
    """Importance score of Gu et al.: mean attention of the queries i >= t."""
    sink_rate: Float[Tensor, " token"]
    """Share of (layer, head) pairs in which it exceeds `epsilon`."""
    massive_value: Float[Tensor, " layer token"]
    """Largest-magnitude entry of the residual after each block, with its sign."""
    massive_dimension: Int[Tensor, " layer token"]
    massive_ratio: Float[Tensor, " layer token"]
    """Its magnitude over the median magnitude of all entries of that layer."""
    is_massive: Bool[Tensor, " layer token"]
    entropy: Entropies
    live_layers: tuple[int, ...]
    """Layers whose attention sees secondary sinks."""
    epsilon: float
    min_rate: float
    min_queries: int
    provenance: Provenance

    def of(self, measure: str) -> list[int]:
        """Positions that a measure names, among the compared ones.

        Raises:
            InputError: no such measure.
        """
        if measure not in MEASURES:
            raise InputError(f"no measure {measure!r}; there are {', '.join(MEASURES)}")
        named = self.named[MEASURES.index(measure)] & self.compared
        return [int(position) for position in named.nonzero().flatten()]

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(self.of(name))}" for name in MEASURES)
        return (
            f"OtherMeasures({self.provenance.model.name!r}, "
            f"{int(self.compared.sum())} tokens compared; named by {counts})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each compared token that some measure names."""
        import pandas as pd

        positions = (self.named.any(dim=0) & self.compared).nonzero().flatten()
        largest = self.massive_value.abs().argmax(dim=0)[positions]
        columns: dict[str, Any] = {
            "position": positions,
            "token": [self.token_strings[position] for position in positions.tolist()],
            **{name: self.named[row, positions] for row, name in enumerate(MEASURES)},
            "secondary": self.secondary[positions],
            "sink_rate": self.sink_rate[positions],
            "importance": self.importance.amax(dim=(0, 1))[positions],
            "massive_value": self.massive_value[largest, positions],
            "massive_dimension": self.massive_dimension[largest, positions],
            "massive_ratio": self.massive_ratio[largest, positions],
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


def _tokens_of(sinks: Iterable[Sink], n_tokens: int) -> Bool[Tensor, " token"]:
    mask = torch.zeros(n_tokens, dtype=torch.bool)
    mask[[sink.position for sink in sinks]] = True
    return mask
