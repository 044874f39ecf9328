"""Packed rows in a `HookedTransformer`, which accepts neither position ids nor a mask.

`HookedTransformer` computes positions and masks from the sequence index. While rows are behind the
text, the tables in which it looks up positions (learned embeddings, rotary sines and cosines, ALiBi
biases) are replaced by tables in the order of the packed sequence, and its causal mask is switched
off, so that the hook of the scores sees the raw logits and does all masking, as in a bridge. All
replaced attributes are attributes of instances and are restored, also when the pass raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.temporary import exchanged


@contextmanager
def placed_at(model: Any, positions: Int[Tensor, " packed"]) -> Iterator[None]:
    """Within the context, sequence index `i` is at position `positions[i]` and sees all keys.

    Args:
        model: a `HookedTransformer` that has already run a text as long as the largest position
            (its tables grow with the longest text).
        positions: of every token of the packed sequence.

    Raises:
        ModelError: the model's positions depend on the length of the sequence (dynamic rotary
            scaling, log-n scaling of queries), so rows behind the text would change the text.
    """
    cfg = model.cfg
    if getattr(cfg, "use_dynamic_ntk_rope", False) or getattr(cfg, "use_logn_attn", False):
        raise ModelError("positions depend on the length of the sequence; rows cannot be packed")
    with ExitStack() as stack:
        if hasattr(model, "pos_embed"):
            learned = model.pos_embed.W_pos
            embedded: Tensor = learned[positions.to(learned.device)]

            def embed(tokens: Tensor, *_: Any, **__: Any) -> Float[Tensor, " batch packed d_model"]:
                return embedded.expand(len(tokens), -1, -1)

            stack.enter_context(exchanged(model.pos_embed, "forward", embed))
        for block in model.blocks:
            attention = block.attn
            stack.enter_context(exchanged(attention, "apply_causal_mask", _unmasked))
            for name in ("rotary_cos", "rotary_sin"):
                table = getattr(attention, name, None)
                if table is not None:
                    gathered = table[positions.to(table.device)]
                    stack.enter_context(exchanged(attention, name, gathered))
            bias = getattr(attention, "alibi", None)
            if bias is not None:
                index = positions.to(bias.device)
                gathered = bias[:, index][:, :, index]
                stack.enter_context(exchanged(attention, "alibi", gathered))
        yield


def _unmasked(scores: Tensor, *_: Any, **__: Any) -> Tensor:
    return scores
