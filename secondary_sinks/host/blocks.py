"""A forward pass that begins in the middle of a model.

Where the residual stream before a block is known, the blocks before it need not run:

>>> with skipping(model, 12):
...     forward(model, tokens, [(Site("resid_pre", 12), lambda _: residual)])

Embeddings, positions and masks are computed as always, so that all later blocks get what they would
have got. TransformerLens has `start_at_layer` for this; in a bridge it puts the residual in the
right place, but runs all blocks before it as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.host.forward import forward
from secondary_sinks.host.identity import hooks_aside
from secondary_sinks.host.temporary import exchanged


@contextmanager
def skipping(model: Any, n_blocks: int) -> Iterator[None]:
    """Within it, the first `n_blocks` blocks hand on what they get, and fire no hooks.

    Args:
        model: a `TransformerBridge` or a `HookedTransformer`.
        n_blocks: how many blocks to skip.
    """
    hand_on = _hand_on(model)
    with ExitStack() as stack:
        for block in list(model.blocks)[:n_blocks]:
            stack.enter_context(exchanged(block, "forward", hand_on))
        yield


_output_lengths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _hand_on(model: Any) -> Callable[..., Any]:
    """A block's forward that does nothing, with as many outputs as the model's blocks have.

    Some architectures' blocks return a tensor, others a tuple that begins with it; which one is
    seen in a pass over one token, once a model.
    """
    if model not in _output_lengths:
        seen: list[int] = []

        def look(module: Any, inputs: Any, output: Any) -> None:
            seen.append(len(output) if isinstance(output, tuple) else 0)

        handle = model.blocks[0].register_forward_hook(look)
        try:
            with hooks_aside(model):
                forward(model, torch.zeros(1, 1, dtype=torch.long), [])
        finally:
            handle.remove()
        _output_lengths[model] = seen[0]
    length = _output_lengths[model]

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * (length - 1)) if length else hidden_states

    return hand_on
