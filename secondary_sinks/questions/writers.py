"""Which layer's MLP a question about a sink's writer looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secondary_sinks.errors import InputError
from secondary_sinks.explain.attribution import DirectWrite
from secondary_sinks.explain.sinks import Sink

Writers = int | Mapping[int, int] | None
"""A layer for all sinks, a layer for each position, or None: the candidates."""


def candidates(writes: DirectWrite, chosen: Sequence[Sink]) -> list[int]:
    """The layer up to each sink's onset whose MLP writes the largest part along its direction,
    beyond what ordinary tokens get."""
    return [
        int(writes.excess[index, : sink.l_start + 1].argmax()) for index, sink in enumerate(chosen)
    ]


def given_writers(
    writers: int | Mapping[int, int], chosen: Sequence[Sink], n_layers: int
) -> list[int]:
    """The layers that the user named, one for each sink.

    Raises:
        InputError: a sink without a layer, or a layer out of range.
    """
    found = []
    for sink in chosen:
        if isinstance(writers, Mapping) and sink.position not in writers:
            raise InputError(
                f"writers name no layer for the sink at {sink.position}; they have those at "
                f"{sorted(writers)}"
            )
        layer = writers[sink.position] if isinstance(writers, Mapping) else writers
        if not 0 <= layer < n_layers:
            raise InputError(f"writer {layer} is out of range: there are {n_layers} layers, from 0")
        found.append(int(layer))
    return found
