"""Which tokens, at which positions, become secondary sinks?"""

from __future__ import annotations

from collections.abc import Sequence

from secondary_sinks.errors import InputError
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.explain.token_statistics import TokenStatistics, count_tokens


def token_statistics(
    maps: SinkMap | Sequence[SinkMap], *, min_occurrences: int = 5, confidence: float = 0.95
) -> TokenStatistics:
    """Rates at which tokens become secondary sinks, against their frequency.

    By token id, by class of string (special, whitespace, punctuation, digit, article, word, other),
    by tenth of the text, and by how often the id came before in its text. Each rate has an interval
    and a lift over the rate of all tokens; `explain.token_statistics` tells how, and what the
    interval does not cover.

    What it is not evidence for: that the token's *identity* makes it a sink. Kinds of tokens stand
    in different places and after different words; `separability` asks what tells a sink from the
    same token elsewhere.

    Args:
        maps: sink maps of one or many texts of one model, from `detect_sinks`.
        min_occurrences: tokens that are never a sink are listed if they occur at least this often.
        confidence: of the intervals.

    Raises:
        InputError: no maps, maps of several models or without measurements, or options out of
            range.
    """
    if min_occurrences < 1:
        raise InputError(f"min_occurrences is {min_occurrences}; it must be 1 or more")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it lies between 0 and 1")
    return count_tokens(maps, min_occurrences=min_occurrences, confidence=confidence)
