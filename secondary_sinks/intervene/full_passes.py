"""Full passes: every row by a forward pass over the whole text.

Slow and simple; the other engines are tested against it. A batch holds the clean text and a copy in
which the row's token is edited and everything after it is computed again. A second pass gives the
*direct* score: queries, keys and values of all tokens are set to their clean values, except the
edited token's keys, so that only the path from the token's residual through its key changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

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
    """What becomes of the rest of the text under each edit, with everything recomputed."""

    sink_score: Float[Tensor, " row layer token"]
    """Mean over heads of every token's sink score; NaN for the last token."""
    loss: Float[Tensor, " row"]
    """Mean next-token cross-entropy, nats."""
    clean_loss: float
    """The same without an edit."""
    kl: Float[Tensor, " row"]
    """Mean over positions of KL(clean || edited) of the next-token distributions, nats."""
    top1_changed: Float[Tensor, " row"]
    """Share of positions whose most likely next token changes."""

    @classmethod
    def joined(cls, parts: Sequence[TotalEffects]) -> TotalEffects:
        """The rows of all parts, in order."""
        return cls(
            sink_score=torch.cat([part.sink_score for part in parts]),
            loss=torch.cat([part.loss for part in parts]),
            clean_loss=parts[0].clean_loss,
            kl=torch.cat([part.kl for part in parts]),
            top1_changed=torch.cat([part.top1_changed for part in parts]),
        )


def run_full(
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    *,
    fwd_hooks: Sequence[UserHook] = (),
    totals: bool = True,
    progress: bool | None = None,
) -> tuple[RowStates, TotalEffects | None]:
    """Run every row by itself; see the module's description.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        rows: what to edit.
        fwd_hooks: the user's hooks.
        totals: compute the total effects as well, which needs the logits.
        progress: show a progress bar; None shows one for more than one row.
    """
    show = len(rows) > 1 if progress is None else progress
    states: list[RowStates] = []
    effects: list[TotalEffects] = []
    for row in tqdm(rows, desc="full passes", disable=not show):
        state, effect = _one_row(model, clean, row, fwd_hooks, totals)
        states.append(state)
        effects += [] if effect is None else [effect]
    return RowStates.joined(states), TotalEffects.joined(effects) if totals else None


def _one_row(
    model: Any, clean: CleanRun, row: Row, fwd_hooks: Sequence[UserHook], totals: bool
) -> tuple[RowStates, TotalEffects | None]:
    n_layers, n_tokens = clean.n_layers, len(clean.tokens)
    position = row[0].position
    place: Place = (1, position)
    meter = RowMeter(clean, [place])
    keys: dict[int, Tensor] = {}
    score = torch.zeros(1, n_layers, n_tokens)
    n_later = torch.arange(n_tokens - 1, -1, -1)

    def key_reader(layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            keys[layer] = activation[1, position].clone()

        return read

    def take_score(layer: int, columns: list[AttentionColumns]) -> None:
        score[0, layer] = columns[1].received.mean(dim=0).cpu() / n_later

    editors = [
        *edit_hooks([row], [place], clean),
        *meter.editors(),
        *((Site("k", layer), key_reader(layer)) for layer in range(n_layers)),
    ]
    logits = _run_twice(model, clean, editors, take_score, fwd_hooks, logits=totals)
    direct = _direct_score(model, clean, position, keys, fwd_hooks)
    state = meter.states(torch.tensor([position]), direct)
    if logits is None:
        return state, None
    unedited, edited = (output_change(logits[0], text, clean.tokens) for text in logits)
    effects = TotalEffects(
        sink_score=score,
        loss=torch.tensor([edited.loss]),
        clean_loss=unedited.loss,
        kl=torch.tensor([edited.kl]),
        top1_changed=torch.tensor([edited.top1_share]),
    )
    return state, effects


def _direct_score(
    model: Any,
    clean: CleanRun,
    position: int,
    keys: dict[int, Tensor],
    fwd_hooks: Sequence[UserHook],
) -> Float[Tensor, "1 layer head"]:
    """Attention of clean queries to the edited token's keys, everything else clean."""
    n_layers, n_heads, n_tokens = clean.score.shape
    score = torch.full((1, n_layers, n_heads), torch.nan)
    if position == n_tokens - 1:
        return score

    def as_clean(activation: Tensor) -> Tensor:
        return activation[:1].expand_as(activation)

    def key_editor(layer: int) -> Editor:
        def edit(activation: Tensor) -> Tensor:
            frozen = activation[:1].repeat_interleave(2, dim=0)
            frozen[1, position] = keys[layer]
            return frozen

        return edit

    def take_score(layer: int, columns: list[AttentionColumns]) -> None:
        score[0, layer] = columns[1].received[:, position].cpu() / (n_tokens - 1 - position)

    layers = range(n_layers)
    editors: list[tuple[Site, Editor]] = [
        *((Site("q", layer), as_clean) for layer in layers),
        *((Site("v", layer), as_clean) for layer in layers),
        *((Site("k", layer), key_editor(layer)) for layer in layers),
    ]
    _run_twice(model, clean, editors, take_score, fwd_hooks)
    return score


def _run_twice(
    model: Any,
    clean: CleanRun,
    editors: Sequence[tuple[Site, Editor]],
    receive: Receive,
    fwd_hooks: Sequence[UserHook],
    *,
    logits: bool = False,
) -> Float[Tensor, "2 token d_vocab"] | None:
    """One pass over the text and a copy, whose attention columns go to `receive`."""
    tokens = clean.tokens.expand(2, -1)
    with _columns_to(receive, model, clean, editors, fwd_hooks) as all_editors:
        return forward(
            model,
            tokens,
            all_editors,
            fwd_hooks=fwd_hooks,
            attention_mask=torch.ones_like(tokens),
            logits=logits,
        )


@contextmanager
def _columns_to(
    receive: Receive,
    model: Any,
    clean: CleanRun,
    editors: Sequence[tuple[Site, Editor]],
    fwd_hooks: Sequence[UserHook],
) -> Iterator[list[tuple[Site, Editor]]]:
    """Within the context, a pass over the text and a copy hands the columns of both to `receive`.

    Yields the editors to run: those given, and readers of patterns where attention is not streamed.
    """
    sites = {site for site, _ in editors}
    path = path_of_attention(model, clean.tokens, "auto", sites=sites, fwd_hooks=fwd_hooks)
    request = ColumnRequest()

    def reader(layer: int) -> Editor:
        def read(patterns: Tensor) -> None:
            receive(layer, [AttentionColumns.of_pattern(text, request) for text in patterns])

        return read

    if path == "eager":
        readers = [(Site("pattern", layer), reader(layer)) for layer in range(clean.n_layers)]
        yield [*editors, *readers]
    else:
        with streamed_attention(model, [len(clean.tokens)] * 2, request, receive, path):
            yield list(editors)
