"""Other published measures beside this library's detection: which tokens does each of them name?

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

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.observe.entropy import Entropies
from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MEASURES = ("evidence", "reference", "gu", "massive")
"""Names of the measures, in the order of `OtherMeasures.named`."""


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

    def plot(self, **kwargs: Any) -> Figure:
        """Named tokens and entropy by layer; see `secondary_sinks.report.measures`."""
        from secondary_sinks.report.measures import plot_measures

        return plot_measures(self, **kwargs)
