"""Check that sink maps belong together, and to the model that an analysis is about to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.provenance import check_same_model
from secondary_sinks.sinks.sink_map import ArrayName, SinkMap

MEASURED: tuple[ArrayName, ...] = ("tokens", "norm", "mean_attention")
"""Arrays that every measured map has, whatever its criterion."""


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
    check_same_model(sink_map.provenance, model, fwd_hooks, what="the sink map")
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
        for name in MEASURED:
            sink_map.array(name)
    return several


def listed(sink_maps: SinkMap | Sequence[SinkMap]) -> tuple[SinkMap, ...]:
    """Return one or many maps as a tuple.

    Raises:
        InputError: no maps, or something else.
    """
    one = isinstance(sink_maps, SinkMap | str) or not isinstance(sink_maps, Sequence)
    several: Sequence[Any] = [sink_maps] if one else sink_maps  # type: ignore[assignment]
    wrong = [type(entry).__name__ for entry in several if not isinstance(entry, SinkMap)]
    if wrong or not several:
        raise InputError(
            f"expected sink maps, got {wrong[0] if wrong else 'none'}: run "
            "sink_maps = detect_sinks(model, texts) first"
        )
    return tuple(several)
