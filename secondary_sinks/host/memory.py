"""Whether weights are in memory, and whether memory has run out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


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
