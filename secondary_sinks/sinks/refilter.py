"""Judge the tokens of a sink map again with other thresholds, without a new pass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from secondary_sinks.errors import InputError
from secondary_sinks.observe.attention_collectors import Visible
from secondary_sinks.observe.residual_geometry import Geometry
from secondary_sinks.sinks.criterion import check_thresholds
from secondary_sinks.sinks.measurements import Measurements
from secondary_sinks.sinks.primary import detect

if TYPE_CHECKING:
    from secondary_sinks.sinks.sink_map import SinkMap


def refiltered(sink_map: SinkMap, thresholds: dict[str, float]) -> SinkMap:
    """`SinkMap.refilter`.

    Raises:
        InputError: the map was not made with the evidence criterion, or a threshold is unknown or
            out of range.
    """
    if sink_map.criterion != "evidence" or sink_map.persistence is None:
        raise InputError("only maps made with criterion='evidence' can be judged again")
    merged = check_thresholds(dict(sink_map.thresholds) | thresholds)
    primary = sink_map.primary_position
    detection = detect(_measurements(sink_map), primary=primary, thresholds=merged)
    return dataclasses.replace(
        sink_map,
        provenance=sink_map.provenance.extended(thresholds=merged),
        phases=detection.phases,
        sinks=detection.sinks,
        undecided=detection.undecided,
        judge=detection.criterion,
        attention_ratio=detection.attention_ratio,
        strength=detection.strength,
    )


def _measurements(sink_map: SinkMap) -> Measurements:
    """What detection had, with the primary as the only candidate."""
    array = sink_map.array
    geometry = Geometry(
        candidates=(sink_map.primary_position,),
        norm=array("norm"),
        centered_norm=array("centered_norm"),
        alignment=array("alignment")[None],
        centered_alignment=array("centered_alignment")[None],
        persistence=array("persistence")[None],
        residual=array("primary_residual")[None],
        common=array("common_residual"),
        background_norm=array("background_norm"),
        background_centered_norm=array("background_centered_norm"),
        share_alike=array("share_alike"),
    )
    return Measurements(
        tokens=tuple(array("tokens").tolist()),
        token_strings=sink_map.token_strings,
        geometry=geometry,
        score=array("mean_attention"),
        visible=Visible(n_seeing=array("n_seeing"), uniform=array("uniform_attention")),
        beginnings=frozenset(sink_map.beginnings),
    )
