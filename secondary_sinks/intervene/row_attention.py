"""The attention of rows over the kept keys and values of a clean text, and of the text to the rows.

Rows are processed token by token: all rows of position p attend to the same keys, those of the
tokens before p, and are attended to by the same queries, those of the tokens after p. So both are
plain matrix products without a mask. Query heads that share a key-value head are folded into one,
as in `observe.streaming_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.rows import clean_scores
from secondary_sinks.observe.attention_columns import AttentionColumns

_LOGITS = 1 << 24
"""Logits that are held at once (64 MB), all heads together."""


class RowAttention:
    """Replaces the attention of a pass over rows, layer by layer.

    Args:
        clean: the clean run of the text.
        attention: of every layer, with `inputs` and `log_sum_exp`.
        positions: of the rows' tokens.
        begin: the first layer of the pass; before it every row equals its clean token.
    """

    def __init__(
        self,
        clean: CleanRun,
        attention: Sequence[AttentionColumns],
        positions: Int[Tensor, " row"],
        begin: int,
    ):
        self._attention = attention
        self._rows_at = {
            position: (positions == position).nonzero()[:, 0]
            for position in sorted(set(positions.tolist()))
        }
        self.direct_score = clean_scores(clean, positions, begin)

    def __call__(self, layer: int, rows: AttentionInputs) -> Float[Tensor, " 1 row head d_value"]:
        """Compute the output of one layer's attention; stores the direct scores."""
        output = rows.zero_output()
        for position, rows_at_position in self._rows_at.items():
            text = _TextAround.of(self._attention[layer], position)
            for index in rows_at_position.split(text.rows_at_once):
                query, key, value = (
                    part[0, :, index.to(part.device)].float()
                    for part in (rows.query, rows.key, rows.value)
                )
                attended = text.attend(query, key, value)
                output[0, index.to(output.device)] = attended.to(output.dtype)
                self.direct_score[index, layer] = text.score_of(key).cpu()
        return output


@dataclass(frozen=True)
class _TextAround:
    """The clean text in one layer, as one of its tokens sees it and is seen."""

    inputs: AttentionInputs
    position: int
    keys_before: Float[Tensor, " kv_head key d_head"]
    """Of the tokens that the token sees, without itself."""
    values_before: Float[Tensor, " kv_head key d_value"]
    queries_after: Float[Tensor, " kv_head group_and_query d_head"]
    """Of the tokens that see the token, without itself."""
    own_key: Float[Tensor, " kv_head d_head"]
    log_sum: Float[Tensor, " head query"]
    """Log-sum-exp of the queries after."""

    @classmethod
    def of(cls, columns: AttentionColumns, position: int) -> _TextAround:
        inputs, log_sum_exp = columns.inputs, columns.log_sum_exp
        if inputs is None or log_sum_exp is None:
            raise ModelError("the clean run kept no queries, keys and values")
        n_kv_heads, n_tokens = inputs.key.shape[1:3]
        window = n_tokens if inputs.window is None else inputs.window
        before = slice(max(0, position - window + 1), position)
        after = slice(position + 1, min(n_tokens, position + window))
        return cls(
            inputs=inputs,
            position=position,
            keys_before=inputs.key[0, :, before].float(),
            values_before=inputs.value[0, :, before].float(),
            queries_after=rearrange(
                inputs.query[0, :, after].float(),
                "(kv_head group) query d_head -> kv_head (group query) d_head",
                kv_head=n_kv_heads,
            ),
            own_key=inputs.key[0, :, position].float(),
            log_sum=log_sum_exp[:, after],
        )

    @property
    def rows_at_once(self) -> int:
        """How many rows fit into the logits that are held."""
        n_heads, n_after = self.log_sum.shape
        return max(1, _LOGITS // (n_heads * max(n_after, self.keys_before.shape[1] + 1)))

    def attend(
        self,
        query: Float[Tensor, " head row d_head"],
        key: Float[Tensor, " kv_head row d_head"],
        value: Float[Tensor, " kv_head row d_value"],
    ) -> Float[Tensor, " row head d_value"]:
        """What rows of the token get from the tokens before it, and each from itself."""
        n_kv_heads, n_before = self.keys_before.shape[:2]
        grouped = rearrange(
            query, "(kv_head group) row d_head -> kv_head group row d_head", kv_head=n_kv_heads
        )
        # Folded, because a broadcast product would copy the keys for every query head.
        to_text = grouped.flatten(1, 2) @ self.keys_before.mT
        to_itself = (grouped * key[:, None]).sum(dim=-1).flatten(1)[..., None]
        products = rearrange(
            torch.cat([to_text, to_itself], dim=-1),
            "kv_head (group row) key -> (kv_head group) row key",
            row=query.shape[1],
        )
        visible = slice(self.position - n_before, self.position + 1)
        logits = self.inputs.logits(products, visible)
        if self.inputs.sink_logits is not None:
            learned = self.inputs.sink_logits.float()[:, None, None]
            logits = torch.cat([logits, learned.expand(-1, query.shape[1], 1)], dim=-1)
        weights = rearrange(
            logits.softmax(dim=-1),
            "(kv_head group) row key -> kv_head group row key",
            kv_head=n_kv_heads,
        )
        from_text = weights[..., :n_before].flatten(1, 2) @ self.values_before
        from_itself = weights[..., n_before, None] * value[:, None]
        return rearrange(
            from_text.view_as(from_itself) + from_itself,
            "kv_head group row d_value -> row (kv_head group) d_value",
        )

    def score_of(self, key: Float[Tensor, " kv_head row d_head"]) -> Float[Tensor, " row head"]:
        """Mean attention of the clean later queries that see the token to each row's key in its
        place; NaN if none does."""
        keys = torch.cat([self.own_key[:, None], key], dim=1)
        products = rearrange(
            self.queries_after @ keys.mT,
            "kv_head (group query) key -> (kv_head group) query key",
            group=len(self.log_sum) // len(key),
        )
        logits = self.inputs.logits(products, slice(self.position, self.position + 1))
        clean, rows = logits[..., :1], logits[..., 1:]
        # Without the token's own key; clamped, because a weight of 1 on it would leave log(0).
        log_sum = self.log_sum[..., None]
        share = (clean - log_sum).exp().clamp_max(1 - 1e-7)
        rest = log_sum + torch.log1p(-share)
        return (rows - rest).sigmoid_().mean(dim=1).T
