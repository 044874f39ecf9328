"""Batched counterfactual rows: one-token passes over the cached keys and values of the text.

The same trajectories as packed rows, without touching masks or positions of the model. The text
runs once and its keys and values are kept; then, for each edited position p, one token runs as a
batch of rows over the kept keys and values of tokens 0 ... p-1, each row with its own edits. This
is how models generate, so it works in architectures whose scores cannot be edited or whose
positions follow the sequence index (GPT-J, OPT, GPT-Neo, Bloom, MPT, Falcon with ALiBi).

Direct scores need the clean queries against each row's key, which a one-token pass does not hold.
They come from further passes over the text in which queries, keys and values of all layers are the
clean ones, but for the keys of edited tokens, one row for each position:

    copy 1     the keys of the first row of position 3, of position 40, of position 200
    copy 2     the keys of the second row of each, and so on

Several changed keys share one softmax, and are told apart by the weights of the unchanged ones: if
those sum to S in the clean pattern and to S' in the copy's, the changed key's weight `w'`, alone
with an otherwise clean text, is `u / (1 - w + u)` with `u = w' S / S'` and `w` the clean weight.

What this engine cannot give:

* rows under `fwd_hooks` that look at the sequence: they would meet a sequence of one token;
* the speed of packed rows: L edits of one token cost L copies of the text for their direct scores;
* a direct score, where weights vanish in rounding: NaN, which the criterion passes over.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.intervene.clean import CleanRun
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.rows import Place, RowMeter, RowStates, edit_hooks, looked_at
from secondary_sinks.models.host import Editor, Site, forward

_KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of each layer, [1, kv_head, token, d_head]."""


def run_batched(
    model: Any, clean: CleanRun, rows: Sequence[Row], *, memory_budget: int = 1 << 30
) -> RowStates:
    """Run all rows over the kept keys and values of the text; see the module's description.

    Args:
        model: a `TransformerBridge`.
        clean: the clean run of the text.
        rows: what to edit. All their keys and values fit into memory.
        memory_budget: bytes that the attention of the copies of the text may take at once.
    """
    kept, recorded = _run_clean(model, clean, rows)
    at: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        at[row[0].position].append(number)
    parts: list[RowStates] = []
    done: list[int] = []
    keys: dict[int, list[Tensor]] = {}
    for position, numbers in at.items():
        meter, of_layers = _one_token(
            model, clean, [rows[n] for n in numbers], position, kept, recorded
        )
        unscored = torch.full((len(numbers), *clean.score.shape[:2]), torch.nan)
        parts.append(meter.states(torch.full((len(numbers),), position), unscored))
        done += numbers
        for index, number in enumerate(numbers):
            keys[number] = [layer[index] for layer in of_layers]
    positions = [row[0].position for row in rows]
    states = RowStates.joined(parts).take(torch.tensor(done).argsort())
    score = _direct_scores(model, clean, positions, keys, memory_budget)
    return dataclasses.replace(states, direct_score=score)


def _run_clean(
    model: Any, clean: CleanRun, rows: Sequence[Row]
) -> tuple[_KeysAndValues, dict[Site, Tensor]]:
    """Keys and values of the text, and its activations where edits look at them."""
    from transformers import DynamicCache

    recorded: dict[Site, Tensor] = {}

    def recorder(site: Site) -> Editor:
        def record(activation: Tensor) -> None:
            recorded[site] = activation[0].clone()

        return record

    # Without the model's configuration every layer keeps all tokens, also those with a window,
    # whose prefix could not be cut otherwise. The window is then the mask's matter.
    cache = DynamicCache()
    tokens = clean.tokens[None]
    forward(
        model,
        tokens,
        [(site, recorder(site)) for site in looked_at(rows)],
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
    )
    return [(layer.keys, layer.values) for layer in cache.layers], recorded


def _one_token(
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    position: int,
    kept: _KeysAndValues,
    recorded: dict[Site, Tensor],
) -> tuple[RowMeter, list[Float[Tensor, "row kv_head d_head"]]]:
    """All rows of one position, and their keys in every layer."""
    from transformers import DynamicCache

    n_layers, n_rows = clean.primary.shape[0], len(rows)
    cache = DynamicCache()
    for layer, (of_layer, values) in enumerate(kept if position else []):
        wide = (n_rows, -1, -1, -1)
        cache.update(
            of_layer[:, :, :position].expand(wide), values[:, :, :position].expand(wide), layer
        )
    places: list[Place] = [(row, 0) for row in range(n_rows)]
    meter = RowMeter(clean, places)
    keys: list[Tensor] = [torch.empty(0)] * n_layers

    def keep(layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            keys[layer] = activation[:, 0].clone()

        return read

    forward(
        model,
        clean.tokens[position].expand(n_rows, 1),
        [
            *edit_hooks(rows, places, clean, recorded),
            *meter.editors(),
            *((Site("k", layer), keep(layer)) for layer in range(n_layers)),
        ],
        attention_mask=torch.ones(n_rows, position + 1, dtype=torch.long),
        position_ids=torch.full((n_rows, 1), position),
        past_key_values=cache,
    )
    return meter, keys


def _direct_scores(
    model: Any,
    clean: CleanRun,
    positions: Sequence[int],
    keys: dict[int, list[Tensor]],
    memory_budget: int,
) -> Float[Tensor, "row layer head"]:
    n_layers, n_heads, n_tokens = clean.score.shape
    found = torch.full((len(positions), n_layers, n_heads), torch.nan)
    copies = list(_shared_copies(positions, n_tokens))
    # The eager attention holds about five float32 copies of its scores at once.
    size = max(1, memory_budget // (20 * n_heads * n_tokens**2) - 1)
    for first in range(0, len(copies), size):
        _score_copies(model, clean, positions, keys, copies[first : first + size], found)
    return found


def _shared_copies(positions: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    """Which rows' keys stand in one copy of the text: never two of one token.

    Nor of neighbors: then every query that can see an edited key sees an unedited one too, itself
    or the one before it. The last token, which nobody sees later, needs no copy.
    """
    left = [row for row, position in enumerate(positions) if position < n_tokens - 1]
    while left:
        taken: set[int] = set()
        copy: list[int] = []
        for row in left:
            if not taken & {positions[row] - 1, positions[row], positions[row] + 1}:
                taken.add(positions[row])
                copy.append(row)
        yield copy
        chosen = set(copy)
        left = [row for row in left if row not in chosen]


def _score_copies(
    model: Any,
    clean: CleanRun,
    positions: Sequence[int],
    keys: dict[int, list[Tensor]],
    copies: Sequence[list[int]],
    found: Float[Tensor, "row layer head"],
) -> None:
    """One pass over the clean text and its copies; fills `found` for their rows."""
    n_tokens = len(clean.tokens)

    def as_clean(activation: Tensor) -> Tensor:
        return activation[:1].expand_as(activation)

    def key_editor(layer: int) -> Editor:
        def edit(activation: Tensor) -> Tensor:
            frozen = activation[:1].repeat_interleave(len(activation), dim=0)
            for number, rows in enumerate(copies):
                for row in rows:
                    frozen[1 + number, positions[row]] = keys[row][layer]
            return frozen

        return edit

    def reader(layer: int) -> Editor:
        def read(pattern: Tensor) -> None:
            for number, rows in enumerate(copies):
                edited = torch.tensor([positions[row] for row in rows])
                found[rows, layer] = _scores_of(pattern[0], pattern[1 + number], edited)

        return read

    tokens = clean.tokens.expand(1 + len(copies), n_tokens)
    layers = range(found.shape[1])
    forward(
        model,
        tokens,
        [
            *((Site(name, layer), as_clean) for name in ("q", "v") for layer in layers),
            *((Site("k", layer), key_editor(layer)) for layer in layers),
            *((Site("pattern", layer), reader(layer)) for layer in layers),
        ],
        attention_mask=torch.ones_like(tokens),
    )


def _scores_of(
    clean: Float[Tensor, "head query key"], edited: Float[Tensor, "head query key"], at: Tensor
) -> Float[Tensor, "edit head"]:
    """Sink score of each edited key as if it were the only one edited."""
    n_tokens = clean.shape[-1]
    at = at.to(clean.device)
    unedited = torch.ones(n_tokens, device=clean.device)
    unedited[at] = 0
    before, after = clean.float() @ unedited, edited.float() @ unedited
    weight = edited[..., at].float() * (before / after)[..., None]
    rest = (1 - clean[..., at].float()).clamp_min(1e-7)
    later = torch.arange(n_tokens, device=clean.device)[:, None] > at
    score = torch.where(later, weight / (rest + weight), 0).sum(dim=1)
    return (score / (n_tokens - 1 - at)).T.cpu()
