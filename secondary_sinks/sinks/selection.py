"""What a question about texts begins with: their sink maps, given or new, and the sinks meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.sites import UserHook, describe
from secondary_sinks.host.text_input import Text, is_many
from secondary_sinks.sinks.corpus import listed
from secondary_sinks.sinks.detect_sinks import detect_sinks
from secondary_sinks.sinks.sink_map import Sink, SinkMap


def sink_map_of(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> SinkMap:
    """The sink map of one text, measured in this model by the evidence criterion.

    Args:
        model: any TransformerLens model.
        text: one text, or its sink map.
        sinks: the text's sink map, if it is there already.
        chat: a string goes through the chat template.
        fwd_hooks: hooks in force when the sinks are detected.

    Raises:
        InputError: several texts; or a sink map of another model, other tokens or another
            criterion, or one that holds no measurements.
    """
    if isinstance(text, SinkMap):
        sinks, text = text, text.tokens if text.tokens is not None else ()
    if sinks is None:
        if is_many(text):
            raise InputError("several texts: ask about one at a time")
        found = detect_sinks(model, text, chat=chat, fwd_hooks=fwd_hooks)
        return found if isinstance(found, SinkMap) else found[0]
    if sinks.criterion != "evidence" or sinks.tokens is None or sinks.centered_norm is None:
        raise InputError("the sink map must come from detect_sinks with criterion='evidence'")
    info = describe(model)
    if (sinks.model.get("name"), sinks.n_layers) != (info.name, info.n_layers):
        raise InputError(f"the sink map is of {sinks.model.get('name')!r}, the model {info.name!r}")
    if isinstance(text, Tensor) and not torch.equal(text.reshape(-1).cpu().long(), sinks.tokens):
        raise InputError("the sink map is of other tokens than the text")
    return sinks


def chosen_sinks(sinks: SinkMap, which: Literal["secondary"] | Sequence[Sink]) -> list[Sink]:
    """The sinks that a question is about.

    Raises:
        InputError: the map holds no secondary sinks, or not those that were named.
    """
    if isinstance(which, str):
        if which != "secondary":
            raise InputError(f"which={which!r}; use 'secondary' or a sequence of sinks")
        chosen = sinks.secondary
        if not chosen:
            raise InputError(
                "no secondary sinks in this text, so there is nothing to ask about: see "
                "detect_sinks(...).margins() for the tokens that came nearest, detect with a lower "
                "threshold, or pass which=sinks.primary to ask about the primary"
            )
        return chosen
    chosen = list(which)
    if not chosen:
        raise InputError("which is empty; pass 'secondary' or some of the map's sinks")
    strangers = [sink for sink in chosen if not has_sink(sinks, sink)]
    if strangers:
        raise InputError(f"{strangers[0]!r} is not a sink of this map")
    return chosen


def has_sink(sinks: SinkMap, sink: Sink) -> bool:
    """Whether the map holds that life of that token."""
    return any((s.position, s.layers) == (sink.position, sink.layers) for s in sinks.sinks)


def sink_maps_of(
    model: Any,
    maps_or_texts: Text | SinkMap | Sequence[SinkMap],
    *,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> tuple[SinkMap, ...]:
    """The sink maps of one or many texts, measured in this model by the evidence criterion.

    Args:
        model: any TransformerLens model.
        maps_or_texts: one text or many (see `detect_sinks`), or their sink maps.
        chat: strings go through the chat template.
        fwd_hooks: hooks in force when the sinks are detected.

    Raises:
        InputError: no texts, or a sink map that `sink_map_of` refuses.
    """
    if isinstance(maps_or_texts, SinkMap):
        return (sink_map_of(model, maps_or_texts),)
    given = isinstance(maps_or_texts, Sequence) and not isinstance(maps_or_texts, str)
    if given and any(isinstance(one, SinkMap) for one in maps_or_texts):
        several = listed(cast("Sequence[SinkMap]", maps_or_texts))
        return tuple(sink_map_of(model, one) for one in several)
    found = detect_sinks(model, cast(Text, maps_or_texts), chat=chat, fwd_hooks=fwd_hooks)
    return (found,) if isinstance(found, SinkMap) else tuple(found)
