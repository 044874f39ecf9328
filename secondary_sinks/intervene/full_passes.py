"""The oracle: every row by a forward pass over the whole text.

Slow and obvious. A batch holds the clean text and, for each row, a copy of it in which the row's
token is edited where it stands; everything after it is computed anew. A second pass gives the
*direct* score: queries, keys and values of all tokens are put back to their clean values, but for
the edited token's keys, so that what changes is the path from the token's residual through its key
alone. The other engines are tested against these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.rows import Place, RowMeter, RowStates, edit_hooks
from secondary_sinks.intervene.whole_text import output_change
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest
from secondary_sinks.observe.attention_path import (
    Receive,
    path_of_attention,
    streamed_attention,
)


@dataclass(frozen=True)
class TotalEffects:
    """What the rest of the text looks like under each edit, with everything recomputed."""

    sink_score: Float[Tensor, "row layer token"]
    """Mean over heads of every token's sink score; NaN for the last token."""
    loss: Float[Tensor, "row"]
    """Mean next-token cross-entropy, nats."""
    clean_loss: float
    kl: Float[Tensor, "row"]
    """Mean over positions of KL(clean || edited) of the next-token distributions, nats."""
    top1_changed: Float[Tensor, "row"]
    """Share of positions whose most likely next token is another."""


def run_full(
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    *,
    fwd_hooks: Sequence[UserHook] = (),
    totals: bool = True,
) -> tuple[RowStates, TotalEffects | None]:
    """Run every row by itself; see the module's description.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        rows: what to edit.
        fwd_hooks: hooks of the user's own.
        totals: compute the total effects as well, which needs the logits.
    """
    parts = [_one_row(model, clean, row, fwd_hooks, totals) for row in rows]
    states = RowStates.joined([state for state, _ in parts])
    if not totals:
        return states, None
    effects = [effect for _, effect in parts]
    return states, TotalEffects(
        sink_score=torch.stack([e[0] for e in effects]),
        loss=torch.tensor([e[1] for e in effects]),
        clean_loss=effects[0][2],
        kl=torch.tensor([e[3] for e in effects]),
        top1_changed=torch.tensor([e[4] for e in effects]),
    )


def _one_row(
    model: Any, clean: CleanRun, row: Row, fwd_hooks: Sequence[UserHook], totals: bool
) -> tuple[RowStates, Any]:
    n_layers, n_tokens = clean.n_layers, len(clean.tokens)
    position = row[0].position
    place: Place = (1, position)
    tokens = clean.tokens.expand(2, -1)
    mask = torch.ones_like(tokens)
    meter = RowMeter(clean, [place])
    seen: dict[Site, Tensor] = {}
    score = torch.zeros(n_layers, n_tokens)
    n_queries = torch.arange(n_tokens - 1, -1, -1)

    def keep(site: Site) -> Editor:
        def read(activation: Tensor) -> None:
            seen[site] = activation if site.name != "k" else activation.clone()

        return read

    def take_score(layer: int, columns: list[AttentionColumns]) -> None:
        score[layer] = columns[1].received.mean(dim=0).cpu() / n_queries

    editors = [
        *edit_hooks([row], [place], clean),
        *meter.editors(),
        *((Site("k", layer), keep(Site("k", layer))) for layer in range(n_layers)),
    ]
    with _columns_to(take_score, model, clean, editors, fwd_hooks) as all_editors:
        logits = forward(
            model,
            tokens,
            all_editors,
            fwd_hooks=fwd_hooks,
            attention_mask=mask,
            logits=totals,
        )
    direct = _frozen_scores(model, clean, position, seen, fwd_hooks)
    state = meter.states(torch.tensor([position]), direct)
    return state, (score, *_on_output(logits, clean)) if logits is not None else None


def _frozen_scores(
    model: Any,
    clean: CleanRun,
    position: int,
    keys: dict[Site, Tensor],
    fwd_hooks: Sequence[UserHook],
) -> Float[Tensor, "1 layer head"]:
    """Attention of clean queries to the edited token's keys, everything else clean."""
    n_layers, n_heads = clean.score.shape[:2]
    n_tokens = len(clean.tokens)
    found = torch.full((1, n_layers, n_heads), torch.nan)
    if position == n_tokens - 1:
        return found

    def as_clean(activation: Tensor) -> Tensor:
        return activation[:1].expand_as(activation)

    def key_of(layer: int) -> Editor:
        def edit(activation: Tensor) -> Tensor:
            frozen = activation[:1].repeat_interleave(2, dim=0)
            frozen[1, position] = keys[Site("k", layer)][1, position]
            return frozen

        return edit

    def take_score(layer: int, columns: list[AttentionColumns]) -> None:
        found[0, layer] = columns[1].received[:, position].cpu() / (n_tokens - 1 - position)

    layers = range(n_layers)
    tokens = clean.tokens.expand(2, -1)
    editors: list[tuple[Site, Editor]] = [
        *((Site("q", layer), as_clean) for layer in layers),
        *((Site("v", layer), as_clean) for layer in layers),
        *((Site("k", layer), key_of(layer)) for layer in layers),
    ]
    with _columns_to(take_score, model, clean, editors, fwd_hooks) as all_editors:
        forward(
            model, tokens, all_editors, fwd_hooks=fwd_hooks, attention_mask=torch.ones_like(tokens)
        )
    return found


@contextmanager
def _columns_to(
    receive: Receive,
    model: Any,
    clean: CleanRun,
    editors: Sequence[tuple[Site, Editor]],
    fwd_hooks: Sequence[UserHook],
) -> Iterator[list[tuple[Site, Editor]]]:
    """Within it, a pass over the text and a copy hands the columns of both to `receive`.

    Yields the editors to run: those given, and where attention is not streamed readers of patterns.
    """
    n_tokens, n_layers = len(clean.tokens), clean.n_layers
    sites = {site for site, _ in editors}
    way = path_of_attention(model, clean.tokens, "auto", sites=sites, fwd_hooks=fwd_hooks)
    request = ColumnRequest()

    def reader(layer: int) -> Editor:
        def read(patterns: Tensor) -> None:
            receive(layer, [AttentionColumns.of_pattern(one, request) for one in patterns])

        return read

    if way != "eager":
        with streamed_attention(model, [n_tokens, n_tokens], request, receive, way):
            yield list(editors)
    else:
        yield [*editors, *((Site("pattern", layer), reader(layer)) for layer in range(n_layers))]


def _on_output(logits: Tensor, clean: CleanRun) -> tuple[float, float, float, float]:
    """Loss under the edit, clean loss, KL divergence, share of changed first choices."""
    unedited, edited = (output_change(logits[0], one, clean.tokens) for one in logits)
    return edited.loss, unedited.loss, edited.kl, edited.top1_share
