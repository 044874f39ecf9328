"""Check that sink maps belong together, and to the model that an analysis is about to run."""

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
    several = listed(sink_maps)
    return tuple(check_map(model, sink_map, fwd_hooks=fwd_hooks) for sink_map in several)


def check_one_model(sink_maps: SinkMap | Sequence[SinkMap]) -> tuple[SinkMap, ...]:
    """Return one or many measured maps as a tuple, for an analysis that runs no model.

    Raises:
        InputError: no maps, maps of several models, or a map of a published file, which holds no
            measurements.
    """
    several = listed(sink_maps)
    models = {(sink_map.model_name, sink_map.provenance.weights) for sink_map in several}
    if len(models) > 1:
        names = sorted(f"{name!r} (weights {weights or 'unknown'})" for name, weights in models)
        raise InputError(
            f"maps of several models: {', '.join(names)}; pass those of one model at a time"
        )
    for sink_map in several:
        if sink_map.tokens is None or sink_map.mean_attention is None or sink_map.norm is None:
            raise InputError(
                f"{sink_map!r} holds no measurements (it was read from a published file): detect "
                "the sinks of the text with detect_sinks"
            )
    return several


def listed(sink_maps: SinkMap | Sequence[SinkMap]) -> tuple[SinkMap, ...]:
    """Return one or many maps as a tuple.

    Raises:
        InputError: no maps, or something else.
    """
    several = (sink_maps,) if isinstance(sink_maps, SinkMap) else sink_maps
    if isinstance(several, str) or not isinstance(several, Sequence) or not several:
        what = "none" if isinstance(several, Sequence) and not several else type(several).__name__
        raise InputError(
            f"expected sink maps, got {what}: run sink_maps = detect_sinks(model, texts) first"
        )
    for sink_map in several:
        if not isinstance(sink_map, SinkMap):
            raise InputError(
                f"expected sink maps, got {type(sink_map).__name__} among them: run "
                "sink_maps = detect_sinks(model, texts) first"
            )
    return tuple(several)
