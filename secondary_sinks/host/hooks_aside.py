"""Set the user's hooks aside while a model is examined on a few tokens of the library's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hooks_aside(model: Any) -> Iterator[None]:
    """Within the context the model's hook points have none of the user's functions.

    A user's hook may fit one text only, and must not run on the few tokens of a check.
    """
    points = {id(point): point for point in model.hook_dict.values()}.values()
    hooks_of = [(point, point._forward_hooks) for point in points]
    for point, _ in hooks_of:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in hooks_of:
            point._forward_hooks = hooks
