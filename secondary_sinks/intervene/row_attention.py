"""The attention of rows over the kept keys and values of a clean text, and of it to the rows.

Rows are taken together token by token: all rows of position p look at the same keys, those of the
tokens before p, and the same queries, those of the tokens behind p, look at them. So both are plain
products, and nothing needs a mask. Query heads that share a key-value head are folded into one, as
in `observe.streaming_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.observe.attention_columns import AttentionColumns

_LOGITS = 1 << 24
"""Logits that are held at once (64 MB), all heads together."""


class RowAttention:
    """Replaces the attention of a pass over rows, layer by layer.

    Args:
        clean: the clean run of the text.
        attention: of every layer, with `inputs` and `log_sum_exp`.
        positions: of the rows' tokens.
        begin: the first layer of the pass; before it every row is its clean token.
    """

    def __init__(
        self,
        clean: CleanRun,
        attention: Sequence[AttentionColumns],
        positions: Int[Tensor, "row"],
        begin: int,
    ):
        n_layers, n_heads, self._n_tokens = clean.score.shape
        self._attention = attention
        self._rows_at = {
            position: (positions == position).nonzero()[:, 0]
            for position in sorted(set(positions.tolist()))
        }
        self.direct_score = torch.full((len(positions), n_layers, n_heads), torch.nan)
        self.direct_score[:, :begin] = clean.score[:begin, :, positions].permute(2, 0, 1)

    def __call__(self, layer: int, rows: AttentionInputs) -> Float[Tensor, "1 row head d_value"]:
        """The output of one layer's attention; takes down the direct scores."""
        n_heads, n_rows = rows.query.shape[1:3]
        output = rows.query.new_empty(1, n_rows, n_heads, rows.value.shape[-1])
        for position, of_position in self._rows_at.items():
            text = _Text.of(self._attention[layer], position)
            for index in of_position.split(text.rows_at_once):
                query, key, value = (
                    one[0, :, index.to(one.device)].float()
                    for one in (rows.query, rows.key, rows.value)
                )
                attended = text.attend(query, key, value)
                output[0, index.to(output.device)] = attended.to(output.dtype)
                if position < self._n_tokens - 1:
                    self.direct_score[index, layer] = text.score_of(key).cpu()
        return output


@dataclass(frozen=True)
class _Text:
    """The clean text in one layer, as it lies around one of its tokens."""

    inputs: AttentionInputs
    position: int
    before: tuple[Float[Tensor, "kv_head key d_head"], Float[Tensor, "kv_head key d_value"]]
    """Keys and values of the tokens that the token sees, itself left out."""
    later: Float[Tensor, "kv_head group_and_query d_head"]
    """Queries of the tokens that see the token, itself left out."""
    own_key: Float[Tensor, "kv_head d_head"]
    log_sum: Float[Tensor, "head query"]
    """Log-sum-exp of the later queries."""
    n_later: int
    """All tokens behind it, also those that do not see it."""

    @classmethod
    def of(cls, columns: AttentionColumns, position: int) -> _Text:
        inputs = columns.inputs
        assert inputs is not None
        assert columns.log_sum_exp is not None
        n_tokens = inputs.key.shape[2]
        n_kv_heads = inputs.key.shape[1]
        window = n_tokens if inputs.window is None else inputs.window
        seen = slice(max(0, position - window + 1), position)
        seeing = slice(position + 1, min(n_tokens, position + window))
        return cls(
            inputs=inputs,
            position=position,
            before=(inputs.key[0, :, seen].float(), inputs.value[0, :, seen].float()),
            later=inputs.query[0, :, seeing].float().reshape(n_kv_heads, -1, inputs.key.shape[-1]),
            own_key=inputs.key[0, :, position].float(),
            log_sum=columns.log_sum_exp[:, seeing],
            n_later=n_tokens - 1 - position,
        )

    @property
    def rows_at_once(self) -> int:
        """How many rows fit into the logits that are held."""
        n_heads, n_later = self.log_sum.shape
        return max(1, _LOGITS // (n_heads * max(n_later, self.before[0].shape[1] + 1)))

    def attend(
        self,
        query: Float[Tensor, "head row d_head"],
        key: Float[Tensor, "kv_head row d_head"],
        value: Float[Tensor, "kv_head row d_value"],
    ) -> Float[Tensor, "row head d_value"]:
        """What rows of the token get: from the tokens before it, and each from itself."""
        n_heads, n_rows, d_head = query.shape
        n_kv_heads, group = len(key), n_heads // len(key)
        keys, values = self.before
        folded = query.reshape(n_kv_heads, group * n_rows, d_head)
        own = (query.view(n_kv_heads, group, n_rows, d_head) * key[:, None]).sum(-1)
        products = torch.cat([folded @ keys.mT, own.reshape(n_kv_heads, -1, 1)], dim=-1)
        seen = slice(self.position - keys.shape[1], self.position + 1)
        logits = self.inputs.logits(products.view(n_heads, n_rows, -1), seen)
        if self.inputs.sink_logits is not None:
            learned = self.inputs.sink_logits.float()[:, None, None].expand(-1, n_rows, 1)
            logits = torch.cat([logits, learned], dim=-1)
        weights = logits.softmax(dim=-1).view(n_kv_heads, group, n_rows, -1)
        n_seen = keys.shape[1]
        from_text = weights[..., :n_seen].flatten(1, 2) @ values
        from_itself = weights[..., n_seen, None] * value[:, None]
        attended = from_text.view(n_kv_heads, group, n_rows, -1) + from_itself
        return attended.view(n_heads, n_rows, -1).transpose(0, 1)

    def score_of(self, key: Float[Tensor, "kv_head row d_head"]) -> Float[Tensor, "row head"]:
        """Mean attention of the clean later queries to each row's key, in the place of the own."""
        n_heads = self.inputs.query.shape[1]
        own = slice(self.position, self.position + 1)
        keys = torch.cat([self.own_key[:, None], key], dim=1)
        logits = self.inputs.logits((self.later @ keys.mT).view(n_heads, -1, keys.shape[1]), own)
        clean, rows = logits[..., :1], logits[..., 1:]
        # Without the token's own key; all of the weight on it leaves nothing.
        log_sum = self.log_sum[..., None]
        share = (clean - log_sum).exp().clamp_max(1 - 1e-7)
        rest = log_sum + torch.log1p(-share)
        return (rows - rest).sigmoid_().sum(dim=1).T / self.n_later
