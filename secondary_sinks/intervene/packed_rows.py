"""Packed counterfactual rows: hundreds of exact interventions in one forward pass.

In a causal model an edit at token p cannot change anything before p. So for the edited token's
trajectory only that token must be computed again, over the unchanged keys and values of the tokens
before it. Rows are such tokens, appended to the T clean ones in the same sequence:

    sequence   clean 0 ... T-1 | row 0 | row 1 | ...
    row r      repeats token p, at position p, sees clean tokens 0 ... p-1 and itself
    clean      never see a row

Every row is edited by an ordinary hook at its own index. Its residual after each block is exact.
Its keys, scored by the clean queries of the same pass, give the direct sink score: with `lse` the
clean log-sum-exp of a query, `a` its clean logit to the token and `b` its logit to the row's key,
the token's new weight is `exp(b - logaddexp(lse + log1p(-exp(a - lse)), b))`.

All masking is done in the hook of the attention scores, which sees the raw logits when a bridge is
given a mask of zeros (for `HookedTransformer`, see `hooked_rows`). That keeps sliding windows
right, where a mask given to the model would be applied to every layer alike. Not every architecture
lets the scores be edited, and none says so, so `intervene.self_test` compares this engine with full
passes before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.blocks import skipping
from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.model_info import generation_of
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.hooked_rows import placed_at
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.rows import Place, RowMeter, RowStates, clean_scores, edit_hooks


def run_packed(
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    *,
    fwd_hooks: Sequence[UserHook] = (),
) -> RowStates:
    """Run all rows in one forward pass; see the module's description.

    Attention takes memory of (T + rows) squared. The pass begins at the last layer before which the
    clean run kept the residual stream and no row is edited.

    Args:
        model: a `TransformerBridge` or a `HookedTransformer`.
        clean: the clean run of the text, made with `KeepMasks`.
        rows: what to edit.
        fwd_hooks: the user's hooks.

    Raises:
        ModelError: the model's hook of the scores does not show scores.
    """
    if not clean.shows_scores:
        raise ModelError("the hook of the attention scores shows weights; rows cannot be masked")
    n_tokens, n_rows = len(clean.tokens), len(rows)
    positions = torch.tensor([row[0].position for row in rows])
    tokens = torch.cat([clean.tokens, clean.tokens[positions]])[None]
    position_ids = torch.cat([torch.arange(n_tokens), positions])
    places: list[Place] = [(0, n_tokens + row) for row in range(n_rows)]
    latest = clean.latest_begin(rows)
    begin = max((layer for layer in clean.residual_before if layer <= latest), default=0)
    meter = RowMeter(clean, places, begin=begin)
    keys = _KeyMeter(clean, positions, begin)
    visible = [_with_rows(kind, positions) for kind in clean.visible]
    attention = [
        editor
        for layer, kind in list(enumerate(clean.kind_of_layer))[begin:]
        for editor in (
            (Site("attn_scores", layer), keys.scores_editor(layer, visible[kind])),
            (Site("pattern", layer), keys.pattern_reader(layer)),
        )
    ]
    with ExitStack() as stack:
        start: list[tuple[Site, Editor]] = []
        if begin:
            kept = clean.residual_before[begin]
            residual = torch.cat([kept, kept[positions.to(kept.device)]])[None]
            stack.enter_context(skipping(model, begin))
            start.append((Site("resid_pre", begin), lambda _: residual))
        arguments = stack.enter_context(_unmasked_at(model, position_ids))
        forward(
            model,
            tokens,
            [*start, *edit_hooks(rows, places, clean), *meter.editors(), *attention],
            fwd_hooks=fwd_hooks,
            **arguments,
        )
    return meter.states(positions, keys.direct_score)


@contextmanager
def _unmasked_at(model: Any, position_ids: Int[Tensor, " packed"]) -> Iterator[dict[str, Any]]:
    """Arguments with which, within the context, the model runs a sequence whose tokens are at the
    given positions and whose scores are not masked."""
    length = len(position_ids)
    if generation_of(model) == "bridge":
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        mask = torch.zeros(1, 1, length, length, dtype=dtype)
        yield {"attention_mask": mask, "position_ids": position_ids[None]}
    else:
        with placed_at(model, position_ids):
            yield {"attention_mask": torch.ones(1, length, dtype=torch.long)}


def _with_rows(
    visible: Bool[Tensor, " query key"], positions: Int[Tensor, " row"]
) -> Bool[Tensor, " query_and_row key_and_row"]:
    """Which keys each query sees: a row sees what its token sees, with itself in its place."""
    n_rows = len(positions)
    for_rows = visible[positions].clone()
    for_rows[torch.arange(n_rows), positions] = False
    for_clean = torch.nn.functional.pad(visible, (0, n_rows))
    return torch.cat([for_clean, torch.cat([for_rows, torch.eye(n_rows).bool()], dim=1)])


class _KeyMeter:
    """Masks the scores of each layer and scores the rows' keys with the clean queries."""

    _top: Tensor
    _top_key: Tensor
    _to_token: Tensor
    _to_row: Tensor
    _attends: Tensor

    def __init__(self, clean: CleanRun, positions: Tensor, begin: int):
        self._n_tokens = len(clean.tokens)
        self._positions = positions
        self.direct_score = clean_scores(clean, positions, begin)

    def scores_editor(self, layer: int, visible: Tensor) -> Editor:
        n = self._n_tokens
        later = torch.arange(n)[:, None] > self._positions
        attends = later & visible[:n, self._positions]

        def mask(scores: Tensor) -> Tensor:
            sees = visible.to(scores.device)
            masked = scores.masked_fill(~sees, torch.finfo(scores.dtype).min)
            clean = masked[0, :, :n, :n].float()
            # The log-sum-exp of a query follows from one of its logits and that logit's weight in
            # the pattern. The largest logit has the most precise weight. Using the pattern includes
            # whatever else joins the softmax, such as gpt-oss' learned logits.
            self._top, self._top_key = clean.max(dim=-1)
            self._to_token = clean[:, :, self._positions]
            self._to_row = scores[0, :, :n, n:].float()
            self._attends = attends.to(scores.device)
            return masked

        return mask

    def pattern_reader(self, layer: int) -> Editor:
        n = self._n_tokens

        def read(pattern: Tensor) -> None:
            weight = pattern[0, :, :n].float().gather(-1, self._top_key[..., None])[..., 0]
            lse = (self._top - weight.log())[..., None]
            # Without the token's own key; clamped, because a weight of 1 on it would leave log(0).
            share = (self._to_token - lse).exp().clamp_max(1 - 1e-7)
            rest = lse + torch.log1p(-share)
            new = (self._to_row - torch.logaddexp(rest, self._to_row)).exp()
            total = (new * self._attends).sum(dim=1)  # [head, row]
            # 0/0 is NaN, where no query sees the token.
            self.direct_score[:, layer] = (total / self._attends.sum(dim=0)).T.cpu()

        return read
