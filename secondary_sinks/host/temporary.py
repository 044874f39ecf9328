"""One attribute of one module is another for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def exchanged(module: Any, name: str, value: Any) -> Iterator[None]:
    """`module.name` is `value` within the context, and as it was afterwards, also when it raises.

    Not by `setattr`, which a bridge's components forward to the module that they wrap.
    """
    if name in module._buffers:
        before = module._buffers[name]
        module._buffers[name] = value
        try:
            yield
        finally:
            module._buffers[name] = before
        return
    attributes = vars(module)  # of the instance alone: methods are uncovered again, not copied
    before = attributes.get(name, _MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del attributes[name]
        else:
            attributes[name] = before
