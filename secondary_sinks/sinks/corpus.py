"""Sinks of many texts: which maps belong together, and which sinks are one and the same.

In a causal model a token's residual depends on the tokens before it and on nothing else. Texts that
begin alike, as all conversations with one system prompt do, have the same vectors there, to the
last digit, and so the same sinks. Counting them once a text would make ten observations of one, and
a probe would be tested on vectors that it was trained on. So what many texts share at the beginning
belongs to the first of them:

>>> shared_prefixes([[1, 2, 3], [1, 2, 9], [4, 5]])
(0, 2, 0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from secondary_sinks.errors import InputError
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


class Found(NamedTuple):
    """A secondary sink and the text in which it was found."""

    text: int
    """Index of the text."""
    sink: Sink


def listed(maps: SinkMap | Sequence[SinkMap]) -> tuple[SinkMap, ...]:
    """One or many maps of one model as a tuple.

    Raises:
        InputError: no maps, something else than maps, or maps of several models.
    """
    several = (maps,) if isinstance(maps, SinkMap) else tuple(maps)
    if not several:
        raise InputError("no sink maps: pass the results of detect_sinks")
    strangers = [one for one in several if not isinstance(one, SinkMap)]
    if strangers:
        raise InputError(f"a sink map is meant, not {type(strangers[0]).__name__}")
    models = {(sink_map.provenance.weights, sink_map.model_name) for sink_map in several}
    if len(models) > 1:
        names = ", ".join(
            f"{name!r} (weights {weights or 'unknown'})"
            for weights, name in sorted(models, key=str)
        )
        raise InputError(f"maps of several models: {names}; ask about one model at a time")
    return several


def measured(maps: SinkMap | Sequence[SinkMap]) -> tuple[SinkMap, ...]:
    """The same, of maps that hold measurements.

    Raises:
        InputError: as `listed`; or a map that was read from a published record.
    """
    several = listed(maps)
    if any(one.tokens is None or one.sink_score is None or one.norm is None for one in several):
        raise InputError(
            "a sink map without measurements (read from a published record): detect the sinks of "
            "the text with detect_sinks"
        )
    return several


def shared_prefixes(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """How many tokens at its beginning each text shares with any one text before it."""
    root: dict[int, Any] = {}
    shared = []
    for text in texts:
        node, known, length = root, True, 0
        for token in text:
            known = known and token in node
            length += known
            node = node.setdefault(token, {})
        shared.append(length)
    return tuple(shared)


def shared_by(maps: Sequence[SinkMap]) -> tuple[int, ...]:
    """`shared_prefixes` of the texts of sink maps; 0 for those that hold no tokens."""
    ids = [[] if one.tokens is None else one.tokens.tolist() for one in maps]
    return shared_prefixes(ids)


def distinct_sinks(maps: Sequence[SinkMap]) -> Iterator[Found]:
    """Every secondary sink once: in the first text that has it with the same tokens before it."""
    for text, (one, shared) in enumerate(zip(maps, shared_by(maps), strict=True)):
        yield from (Found(text, sink) for sink in one.secondary if sink.position >= shared)


def repeats_note(maps: Sequence[SinkMap], n_distinct: int) -> tuple[str, ...]:
    """What a reader must know if sinks were left out because another text has them too."""
    n_sinks = sum(len(one.secondary) for one in maps)
    if n_sinks == n_distinct:
        return ()
    return (
        f"{n_sinks - n_distinct} of {n_sinks} sinks stand behind the same tokens in an earlier "
        "text, so they are the same sinks, and were counted once",
    )
