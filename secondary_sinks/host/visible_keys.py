"""How many keys does each query see? All before it, those in a sliding window, or in a chunk.

A pattern does not tell: a weight can be 0 because its key is hidden, or because the softmax has
underflowed, or because a hook has set it so. So the count is read from the mask that the model
gives to each attention module. Where a module applies a window by itself (GPT-Neo,
`HookedTransformer`), the window is read from the module.

The keys that a query sees are adjacent and end with itself, so one number describes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.host.model_info import generation_of


def is_visible(scores: Float[Tensor, " *batch query key"]) -> Bool[Tensor, " *batch query key"]:
    """Which keys are not hidden in attention scores or in a mask that is added to them.

    Hidden ones have the most negative number of the precision, or minus infinity.
    """
    return scores > 0.9 * max(torch.finfo(scores.dtype).min, -1e30)


def n_visible_within(n_tokens: int, window: int | None) -> Float[Tensor, " query"]:
    """How many keys each query of a text sees, itself included.

    Args:
        n_tokens: length of the text.
        window: the most that a query sees; None: all.
    """
    return torch.arange(1.0, n_tokens + 1).clamp_max(window or n_tokens)


def window_of_module(attention: Any) -> int | None:
    """The sliding window that an attention module applies by itself, whatever mask it is given."""
    module = getattr(attention, "original_component", None) or attention
    if getattr(module, "attention_type", None) == "local":  # GPT-Neo
        return int(module.config.window_size)
    if getattr(module, "attn_type", None) == "local":  # HookedTransformer
        return int(module.cfg.window_size)
    return None


@contextmanager
def visible_keys_read(
    model: Any, lengths: Sequence[int]
) -> Iterator[dict[int, Float[Tensor, " query"] | None]]:
    """Within the context, an eager pass tells how many keys each query sees.

    Args:
        model: any TransformerLens model.
        lengths: number of tokens of every text of the batch, without the padding on its right.

    Yields:
        By layer, and before the layer's pattern is shown, the counts of the longest text, of which
        those of another text are the first. None where neither mask nor module tells.
    """
    n_visible: dict[int, Tensor | None] = {}
    longest = max(range(len(lengths)), key=lambda row: lengths[row])
    counted: list[tuple[Tensor, Tensor]] = []  # layers of one kind share their mask

    def counts(mask: Tensor) -> Tensor:
        known = next((counts for other, counts in counted if other is mask), None)
        if known is None:
            known = _counts(mask, longest, lengths[longest])
            counted.append((mask, known))
        return known

    def reader(layer: int) -> Any:
        def read(attention: Any, _: Any, arguments: dict[str, Any]) -> None:
            window, mask = window_of_module(attention), arguments.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 4:
                n_visible[layer] = counts(mask).clamp_max(window or lengths[longest])
            elif window is not None or generation_of(model) == "hooked":
                n_visible[layer] = n_visible_within(lengths[longest], window)
            else:
                n_visible[layer] = None

        return read

    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            attention = getattr(block, "attn", None)
            if isinstance(attention, torch.nn.Module):
                hook = attention.register_forward_pre_hook(reader(layer), with_kwargs=True)
                stack.callback(hook.remove)
        yield n_visible


def _counts(
    mask: Bool[Tensor, " batch 1 query key"] | Float[Tensor, " batch 1 query key"],
    row: int,
    n_tokens: int,
) -> Float[Tensor, " query"]:
    """How many keys a mask shows to each query."""
    of_text = mask[row if len(mask) > 1 else 0, 0, :n_tokens, :n_tokens]
    # Some models mark hidden keys with True, others visible ones; the first query sees itself.
    visible = of_text == of_text[0, 0] if of_text.dtype == torch.bool else is_visible(of_text)
    return visible.sum(dim=-1).float().cpu()
