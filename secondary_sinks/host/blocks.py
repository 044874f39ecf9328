"""A forward pass that begins in the middle of a model.

Where the residual stream before a block is known, the blocks before it need not run:

>>> with skipping(model, 12):
...     forward(model, tokens, [(Site("resid_pre", 12), lambda _: residual)])

Embeddings, positions and masks are computed as always, so that later blocks get the same inputs.
TransformerLens has `start_at_layer` for this; in a bridge it sets the residual stream correctly,
but still runs all blocks before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.host.forward import forward
from secondary_sinks.host.head_layout import examine_heads
from secondary_sinks.host.hooks_aside import hooks_aside
from secondary_sinks.host.temporary import exchanged


@contextmanager
def skipping(model: Any, n_blocks: int) -> Iterator[None]:
    """Within the context the first `n_blocks` blocks return their input and fire no hooks.

    Args:
        model: a `TransformerBridge` or a `HookedTransformer`.
        n_blocks: how many blocks to skip.
    """
    pass_through = _pass_through(model)
    examine_heads(model)
    with ExitStack() as stack:
        for block in list(model.blocks)[:n_blocks]:
            stack.enter_context(exchanged(block, "forward", pass_through))
        yield


_output_lengths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _pass_through(model: Any) -> Callable[..., Any]:
    """A block's forward that returns its input, with as many outputs as the model's blocks have.

    The blocks of some architectures return a tensor, those of others a tuple that begins with it.
    One pass over one token for each model shows which.
    """
    if model not in _output_lengths:
        lengths: list[int] = []

        def read_length(module: Any, inputs: Any, output: Any) -> None:
            lengths.append(len(output) if isinstance(output, tuple) else 0)

        handle = model.blocks[0].register_forward_hook(read_length)
        try:
            with hooks_aside(model):
                forward(model, torch.zeros(1, 1, dtype=torch.long), [])
        finally:
            handle.remove()
        _output_lengths[model] = lengths[0]
    length = _output_lengths[model]

    def pass_through(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * (length - 1)) if length else hidden_states

    return pass_through
