"""Are the windows of streamed attention those of the host, where no eager pass can tell?

Beyond a sliding window a host masks differently, so streamed attention is compared with the eager
pass once more there. That pass holds whole patterns: with a window of 4,096 and 32 heads some 40
GB. What differs beyond a window is the mask alone, and the host has a rule for it, of which it is
asked a few lines: those of queries at the edge of each window, and of the last tokens. For these
queries every layer's output is computed once more, slowly and densely, from the same queries, keys
and values under the host's own mask, and compared with what the streamed pass put out:

    streamed   blocks of queries, masked by the width that the layer names
    dense      some queries, all keys, masked by the host's rule

All else (scale, soft caps, learned logits, which hooks fire) was compared on a short text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.host.attention_replaced import AttentionInputs, replaced_attention
from secondary_sinks.host.forward import observe
from secondary_sinks.host.model_info import describe
from secondary_sinks.observe.streaming_attention import StreamingAttention

_LAST = 8  # last queries that are compared


def window_problem(
    model: Any, tokens: Int[Tensor, "token"], widths: Iterable[int], tolerance: float
) -> str | None:
    """Why the windows of streamed attention are not known to be the host's; None if they are.

    Args:
        model: a model whose streamed pass was found right on a short text.
        tokens: a text longer than all the windows.
        widths: of the windows.
        tolerance: largest relative difference that rounding explains.
    """
    n_tokens = len(tokens)
    edges = {width + off for width in widths for off in (-1, 0, 1)}
    queries = sorted({q for q in edges if q < n_tokens} | set(range(n_tokens)[-_LAST:]))
    kernel = StreamingAttention([n_tokens])
    unmasked: list[int] = []
    longest: set[int] = set()
    errors = [0.0]

    def attend(layer: int, inputs: AttentionInputs) -> Tensor:
        output, _ = kernel(inputs)
        if inputs.visible is None:
            unmasked.append(layer)
        else:
            longest.add(int(inputs.visible.sum(dim=1).max()))
            expected = _dense(inputs, queries)
            error = (output[0, queries].float() - expected).abs().max() / expected.abs().max()
            errors.append(math.inf if error.isnan() else float(error))
        return output

    with replaced_attention(model, attend, look_up=queries):
        observe(model, tokens[None], torch.ones_like(tokens)[None], {})
    where = f"on {n_tokens} tokens of {describe(model).name!r}"
    if unmasked:
        return f"{where} layer {unmasked[0]} does not tell which keys its mask shows"
    if unseen := sorted(set(widths) - longest):
        return f"{where} no mask shows the window of {unseen[0]} tokens that its layers speak of"
    if not max(errors) <= tolerance:
        return (
            f"{where} attention within windows differs from a dense computation under the host's "
            f"own mask by {max(errors):.1e}, more than the {tolerance:.1e} that rounding explains"
        )
    return None


def _dense(inputs: AttentionInputs, queries: Sequence[int]) -> Float[Tensor, "query head d_value"]:
    """Attention of some queries over all keys that the host's mask shows them."""
    query = inputs.query[0, :, list(queries)].float()
    group = query.shape[0] // inputs.key.shape[1]
    key, value = (
        one[0].float().repeat_interleave(group, dim=0) for one in (inputs.key, inputs.value)
    )
    scores = inputs.logits(query @ key.mT, slice(None))
    if inputs.visible is not None:
        scores = scores.masked_fill(~inputs.visible.to(scores.device), -math.inf)
    if inputs.sink_logits is not None:
        learned = inputs.sink_logits.float()[:, None, None].expand(-1, len(queries), 1)
        scores = torch.cat([scores, learned], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[1]]
    return (weights @ value).transpose(0, 1)
