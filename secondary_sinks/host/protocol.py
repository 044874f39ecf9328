"""The part of a TransformerLens model that the library relies on.

`TransformerBridge` and `HookedTransformer` both have it. Members are typed loosely, because the two
generations differ in the details of their signatures and agree in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

UserHook: TypeAlias = "tuple[Any, Callable[..., Any]]"
"""A `(hook name, function)` pair as `run_with_hooks` takes it."""


@runtime_checkable
class Model(Protocol):
    """A causal language model with TransformerLens' hook points."""

    @property
    def cfg(self) -> Any:
        """Configuration: depth, width, heads, name."""
        ...

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by name."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass with temporary hooks."""

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize a string."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weights."""
        ...
