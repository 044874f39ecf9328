"""The sink map that a question about a text begins with: the one that was given, or a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.models.host import UserHook, describe
from secondary_sinks.models.text import Text, is_many
from secondary_sinks.questions.detect_sinks import detect_sinks


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
