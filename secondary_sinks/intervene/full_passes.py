"""Full passes: every row by a forward pass over the whole text.

Slow and simple; the other engines are tested against it. A batch holds the clean text and a copy in
which the row's token is edited and everything after it is computed again. A second pass gives the
*direct* score: queries, keys and values of all tokens are set to their clean values, except the
edited token's keys, so that only the path from the token's residual through its key changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.host.forward import Editor
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, attention_layers, layers_with_keys
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.rows import RowStates, edit_hooks
from secondary_sinks.intervene.whole_text import TextState, measured_pass
from secondary_sinks.observe.attention_path import path_of_attention


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
    position = row[0].position
    keys: dict[int, Tensor] = {}

    def key_reader(layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            keys[layer] = activation[1, position].clone()

        return read

    editors = [
        *edit_hooks([row], [(1, position)], clean),
        *((Site("k", layer), key_reader(layer)) for layer in layers_with_keys(model)),
    ]
    unedited, edited = _pass_with_copy(model, clean, editors, fwd_hooks, output=totals)
    frozen = _with_clean_queries(model, clean, position, keys, fwd_hooks)
    states = RowStates(
        alignment=edited.alignment[None, :, position],
        centered_alignment=edited.centered_alignment[None, :, position],
        norm=edited.norm[None, :, position],
        centered_norm=edited.centered_norm[None, :, position],
        direct_score=frozen.sink_score[None, :, :, position],
    )
    if unedited.output is None or edited.output is None:
        return states, None
    effects = TotalEffects(
        sink_score=edited.sink_score.mean(dim=1)[None],
        loss=torch.tensor([edited.output.loss]),
        clean_loss=unedited.output.loss,
        kl=torch.tensor([edited.output.kl]),
        top1_changed=torch.tensor([edited.output.top1_share]),
    )
    return states, effects


def _with_clean_queries(
    model: Any,
    clean: CleanRun,
    position: int,
    keys: dict[int, Tensor],
    fwd_hooks: Sequence[UserHook],
) -> TextState:
    """The text with the edited token's keys, and all else that attention uses clean."""

    def as_clean(activation: Tensor) -> Tensor:
        return activation[:1].expand_as(activation)

    def key_editor(layer: int) -> Editor:
        def edit(activation: Tensor) -> Tensor:
            frozen = activation[:1].repeat_interleave(2, dim=0)
            frozen[1, position] = keys[layer]
            return frozen

        return edit

    with_keys = layers_with_keys(model)
    editors: list[tuple[Site, Editor]] = [
        *((Site("q", layer), as_clean) for layer in attention_layers(model)),
        *((Site("v", layer), as_clean) for layer in with_keys),
        *((Site("k", layer), key_editor(layer)) for layer in with_keys),
    ]
    return _pass_with_copy(model, clean, editors, fwd_hooks)[1]


def _pass_with_copy(
    model: Any,
    clean: CleanRun,
    editors: Sequence[tuple[Site, Editor]],
    fwd_hooks: Sequence[UserHook],
    *,
    output: bool = False,
) -> list[TextState]:
    """The states of the text and of a copy under editors."""
    sites = {site for site, _ in editors}
    path = path_of_attention(model, clean.tokens, "auto", sites=sites, fwd_hooks=fwd_hooks)
    return measured_pass(model, clean, 1, editors, path, output=output, fwd_hooks=fwd_hooks)
