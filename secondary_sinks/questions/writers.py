"""Which layer's MLP a question about a sink's writer looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from secondary_sinks.errors import InputError
from secondary_sinks.explain.attribution import DirectWrite
from secondary_sinks.explain.sinks import Sink


def candidates(writes: DirectWrite, chosen: Sequence[Sink]) -> list[int]:
    """The layer up to each sink's onset whose MLP writes the largest part along its direction,
    beyond what ordinary tokens get."""
    return [
        int(writes.excess[index, : sink.l_start + 1].argmax()) for index, sink in enumerate(chosen)
    ]


def given_writers(
    writers: int | Mapping[int, int],
    chosen: Sequence[Sink],
    n_layers: int,
    *,
    by: Literal["position", "onset"] = "position",
) -> list[int]:
    """The layers that the user named, one for each sink.

    Args:
        writers: one layer for all, or a mapping to layers.
        chosen: the sinks.
        n_layers: of the model.
        by: what is mapped: positions where the sinks are of one text, onsets where they are of
            several, in each of which a position is another token.

    Raises:
        InputError: a sink without a layer, or a layer out of range.
    """
    found = []
    for sink in chosen:
        key = sink.position if by == "position" else sink.l_start
        if isinstance(writers, Mapping) and key not in writers:
            raise InputError(
                f"writers name no layer for {by} {key} ({sink!r}); they have those for "
                f"{sorted(writers)}"
            )
        layer = writers[key] if isinstance(writers, Mapping) else writers
        if not 0 <= layer < n_layers:
            raise InputError(f"writer {layer} is out of range: there are {n_layers} layers, from 0")
        found.append(int(layer))
    return found
