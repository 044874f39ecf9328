"""Does the norm that a writer writes go with attention drawn and with lifetime?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secondary_sinks.errors import InputError
from secondary_sinks.explain.corpus import Found, distinct_sinks, listed, repeats_note
from secondary_sinks.explain.norm_law import NormLaw, notes_on, relate
from secondary_sinks.explain.sinks import Sink, SinkMap
from secondary_sinks.models.host import UserHook
from secondary_sinks.models.text import Text
from secondary_sinks.questions.direct_writes import direct_writes
from secondary_sinks.questions.given import sink_maps_of
from secondary_sinks.questions.writers import candidates, given_writers


def norm_law(
    model: Any,
    maps_or_texts: Text | SinkMap | Sequence[SinkMap],
    *,
    writers: int | Mapping[int, int] | None = None,
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> NormLaw:
    """Relate what writers write to the attention that the sinks draw and to how long they live.

    For every secondary sink: the norm of its writer's MLP output at its token, the length of that
    output along the sink direction (the primary's residual without the common component, after the
    sink's onset layer), its sink score (mean over heads and the layers that show its life) and its
    lifetime. Spearman's correlations and a power law (`explain.norm_law` tells how, and which
    number to quote); all intervals resample texts. Sinks that several texts share, because the
    texts begin alike, are counted once.

    What it is not evidence for: that the norm *causes* the attention. Sinks differ in their
    direction, their position and what later layers add; `dose_response` changes the norm alone.

    Args:
        model: any TransformerLens model.
        maps_or_texts: one text or several (see `detect_sinks`), or their sink maps.
        writers: layer of the MLP that wrote the sinks: one for all, or by onset layer. None takes,
            sink by sink, the layer up to the onset whose MLP writes most along the sink direction,
            beyond what ordinary tokens get; `attribute_to_mlps` tests whether it is the writer.
        seed: of the resampling; recorded with the result.
        chat: strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: no secondary sinks, or a writer that is no layer of the model or comes after
            the onset; a sink map of another model or criterion.
        ModelError: the parts of a residual do not add up in this model, or it cannot be measured.
    """
    maps = listed(sink_maps_of(model, maps_or_texts, chat=chat, fwd_hooks=fwd_hooks))
    found = list(distinct_sinks(maps))
    if not found:
        raise InputError(
            "no secondary sinks in these texts, so there is no law to be seen: see "
            "detect_sinks(...).margins() for the tokens that came nearest"
        )
    rows = [
        row
        for text in sorted({one.text for one in found})
        for row in _written(model, maps[text], _of(found, text), writers, fwd_hooks)
    ]
    layer = torch.tensor([int(row[0]) for row in rows])
    norm, length = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    score = torch.tensor([one.sink.sink_score for one in found])
    lifetime = torch.tensor([one.sink.lifetime for one in found])
    position = torch.tensor([one.sink.position for one in found])
    text = [one.text for one in found]
    relations = relate(
        {"written_norm": norm, "written_length": length},
        {"score": score, "lifetime": lifetime.float()},
        position.float(),
        text,
        seed=seed,
    )
    n_texts = len(set(text))
    return NormLaw(
        text=torch.tensor(text),
        n_texts=n_texts,
        position=position,
        tokens=tuple(one.sink.token for one in found),
        onset=torch.tensor([one.sink.l_start for one in found]),
        writer=layer,
        written_norm=norm,
        written_length=length,
        score=score,
        lifetime=lifetime,
        relations=relations,
        seed=seed,
        notes=(*repeats_note(maps, len(found)), *notes_on(relations, n_texts)),
        model=maps[0].model,
    )


def _of(found: Sequence[Found], text: int) -> list[Sink]:
    return [one.sink for one in found if one.text == text]


def _written(
    model: Any,
    sinks: SinkMap,
    chosen: Sequence[Sink],
    writers: int | Mapping[int, int] | None,
    fwd_hooks: Sequence[UserHook],
) -> list[tuple[int, float, float]]:
    """Of each sink of one text: the writer, the norm of its output, its length along the sink
    direction."""
    writes = direct_writes(model, sinks, chosen, fwd_hooks=fwd_hooks)
    if writers is None:
        layers = candidates(writes, chosen)
    else:
        layers = given_writers(writers, chosen, int(sinks.model["n_layers"]), by="onset")
    for layer, sink in zip(layers, chosen, strict=True):
        if layer > sink.l_start:
            raise InputError(f"writer {layer} of {sink!r} comes after its onset {sink.l_start}")
    return [
        (layer, float(writes.mlp_norm[index, layer]), float(writes.mlp[index, layer]))
        for index, layer in enumerate(layers)
    ]
