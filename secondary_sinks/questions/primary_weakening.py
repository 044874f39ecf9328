"""Does the primary sink weaken while secondary sinks live?"""

from __future__ import annotations

from collections.abc import Sequence

from secondary_sinks.explain.removal import SinkRemoval
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.explain.weakening import PrimaryWeakening, weakening


def primary_weakening(
    maps: SinkMap | Sequence[SinkMap],
    *,
    removals: SinkRemoval | Sequence[SinkRemoval] = (),
    seed: int = 0,
) -> PrimaryWeakening:
    """Relate the primary's sink score, layer by layer, to the secondary sinks that live there.

    Their strength is their number, the sum of their norm ratios, or the sum of their sink scores.
    The headline is the `adjusted` correlation with their number, without each layer's and each
    text's mean; `explain.weakening` tells why, and what is wrong with the others. It needs
    texts that differ in their secondary sinks, best of one length.

    What it is not evidence for: that secondary sinks *take* the attention from the primary. Texts
    that make more of them may differ otherwise; pass the results of `remove_sinks` for the causal
    answer beside it. The correlation with their sink scores is partly arithmetic, since all the
    attention of a query adds up to 1: what one key gets the others lose.

    Args:
        maps: sink maps of one or many texts of one model, from `detect_sinks`.
        removals: results of `remove_sinks` in some of these texts.
        seed: of the resampling; recorded with the result.

    Raises:
        InputError: no maps, maps of several models or without measurements, or removals in other
            texts than theirs.
    """
    given = [removals] if isinstance(removals, SinkRemoval) else list(removals)
    return weakening(maps, given, seed=seed)
