"""Memory: where the weights are, what a pass takes, and what happens when it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from secondary_sinks.errors import ModelError

MEMORY_BUDGET = 1 << 30
"""Bytes that the attention and the logits of one pass may take, by default."""

Item = TypeVar("Item")
Done = TypeVar("Done")


def eager_attention_bytes(model: Any, n_tokens: int) -> int:
    """Memory of one layer's eager attention over one text: about five float32 copies of its
    scores."""
    return 5 * 4 * int(model.cfg.n_heads) * n_tokens**2


def in_chunks(
    run: Callable[[Sequence[Item]], Done],
    items: Sequence[Item],
    size: int,
    *,
    too_large: str,
    description: str,
    progress: bool | None = None,
) -> Iterator[Done]:
    """What `run` returns for each chunk of the items, in order.

    A chunk that does not fit into memory is halved, and so are those after it. No items are one
    empty chunk.

    Args:
        run: runs one chunk.
        items: what to run.
        size: number of items in a chunk, 1 or more.
        too_large: message of the error if not even one item fits.
        description: label of the progress bar.
        progress: show a progress bar; None shows one for more than one chunk.

    Raises:
        ModelError: not even one item fits into memory.
    """
    show = len(items) > size if progress is None else progress
    first = 0
    with tqdm(total=len(items), desc=description, disable=not show) as bar:
        while True:
            chunk = items[first : first + size]
            try:
                done = run(chunk)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(chunk) <= 1:
                    raise ModelError(too_large) from error
                size = len(chunk) // 2
                continue
            yield done
            first += len(chunk)
            bar.update(len(chunk))
            if first >= len(items):
                return


def in_memory(module: Any) -> AbstractContextManager[None]:
    """Load the module's weights for the duration of the context, if accelerate keeps them on disk.

    Outside it, and between the module's calls, such a weight is a tensor without numbers (`meta`).
    """
    if not any(p.is_meta for p in getattr(module, "parameters", tuple)()):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[None] = align_module_device(module)
    return context


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: in Python, on an accelerator, or on the CPU.

    PyTorch has a separate exception for accelerators; its CPU allocator raises an ordinary
    `RuntimeError`, recognized here by its text.
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def input_device(model: Any) -> torch.device:
    """The device on which the model takes its tokens."""
    parameters = getattr(model, "parameters", None)
    if parameters is None:
        return torch.device("cpu")
    return next((p.device for p in parameters() if p.device.type != "meta"), torch.device("cpu"))
