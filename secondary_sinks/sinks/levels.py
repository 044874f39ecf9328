"""Which (onset, lifetime) pairs recur over the sinks of many texts?

Rule for merging: sinks with the same onset are in one level if their lifetimes differ by at most
`max_spread` layers over the whole level (complete-linkage clustering of the lifetimes). Onsets are
never merged, because the onset names the layer that wrote the sink; one written vector that fades a
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
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.distinct_sinks import (
    SinkKinds,
    distinct_sinks,
    n_different_texts,
    repeats_note,
    sinks_of_kind,
)
from secondary_sinks.sinks.selection import listed
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd


def sink_levels(
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    sinks: SinkKinds = "secondary",
    max_spread: int = 2,
) -> SinkLevels:
    """Which (onset, lifetime) pairs recur over the sinks of many texts?

    Sinks that several texts share, because the texts begin alike or are one text given twice, are
    counted once; published files do not say which tokens they are of, so all their sinks count.

    >>> levels = ss.sink_levels(ss.detect_sinks(model, texts))
    >>> levels.to_frame()
    >>> levels.plot()

    Not evidence for: one writer. That sinks share a level does not show that the same MLP wrote
    them; see `attribute_to_mlps`.

    Args:
        sink_maps: sink maps of texts of one model, measured (`detect_sinks`) or published
            (`read_published`).
        sinks: "secondary", "primary" or "all".
        max_spread: sinks with the same onset are one level if their lifetimes differ by at most
            this many layers.

    Raises:
        InputError: no maps, maps of models of different depth, or a negative `max_spread`.
    """
    if max_spread < 0:
        raise InputError(f"max_spread is {max_spread}; it must be 0 or more layers")
    several = listed(sink_maps)
    depths = {sink_map.n_layers for sink_map in several if sink_map.n_layers is not None}
    if len(depths) > 1:
        raise InputError(
            f"maps of models with {sorted(depths)} layers; pass those of one model at a time"
        )
    distinct = [sink for _, sink in distinct_sinks(several, sinks)]
    last = max((sink.layers[-1] for sink_map in several for sink in sink_map.sinks), default=0)
    levels = [
        _level(members, several, sinks)
        for onset in {sink.l_start for sink in distinct}
        for members in _merged([sink for sink in distinct if sink.l_start == onset], max_spread)
    ]
    levels.sort(key=lambda level: (-level.n_sinks, level.onset, level.lifetime))
    texts = [sink_map for sink_map in several if sinks_of_kind(sink_map, sinks)]
    names = sorted({sink_map.model_name for sink_map in several})
    mixed = (f"maps of models or files with several names: {', '.join(names)}",)
    return SinkLevels(
        levels=tuple(levels),
        counts=dict(sorted(Counter(sink.level for sink in distinct).items())),
        sinks=sinks,
        n_texts=n_different_texts(several),
        n_texts_with_sinks=n_different_texts(texts),
        n_layers=depths.pop() if depths else last + 1,
        max_spread=max_spread,
        notes=(*repeats_note(several, sinks), *(mixed if len(names) > 1 else ())),
        provenance=several[0].provenance,
    )


@dataclass(frozen=True)
class SinkLevel:
    """A recurrent (onset, lifetime) pair."""

    onset: int
    lifetime: int
    """The most common lifetime of the level (the longest of several equally common ones)."""
    lifetimes: tuple[int, int]
    """Shortest and longest lifetime that were merged into it."""
    n_sinks: int
    """Sinks, each counted once."""
    n_texts: int
    """Texts that have such sinks, also where an earlier text has the same."""
    tokens: tuple[tuple[str, int], ...]
    """Their tokens, and how often each, most frequent first."""


@dataclass(frozen=True)
class SinkLevels(Result):
    """The sink levels of one model over many texts; see `sink_levels`."""

    levels: tuple[SinkLevel, ...]
    """By number of sinks, largest first."""
    counts: dict[tuple[int, int], int]
    """Number of sinks by exact (onset, lifetime)."""
    sinks: SinkKinds
    """Which sinks were counted."""
    n_texts: int
    """Different texts."""
    n_texts_with_sinks: int
    """Those that have such sinks, also where an earlier text has the same."""
    n_layers: int
    """Depth of the model; where the maps do not know it, one more than the last layer of a sink."""
    max_spread: int
    notes: tuple[str, ...]
    """What a reader must know: repeated sinks, several names."""
    provenance: Provenance
    """Of the first text."""

    @property
    def n_sinks(self) -> int:
        """Number of sinks, each counted once."""
        return sum(self.counts.values())

    @property
    def determinism(self) -> float:
        """How far the sinks are from being spread over all (onset, lifetime) pairs, 0 to 1.

        1 - H / H_max, with H the entropy of the exact pairs and H_max its largest value, the log of
        the number of possible pairs or, if that is smaller, of sinks. 1: all sinks share one pair;
        0: no two do. NaN with fewer than two sinks. With few sinks it is an uncertain number, and
        it does not say whether one layer caused the pair.
        """
        n = self.n_sinks
        if n < 2:
            return math.nan
        share = np.array(list(self.counts.values())) / n
        possible = self.n_layers * (self.n_layers + 1) // 2
        return float(1 + (share * np.log(share)).sum() / math.log(min(n, possible)))

    def __repr__(self) -> str:
        first = ", ".join(f"{x.onset}+{x.lifetime}: {x.n_sinks}" for x in self.levels[:4])
        more = ", ..." if len(self.levels) > 4 else ""
        return (
            f"SinkLevels({self.provenance.model.name!r}, {counted(self.n_sinks, 'sink')} in "
            f"{self.n_texts_with_sinks} of {counted(self.n_texts, 'text')}, onset+lifetime: "
            f"{first or 'none'}{more})"
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


def _level(members: Sequence[Sink], sink_maps: Sequence[SinkMap], sinks: SinkKinds) -> SinkLevel:
    onset = members[0].l_start
    lifetimes = Counter(sink.lifetime for sink in members)
    shortest, longest = min(lifetimes), max(lifetimes)
    texts = [
        sink_map
        for sink_map in sink_maps
        if any(
            sink.l_start == onset and shortest <= sink.lifetime <= longest
            for sink in sinks_of_kind(sink_map, sinks)
        )
    ]
    return SinkLevel(
        onset=onset,
        lifetime=max(lifetimes, key=lambda life: (lifetimes[life], life)),
        lifetimes=(shortest, longest),
        n_sinks=len(members),
        n_texts=n_different_texts(texts),
        tokens=tuple(Counter(sink.token for sink in members).most_common()),
    )


def _merged(sinks: Sequence[Sink], max_spread: int) -> list[list[Sink]]:
    """Sinks of one onset by level."""
    # Of the distinct lifetimes, each with the same weight: how often a lifetime occurs must not
    # decide what it is merged with.
    distinct = sorted({sink.lifetime for sink in sinks})
    if len(distinct) == 1:
        return [list(sinks)]
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(np.array(distinct, dtype=float)[:, None], method="complete")
    labels = dict(zip(distinct, fcluster(tree, max_spread, criterion="distance"), strict=True))
    return [
        [sink for sink in sinks if labels[sink.lifetime] == label] for label in set(labels.values())
    ]
