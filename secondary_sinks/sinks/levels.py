"""Which (onset, lifetime) pairs recur over the sinks of many texts?

Rule for merging: sinks with the same onset are in one level if their lifetimes differ by at most
`max_spread` layers over the whole level (complete-linkage clustering of the lifetimes). The onset
is never merged, because it names the layer that wrote the sink; one written vector that fades a
layer earlier or later is still the same level.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from secondary_sinks.errors import InputError
from secondary_sinks.result import Result
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd


def sink_levels(maps: SinkMap | Sequence[SinkMap], *, max_spread: int = 2) -> SinkLevels:
    """Count the secondary sinks of many texts by onset and lifetime, and find the levels.

    Args:
        maps: sink maps of texts of one model, measured (`detect_sinks`) or published
            (`read_published`).
        max_spread: sinks with the same onset are one level if their lifetimes differ by at most
            this many layers.

    Raises:
        InputError: no maps, or maps of models of different depth.
    """
    return find_levels([maps] if isinstance(maps, SinkMap) else list(maps), max_spread=max_spread)


@dataclass(frozen=True)
class SinkLevel:
    """A recurrent (onset, lifetime) pair."""

    onset: int
    lifetime: int
    """The most common lifetime of the level (the longest of several equally common ones)."""
    lifetimes: tuple[int, int]
    """Shortest and longest lifetime that were merged into it."""
    n_sinks: int
    n_texts: int
    tokens: tuple[tuple[str, int], ...]
    """Which tokens made them, and how often, most frequent first."""


@dataclass(frozen=True)
class SinkLevels(Result):
    """The sink levels of one model over many texts."""

    levels: tuple[SinkLevel, ...]
    """By number of sinks, largest first."""
    counts: dict[tuple[int, int], int]
    """Number of sinks by exact (onset, lifetime)."""
    n_texts: int
    n_texts_with_sinks: int
    n_layers: int
    """Depth of the model; where the maps do not know it, one more than the last layer seen."""
    model: str
    max_spread: int

    @property
    def n_sinks(self) -> int:
        """Number of secondary sinks."""
        return sum(self.counts.values())

    @property
    def determinism(self) -> float:
        """How far the sinks are from being spread over all (onset, lifetime) pairs, 0 to 1.

        1 - H / H_max, with H the entropy of the exact pairs and H_max its largest value, the log of
        the number of possible pairs or, if that is smaller, of sinks. 1: all sinks share one pair;
        0: no two do. NaN with fewer than two sinks. Few sinks make it an uncertain number, and it
        says nothing of whether the pair was caused by one layer.
        """
        n = self.n_sinks
        if n < 2:
            return math.nan
        share = np.array(list(self.counts.values())) / n
        possible = self.n_layers * (self.n_layers + 1) // 2
        return float(1 + (share * np.log(share)).sum() / math.log(min(n, possible)))

    def __repr__(self) -> str:
        found = ", ".join(f"{x.onset}+{x.lifetime}: {x.n_sinks}" for x in self.levels[:4])
        more = ", ..." if len(self.levels) > 4 else ""
        return (
            f"SinkLevels({self.model!r}, {self.n_sinks} sinks in {self.n_texts_with_sinks} of "
            f"{self.n_texts} texts, onset+lifetime: {found or 'none'}{more})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each level."""
        import pandas as pd

        rows = [
            {
                "onset": level.onset,
                "lifetime": level.lifetime,
                "shortest": level.lifetimes[0],
                "longest": level.lifetimes[1],
                "n_sinks": level.n_sinks,
                "n_texts": level.n_texts,
                "tokens": ", ".join(f"{token!r} ({count})" for token, count in level.tokens[:5]),
            }
            for level in self.levels
        ]
        columns = ["onset", "lifetime", "shortest", "longest", "n_sinks", "n_texts", "tokens"]
        return pd.DataFrame(rows, columns=columns)


def find_levels(maps: Sequence[SinkMap], *, max_spread: int = 2) -> SinkLevels:
    """Count the secondary sinks of many texts of one model by (onset, lifetime), and merge.

    Raises:
        InputError: no maps, maps of models of different depth, or a negative `max_spread`.
    """
    if not maps:
        raise InputError("no sink maps: pass the results of detect_sinks or read_published")
    if max_spread < 0:
        raise InputError(f"max_spread is {max_spread}; it must be 0 or more layers")
    depths = {sinks.n_layers for sinks in maps} - {None}
    names = {str(sinks.model.get("name", "?")) for sinks in maps}
    if len(depths) > 1:
        raise InputError(f"maps of models with {sorted(depths)} layers; levels are those of one")  # type: ignore[type-var]
    found = [(text, sink) for text, sinks in enumerate(maps) for sink in sinks.secondary]
    last = max((sink.layers[-1] for sinks in maps for sink in sinks.sinks), default=0)
    levels: list[SinkLevel] = []
    for onset in sorted({sink.l_start for _, sink in found}):
        here = [(text, sink) for text, sink in found if sink.l_start == onset]
        labels = _cluster([sink.lifetime for _, sink in here], max_spread)
        for label in sorted(set(labels)):
            levels.append(_level([x for x, own in zip(here, labels, strict=True) if own == label]))
    levels.sort(key=lambda level: (-level.n_sinks, level.onset, level.lifetime))
    return SinkLevels(
        levels=tuple(levels),
        counts=dict(sorted(Counter(sink.level for _, sink in found).items())),
        n_texts=len(maps),
        n_texts_with_sinks=len({text for text, _ in found}),
        n_layers=depths.pop() if depths else last + 1,  # type: ignore[arg-type]
        model=", ".join(sorted(names)),
        max_spread=max_spread,
    )


def _level(members: list[tuple[int, Sink]]) -> SinkLevel:
    lifetimes = Counter(sink.lifetime for _, sink in members)
    tokens = Counter(sink.token for _, sink in members)
    return SinkLevel(
        onset=members[0][1].l_start,
        lifetime=max(lifetimes, key=lambda life: (lifetimes[life], life)),
        lifetimes=(min(lifetimes), max(lifetimes)),
        n_sinks=len(members),
        n_texts=len({text for text, _ in members}),
        tokens=tuple(tokens.most_common()),
    )


def _cluster(lifetimes: list[int], max_spread: int) -> list[int]:
    if len(set(lifetimes)) == 1:
        return [0] * len(lifetimes)
    from scipy.cluster.hierarchy import fcluster, linkage

    # Of the distinct values, each weighing the same: how often a lifetime occurs must not decide
    # what it is merged with.
    distinct = sorted(set(lifetimes))
    tree = linkage(np.array(distinct, dtype=float)[:, None], method="complete")
    label = dict(zip(distinct, fcluster(tree, max_spread, criterion="distance"), strict=True))
    return [int(label[lifetime]) for lifetime in lifetimes]
