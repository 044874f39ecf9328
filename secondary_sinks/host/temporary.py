"""Temporarily replace one attribute of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def exchanged(module: Any, name: str, value: Any) -> Iterator[None]:
    """Set `module.name` to `value` within the context, and restore it at the end or on an error.

    It does not use `setattr`, which a bridge's components forward to the module that they wrap.
    """
    # An instance's own attributes only: a method of the class is uncovered again, not copied.
    attributes = module._buffers if name in module._buffers else vars(module)
    before = attributes.get(name, _MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del attributes[name]
        else:
            attributes[name] = before
