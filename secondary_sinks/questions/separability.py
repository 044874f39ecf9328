"""From which layer on can a future sink be told from a token that will not become one?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.explain.corpus import distinct_sinks, repeats_note, shared_by
from secondary_sinks.explain.separability import (
    ORDINARY,
    SAME_TOKEN,
    SINK,
    Contrast,
    Embedding,
    Separability,
    contrast_of,
    embed,
)
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.models.host import Site, UserHook, missing_sites
from secondary_sinks.models.text import Text
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.observe.vectors import ChosenVectors
from secondary_sinks.questions.given import sink_maps_of

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out")
"""Where vectors are read, in the order of the block."""
POOL = 4
"""Ordinary tokens are drawn from this many times as many that are nearest in position."""
TELLING_POSITION = 0.8
"""AUC of the position alone from which on a reader is told."""
_SPOKEN = {"same_token": "the same token", "ordinary": "ordinary tokens"}


def separability(
    model: Any,
    maps_or_texts: Text | SinkMap | Sequence[SinkMap],
    *,
    onset: int | None = None,
    n_controls: int = 4,
    n_permutations: int = 20,
    n_splits: int = 5,
    embedding: Embedding = "pca",
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> Separability:
    """Tell future sinks from other tokens, at every layer up to the onset.

    Vectors of the residual before the block and between its halves, of the attention's output and
    of the MLP's, of the future sinks of one onset, of the same token ids where they are no sinks
    (those whose positions are most like the sinks'), and of ordinary tokens nearby.
    `explain.separability` tells what is asked of them. No vector is used twice: what texts share at
    their beginning belongs to the first.

    What it is not evidence for: that the model uses what a probe finds, nor, at early layers, that
    it is the feature which the writer reads; a position or the token before can be told as well
    (see `position_auc`). And at chance means: not by a linear probe from so few tokens.

    Args:
        model: any TransformerLens model.
        maps_or_texts: several texts (see `detect_sinks`), or their sink maps.
        onset: which sinks; by default those of the most common onset.
        n_controls: ordinary tokens for each sink, and at most as many of the same token id.
        n_permutations: shuffles of the labels; n of them cannot give a p-value below 1 / (n + 1).
        n_splits: folds of texts.
        embedding: "pca" or "tsne", for the picture.
        seed: of every random choice; recorded with the result.
        chat: strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: no secondary sinks of that onset, or a sink map of another model or criterion.
        ModelError: the model cannot be measured.
    """
    for name, value, least in (
        ("n_controls", n_controls, 1),
        ("n_permutations", n_permutations, 0),
        ("n_splits", n_splits, 2),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; it must be {least} or more")
    if embedding not in get_args(Embedding):
        raise InputError(f"no embedding {embedding!r}; use 'pca' or 'tsne'")
    maps = sink_maps_of(model, maps_or_texts, chat=chat, fwd_hooks=fwd_hooks)
    onset = _onset(maps, onset)
    chosen = [list(tokens) for tokens in _choose(maps, onset, n_controls, seed)]
    missing = [site.name for site in missing_sites(model, [Site(site, 0) for site in SITES])]
    sites = [site for site in SITES if site not in missing]
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for one, tokens in zip(maps, chosen, strict=True):
        if tokens:
            collector = ChosenVectors([position for position, _ in tokens], sites)
            found = cast(
                Trace, trace(model, cast(Tensor, one.tokens), [collector], fwd_hooks=fwd_hooks)
            )
            for site in sites:
                parts[site].append(found["ChosenVectors"][site][: onset + 1])
    vectors = {site: torch.cat(part, dim=1) for site, part in parts.items()}
    text = torch.tensor([index for index, tokens in enumerate(chosen) for _ in tokens])
    position = torch.tensor([place for tokens in chosen for place, _ in tokens])
    kind = torch.tensor([own for tokens in chosen for _, own in tokens])
    contrasts = {
        name: contrast_of(
            vectors,
            kind,
            text,
            position,
            other,
            n_permutations=n_permutations,
            n_splits=n_splits,
            seed=seed,
        )
        for name, other in (("same_token", SAME_TOKEN), ("ordinary", ORDINARY))
    }
    n_sinks = int((kind == SINK).sum())
    return Separability(
        onset=onset,
        sites=tuple(sites),
        text=text,
        position=position,
        tokens=tuple(
            maps[index].token_strings[place]
            for index, tokens in enumerate(chosen)
            for place, _ in tokens
        ),
        kind=kind,
        embedding=embed(vectors, embedding, seed=seed),
        method=embedding,
        n_permutations=n_permutations,
        n_splits=n_splits,
        seed=seed,
        notes=(
            *repeats_note(maps, len(list(distinct_sinks(maps)))),
            *_notes(kind, text, n_sinks),
            *_position_notes(contrasts),
        ),
        model=maps[0].model,
        **contrasts,
    )


def _onset(maps: Sequence[SinkMap], onset: int | None) -> int:
    onsets = Counter(found.sink.l_start for found in distinct_sinks(maps))
    if onset is None:
        if not onsets:
            raise InputError(
                "no secondary sinks in these texts: see detect_sinks(...).margins() for the tokens "
                "that came nearest"
            )
        return max(onsets, key=lambda layer: (onsets[layer], -layer))
    if onset not in onsets:
        raise InputError(f"no secondary sinks of onset {onset}; there are some at {sorted(onsets)}")
    return onset


def _choose(
    maps: Sequence[SinkMap], onset: int, n_controls: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Of each text: positions with their kinds."""
    here = [found.sink for found in distinct_sinks(maps) if found.sink.l_start == onset]
    ids = {sink.token_id for sink in here}
    places = np.array([sink.position for sink in here])
    for index, (one, shared) in enumerate(zip(maps, shared_by(maps), strict=True)):
        rng = np.random.default_rng([seed, index])
        own = sorted({s.position for s in one.secondary if s.l_start == onset})
        own = [position for position in own if position >= shared]
        taken = {sink.position for sink in one.sinks} | {one.primary_position}
        free = [t for t in range(shared, one.n_tokens) if t not in taken]
        tokens = cast(Tensor, one.tokens).tolist()
        same = [t for t in free if tokens[t] in ids]
        others = [t for t in free if tokens[t] not in ids]
        # Texts without sinks still show the same tokens where they are none. Those at positions
        # like the sinks', or the probe would tell early from late.
        count = n_controls * max(1, len(own))
        kept = sorted(same, key=lambda t: int(np.abs(places - t).min()))[:count]
        drawn: set[int] = set()
        for position in own:
            near = sorted((t for t in others if t not in drawn), key=lambda t: abs(t - position))[
                : POOL * n_controls
            ]
            drawn |= set(rng.permutation(near)[:n_controls].astype(int).tolist())
        yield [
            *((position, SINK) for position in own),
            *((int(t), SAME_TOKEN) for t in sorted(kept)),
            *((int(t), ORDINARY) for t in sorted(drawn)),
        ]


def _notes(kind: Tensor, text: Tensor, n_sinks: int) -> tuple[str, ...]:
    notes = []
    for name, other in (("of the same token id", SAME_TOKEN), ("ordinary", ORDINARY)):
        texts = [len(set(text[kind == own].tolist())) for own in (SINK, other)]
        if min(texts) < 2:
            notes.append(
                f"no probe against tokens {name}: {n_sinks} sinks stand in {texts[0]} and the "
                f"others in {texts[1]} texts, and each kind must be in two at least; pass more "
                "texts that begin differently"
            )
    return tuple(notes)


def _position_notes(contrasts: Mapping[str, Contrast]) -> Iterator[str]:
    for name, found in contrasts.items():
        if found.position_auc >= TELLING_POSITION:
            yield (
                f"position alone tells sinks from {_SPOKEN[name]} with an AUC of "
                f"{found.position_auc:.2f}: a probe that does no better may have found the position"
            )
