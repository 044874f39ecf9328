"""Attention and its column sums by two fused calls for each layer, on a GPU: `flex_attention`.

Experimental: tested on CPUs, where nothing is fused; neither run nor timed on a GPU.

With L[i] the log-sum-exp of query i, the weight that it gives to token t is exp(s[i, t] - L[i]), so

    log (sum over i of the weights that t receives) = log-sum-exp over i of (s[i, t] - L[i])

which is itself the log-sum-exp of an attention: each key attends to the queries after it, and L is
subtracted from its scores. A fused kernel computes exactly this number. So the first call gives the
output and L, and the second, with queries and keys exchanged, what every token receives; no weight
is written to the GPU's main memory.

Maxima, counts above a threshold and entropies are not such sums and cannot be computed here.
`observe.streaming_attention` computes the same with plain products, and the first layer of each
pass is compared with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.host.visible_keys import n_visible_within
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest
from secondary_sinks.observe.streaming_attention import StreamingAttention

_D_UNUSED = 16  # width of the values in the second call, whose weighted mean is not used


class FusedAttention:
    """Compute attention layer after layer, as `StreamingAttention` does.

    Args:
        lengths: number of tokens of every text of the batch, without the padding on its right.
        request: which column statistics to compute.
        tolerance: largest relative difference to `StreamingAttention` that rounding explains.

    Raises:
        InputError: maxima, thresholds or entropies are requested.
        ModelError: when called, if the first layer differs from `StreamingAttention`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        request: ColumnRequest | None = None,
        *,
        tolerance: float = 1e-4,
    ):
        self._lengths = list(lengths)
        self._request = request or ColumnRequest()
        self._tolerance = tolerance
        self._is_checked = False
        if self._request.maximum or self._request.thresholds or self._request.entropy:
            raise InputError(
                "fused attention computes sums only, no maxima, counts above a threshold or "
                "entropies; use attention='streaming'"
            )

    def __call__(
        self, inputs: AttentionInputs
    ) -> tuple[Float[Tensor, " batch token head d_value"], list[AttentionColumns]]:
        """The output of one layer's attention, and the column statistics of each text."""
        output, columns = inputs.zero_output(), []
        for row, length in enumerate(self._lengths):
            text = inputs.of_text(row, length)
            of_text, log_sum = self._forward(text)
            output[row, :length] = rearrange(of_text, "head token d -> token head d")
            columns.append(self._received(text, log_sum))
        if not self._is_checked:
            self._check(inputs, output, columns)
            self._is_checked = True
        return output, columns

    def _check(
        self, inputs: AttentionInputs, output: Tensor, columns: Sequence[AttentionColumns]
    ) -> None:
        """Compare with plain products, which use neither compilers nor block masks."""
        expected_output, expected_columns = StreamingAttention(self._lengths)(inputs)
        pairs = [(output, expected_output)]
        for part, expected in zip(columns, expected_columns, strict=True):
            pairs += [(part.received, expected.received), (part.own, expected.own)]
        largest = max(
            float((fused - plain).float().abs().max() / plain.float().abs().max())
            for fused, plain in pairs
        )
        if not largest <= self._tolerance:
            raise ModelError(
                f"fused attention differs from streamed attention by {largest:.1e}, more than the "
                f"{self._tolerance:.1e} that rounding explains; use attention='streaming'"
            )

    def _forward(
        self, text: AttentionInputs
    ) -> tuple[Float[Tensor, " head token d_value"], Float[Tensor, " head token"]]:
        """The output, and the logarithm of each query's softmax denominator."""
        n_tokens, window = text.query.shape[2], text.window
        batch_output, lse = _attention(
            text.query,
            text.key,
            text.value,
            score_mod=_score_mod(text),
            block_mask=_pairs(n_tokens, window, text.query.device),
            scale=text.scale,
            enable_gqa=True,
        )
        output, log_sum = batch_output[0], lse[0]
        if text.sink_logits is not None:
            learned = text.sink_logits.float()[:, None]
            output = output * torch.sigmoid(log_sum - learned)[..., None].to(output.dtype)
            log_sum = torch.logaddexp(log_sum, learned)
        return output, log_sum

    def _received(
        self, text: AttentionInputs, log_sum: Float[Tensor, " head query"]
    ) -> AttentionColumns:
        """What each token receives, from the attention of keys to the queries after them."""
        n_heads, n_tokens = log_sum.shape
        keys = text.key.repeat_interleave(n_heads // text.key.shape[1], dim=1)
        logit = _score_mod(text)

        def log_weight(score: Tensor, text: Tensor, head: Tensor, key: Tensor, q: Tensor) -> Tensor:
            return logit(score, text, head, q, key) - log_sum[head, q]

        _, lse = _attention(
            keys,
            text.query,
            text.query[..., :_D_UNUSED],
            score_mod=log_weight,
            block_mask=_pairs(n_tokens, text.window, log_sum.device, by_key=True),
            scale=text.scale,
        )
        products = text.scale * (text.query[0].float() * keys[0].float()).sum(dim=-1)
        head, token = (torch.arange(n, device=log_sum.device) for n in (n_heads, n_tokens))
        own = log_weight(products, head, head[:, None], token, token).exp()
        return AttentionColumns(
            received=lse[0].exp(),
            own=own,
            n_visible=n_visible_within(n_tokens, text.window),
            log_sum_exp=log_sum if self._request.log_sum_exp else None,
        )


ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _score_mod(text: AttentionInputs) -> ScoreMod:
    """Turn a scaled product into a logit, as `AttentionInputs.logits` does."""
    softcap = text.softcap
    alibi = None if text.alibi is None else text.alibi[0].float()

    def logit(score: Tensor, _text: Tensor, head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if alibi is None else score + alibi[head, key]

    return logit


@functools.lru_cache(maxsize=8)
def _pairs(
    n_tokens: int, window: int | None, device: torch.device, *, by_key: bool = False
) -> flex.BlockMask:
    """Which keys each query sees: itself and those before it, within the window.

    With `by_key`, the queries that see each key, without its own.
    """
    width = window or n_tokens

    def of_query(_text: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < width)

    def of_key(text: Tensor, head: Tensor, key: Tensor, query: Tensor) -> Tensor:
        return of_query(text, head, query, key) & (key != query)

    mask = of_key if by_key else of_query
    return flex.create_block_mask(mask, None, None, n_tokens, n_tokens, device=device)


def _attention(*parts: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each query."""
    run = _compiled_for(parts[0].device)
    if hasattr(flex, "AuxRequest"):
        output, aux = run(*parts, **settings, return_aux=flex.AuxRequest(lse=True))
        return output, aux.lse
    output, log_sum = run(*parts, **settings, return_lse=True)  # before PyTorch 2.9
    return output, log_sum


@functools.cache
def _compiled_for(device: torch.device) -> Callable[..., Any]:
    """Fused on an accelerator; on a CPU, for tests, it holds whole patterns."""
    plain: Callable[..., Any] = flex.flex_attention
    return plain if device.type == "cpu" else torch.compile(plain)
