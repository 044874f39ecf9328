"""How long are the keys, values and residuals of sinks, layer by layer?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from secondary_sinks.explain.norm_profiles import NormProfiles, curves_of, ordinary_positions
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.models.host import UserHook
from secondary_sinks.models.text import Text
from secondary_sinks.observe.collectors import Norms, ResidualNorms
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.questions.given import sink_map_of


def norm_profiles(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> NormProfiles:
    """Norms of keys, values and residuals of the primary, each secondary sink, and the rest.

    Keys are those that the key projection gives (rotary embedding keeps their norm; where a model
    normalizes keys afterwards, as Qwen3 does, that is not in it), one norm a key-value head,
    averaged over heads. Everything is in the units of the model: compare with the ordinary tokens
    of the same layer, not with another layer or model.

    What it is not evidence for: attention (a long key may point anywhere; see `SinkMap.sink_score`)
    or what the head writes (the output matrix may amplify a short value).

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        chat: the string goes through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: several texts, or a sink map of another model, text or criterion.
        ModelError: the model has no site of keys or values.
    """
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    collectors = [Norms("k"), Norms("v"), ResidualNorms()]
    norms = cast(Trace, trace(model, cast(Tensor, found.tokens), collectors, fwd_hooks=fwd_hooks))
    chosen = found.secondary
    return NormProfiles(
        primary_position=found.primary_position,
        primary_token=found.token_strings[found.primary_position],
        phases=found.phases,
        sinks=tuple(dataclasses.replace(sink, evidence=None) for sink in chosen),
        n_ordinary=len(ordinary_positions(found)),
        key=curves_of(norms["k_norm"].mean(dim=1), found, chosen),
        value=curves_of(norms["v_norm"].mean(dim=1), found, chosen),
        residual=curves_of(norms["ResidualNorms"], found, chosen),
        model=found.model,
    )
