"""The sinks of many texts, each counted once.

In a causal model a token's residual depends on the tokens up to it and on nothing else. Texts that
begin alike, as all conversations with one system prompt do, have the same vectors there and so the
same sinks. Counting those once per text would make ten observations of one, and would test a probe
on vectors that it was trained on. So the beginning that a text shares with an earlier one belongs
to the earlier one alone:

>>> shared_prefixes([[1, 2, 3], [1, 2, 9], [4, 5]])
(0, 2, 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from secondary_sinks.errors import InputError
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

SinkKinds: TypeAlias = Literal["secondary", "primary", "all"]
"""Which sinks of each text an analysis of many texts is about."""


class TextSink(NamedTuple):
    """A sink and the text that it is counted in."""

    text: int
    """Index of the text."""
    sink: Sink


def distinct_sinks(sink_maps: Sequence[SinkMap], sinks: SinkKinds = "secondary") -> list[TextSink]:
    """Every sink of some texts once: in the first text that has it behind the same tokens.

    Raises:
        InputError: `sinks` is not one of the kinds.
    """
    beginnings = shared_beginnings(sink_maps)
    return [
        TextSink(text, sink)
        for text, (sink_map, n_shared) in enumerate(zip(sink_maps, beginnings, strict=True))
        for sink in sinks_of_kind(sink_map, sinks)
        if sink.position >= n_shared
    ]


def sinks_of_kind(sink_map: SinkMap, sinks: SinkKinds) -> list[Sink]:
    """The secondary sinks, the primary sinks or all sinks of a map, maybe none."""
    if not isinstance(sinks, str) or sinks not in get_args(SinkKinds):
        raise InputError(
            f"sinks={sinks!r}; over texts use 'secondary', 'primary' or 'all', since a position "
            "is a different token in each"
        )
    return [sink for sink in sink_map.sinks if sinks in ("all", sink.kind)]


def repeats_note(sink_maps: Sequence[SinkMap], sinks: SinkKinds = "secondary") -> tuple[str, ...]:
    """A note for the reader if sinks were left out because an earlier text has them too."""
    n_sinks = sum(len(sinks_of_kind(sink_map, sinks)) for sink_map in sink_maps)
    n_repeated = n_sinks - len(distinct_sinks(sink_maps, sinks))
    if not n_repeated:
        return ()
    return (
        f"{n_repeated} of {n_sinks} sinks stand behind the same tokens in an earlier text, so they "
        "are the same sinks, and were counted once",
    )


def n_different_texts(sink_maps: Sequence[SinkMap]) -> int:
    """Number of texts without repetitions; those whose tokens are unknown count as different."""
    known = [tuple(m.tokens.tolist()) for m in sink_maps if m.tokens is not None]
    return len(set(known)) + len(sink_maps) - len(known)


def shared_beginnings(sink_maps: Sequence[SinkMap]) -> tuple[int, ...]:
    """`shared_prefixes` of the texts of sink maps; 0 where the tokens are unknown."""
    return shared_prefixes([[] if m.tokens is None else m.tokens.tolist() for m in sink_maps])


def shared_prefixes(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """How many tokens at its beginning each text shares with any one text before it."""
    root: dict[int, Any] = {}
    lengths = []
    for text in texts:
        node, known, length = root, True, 0
        for token in text:
            known = known and token in node
            length += known
            node = node.setdefault(token, {})
        lengths.append(length)
    return tuple(lengths)
