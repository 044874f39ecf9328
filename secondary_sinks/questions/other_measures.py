"""Which tokens do other published measures name, and how spread out is attention?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.explain.measures import OtherMeasures
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.models.host import UserHook
from secondary_sinks.models.text import Text
from secondary_sinks.observe.collectors import (
    Collector,
    MassiveActivation,
    MassiveActivations,
    SinkScores,
    sink_rate,
)
from secondary_sinks.observe.entropy import AttentionEntropy
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.questions.detect_sinks import detect_sinks
from secondary_sinks.questions.given import sink_map_of


def other_measures(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    epsilon: float = 0.3,
    min_rate: float = 0.0,
    min_value: float = 100.0,
    min_ratio: float = 1000.0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> OtherMeasures:
    """Set published measures of sinks beside the detection, and measure attention's entropy.

    The evidence criterion, the published one of arXiv 2512.22213, the importance score of Gu et
    al. and the massive activations of Sun et al., each with its own thresholds;
    `explain.measures` tells when each names a token. The entropy of each query's attention, in
    nats and over that of uniform attention, shows where attention gathers.

    What it is not evidence for: that a measure which disagrees is wrong (they ask different
    things), or that low entropy is due to sinks: attention to the token before has one as well.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        epsilon: importance score above which a head has a sink (Gu et al.).
        min_rate: share of all (layer, head) pairs above which a token counts as named by it.
        min_value: magnitude of a massive activation (Sun et al.); depends on a model's scale.
        min_ratio: its least ratio to the median magnitude of the layer.
        chat: the string goes through the chat template; also of a sink map's text, since the
            published criterion has a rule of its own for templates.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: thresholds out of range, several texts, or a sink map of another model, text or
            criterion.
        ModelError: the model cannot be measured.
    """
    if not 0 <= min_rate < 1:
        raise InputError(f"min_rate is {min_rate}; it is a share, from 0 to below 1")
    if min_value < 0 or min_ratio < 0:
        raise InputError(
            f"min_value is {min_value}, min_ratio {min_ratio}; neither may be negative"
        )
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    tokens = cast(Tensor, found.tokens)
    collectors: list[Collector] = [
        SinkScores("gu", name="importance"),
        MassiveActivations(),
        AttentionEntropy(),
    ]
    traced = cast(Trace, trace(model, tokens, collectors, fwd_hooks=fwd_hooks))
    reference = cast(
        SinkMap,
        detect_sinks(model, tokens, criterion="reference", chat=chat, fwd_hooks=fwd_hooks),
    )
    massive = cast(MassiveActivation, traced["MassiveActivations"])
    is_massive = massive.is_massive(min_value=min_value, min_ratio=min_ratio)
    rate = sink_rate(traced["importance"], epsilon)
    n_layers, n_tokens = massive.value.shape
    min_queries = int(found.thresholds["min_queries"])
    named = torch.stack(
        [
            _at([sink.position for sink in found.sinks], n_tokens),
            _at([sink.position for sink in reference.sinks if sink.kind != "noise"], n_tokens),
            rate > min_rate,
            is_massive.any(dim=0),
        ]
    )
    live = {layer + 1 for sink in found.secondary for layer in sink.layers}
    return OtherMeasures(
        token_strings=found.token_strings,
        named=named,
        compared=torch.arange(n_tokens - 1, -1, -1) >= min_queries,
        secondary=_at([sink.position for sink in found.secondary], n_tokens),
        importance=traced["importance"],
        sink_rate=rate,
        massive_value=massive.value,
        massive_dimension=massive.dimension,
        massive_ratio=massive.ratio,
        is_massive=is_massive,
        entropy=traced["AttentionEntropy"],
        live_layers=tuple(sorted(layer for layer in live if layer < n_layers)),
        epsilon=epsilon,
        min_rate=min_rate,
        min_queries=min_queries,
        model=found.model,
    )


def _at(positions: Sequence[int], n_tokens: int) -> Tensor:
    mask = torch.zeros(n_tokens, dtype=torch.bool)
    mask[list(positions)] = True
    return mask
