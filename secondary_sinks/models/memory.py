"""When memory runs out: three ways to say it, one question."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: in Python, on an accelerator, or on the CPU.

    PyTorch has an exception of its own for accelerators; what its CPU allocator raises is an
    ordinary `RuntimeError` that only its text tells apart.
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
