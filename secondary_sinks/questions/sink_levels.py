"""Which (onset, lifetime) pairs recur over the sinks of many texts?"""

from __future__ import annotations

from collections.abc import Sequence

from secondary_sinks.explain.levels import SinkLevels, find_levels
from secondary_sinks.explain.sinks import SinkMap


def sink_levels(maps: SinkMap | Sequence[SinkMap], *, max_spread: int = 2) -> SinkLevels:
    """Count the secondary sinks of many texts by onset and lifetime, and find the levels.

    Args:
        maps: sink maps of texts of one model, measured (`detect_sinks`) or published
            (`read_reference`).
        max_spread: sinks with the same onset are one level if their lifetimes differ by at most
            this many layers.

    Raises:
        InputError: no maps, or maps of models of different depth.
    """
    return find_levels([maps] if isinstance(maps, SinkMap) else list(maps), max_spread=max_spread)
