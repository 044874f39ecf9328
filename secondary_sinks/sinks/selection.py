"""Check that sink maps belong to the model that an analysis is about to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.provenance import check_model
from secondary_sinks.sinks.sink_map import SinkMap


def check_map(model: Any, sink_map: SinkMap, *, fwd_hooks: Sequence[UserHook] = ()) -> SinkMap:
    """Return `sink_map` if an analysis of `model` can build on it.

    Args:
        model: the model that is about to run.
        sink_map: from `detect_sinks` in that model.
        fwd_hooks: hooks in force in the passes to come.

    Raises:
        InputError: not a sink map, a map of other weights, another tokenizer, other hooks or the
            published criterion, or one without measurements.
    """
    if not isinstance(sink_map, SinkMap):
        raise InputError(
            f"expected a sink map, got {type(sink_map).__name__}: run "
            "sink_map = detect_sinks(model, text) first, with one text"
        )
    if sink_map.judge is None or sink_map.tokens is None:
        raise InputError(
            f"{sink_map!r} holds no baselines to judge edited tokens by; make it with "
            "detect_sinks(model, text, criterion='evidence')"
        )
    check_model(sink_map.provenance, model, fwd_hooks, what="the sink map")
    return sink_map


def check_maps(
    model: Any, sink_maps: SinkMap | Sequence[SinkMap], *, fwd_hooks: Sequence[UserHook] = ()
) -> tuple[SinkMap, ...]:
    """The same of one or many maps, as a tuple.

    Raises:
        InputError: no maps, or as `check_map`.
    """
    several = (sink_maps,) if isinstance(sink_maps, SinkMap) else sink_maps
    if isinstance(several, str) or not isinstance(several, Sequence) or not several:
        raise InputError(
            f"expected sink maps, got {type(sink_maps).__name__}: run "
            "sink_maps = detect_sinks(model, texts) first"
        )
    return tuple(check_map(model, sink_map, fwd_hooks=fwd_hooks) for sink_map in several)
