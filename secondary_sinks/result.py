"""What every result can do: be saved and loaded, be drawn, and be shown in a notebook.

A result is a frozen dataclass that inherits from `Result`. It is stored by its fields and their
types, so that a new kind of result needs no code for it:

>>> @dataclass(frozen=True)
... class Lengths(Result):
...     length: Float[Tensor, " token"]
...     tokens: tuple[str, ...]
>>> Lengths.load(lengths.save("lengths.safetensors")) == lengths

Fields are tensors, numbers, strings, other dataclasses, and tuples, lists and dictionaries of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from secondary_sinks.errors import InputError, LoadError
from secondary_sinks.storage import load_record, save_record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Self = TypeVar("Self", bound="Result")

# Keys in the stored record that mark tensors, tuples, and dictionaries whose keys are not strings.
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


class Result:
    """Base of all result objects."""

    def to_frame(self) -> pd.DataFrame:
        """The result as a table."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the result to one safetensors file.

        Raises:
            InputError: the folder cannot be written to.
        """
        tensors: dict[str, Tensor] = {}
        record = {
            entry.name: to_record(getattr(self, entry.name), entry.name, tensors)
            for entry in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return save_record(path, type(self).__name__, tensors, record)

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            LoadError: the file does not exist, or is not such a result of this version.
        """
        tensors, record = load_record(path, cls.__name__)
        try:
            loaded: Self = from_record(record, cls, tensors)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise LoadError(
                f"{path} is not a saved {cls.__name__} of this version ({reason}); compute it again"
            ) from error
        return loaded

    def plot(self, *, figure: str | None = None, **options: Any) -> Figure:
        """Draw the result.

        The figure of a `NormLaw` is `plot_norm_law` in `secondary_sinks.plots.plot_norm_law`, and
        so on; its docstring says what can be seen and lists the options. A result finds its figure
        by this name, so that figures import results and not the other way round.

        Args:
            figure: another figure of the same module: "neuron_inputs" is `plot_neuron_inputs`.
            options: of that function.

        Raises:
            InputError: results of this kind have no figure, or not that one.
        """
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        if find_spec(f"secondary_sinks.plots.plot_{name}") is None:
            raise InputError(f"{type(self).__name__} has no figure; see to_frame()")
        module = import_module(f"secondary_sinks.plots.plot_{name}")
        draw = getattr(module, f"plot_{figure or name}", None)
        if draw is None:
            raise InputError(
                f"{type(self).__name__} has no figure {figure!r}; see {module.__name__}"
            )
        drawn: Figure = draw(self, **options)
        return drawn

    def _repr_html_(self) -> str:
        import html

        frame = self._notebook_frame()
        if "token" in frame:
            frame["token"] = frame["token"].map(repr)
        table = frame.to_html(index=False, float_format=lambda value: f"{value:.3g}", max_rows=60)
        return f"<p>{html.escape(repr(self))}</p>{table}"

    def _notebook_frame(self) -> pd.DataFrame:
        """The table that a notebook shows; by default all of `to_frame`."""
        return self.to_frame()


def to_record(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it; tensors go into `tensors`, under the path of their field."""

    def inner(item: Any, key: object) -> Any:
        return to_record(item, f"{name}.{key}", tensors)

    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if dataclasses.is_dataclass(value):
        names = [entry.name for entry in dataclasses.fields(value)]
        return {field: inner(getattr(value, field), field) for field in names}
    if isinstance(value, tuple):
        return {_TUPLE: [inner(item, index) for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [inner(item, index) for index, item in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        return {_ITEMS: [[inner(key, "key"), inner(item, key)] for key, item in value.items()]}
    return value


def from_record(value: Any, hint: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `to_record` stored; `hint` is its type, which names the dataclasses in it."""
    hint = _without_none(hint)
    of_items = get_args(hint) or (Any,)

    def inner(item: Any, hint: Any) -> Any:
        return from_record(item, hint, tensors)

    if isinstance(value, list):
        return [inner(item, of_items[0]) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        one_type = len(of_items) == 1 or of_items[1] is Ellipsis
        hints = itertools.repeat(of_items[0]) if one_type else of_items
        items = [inner(*pair) for pair in zip(value[_TUPLE], hints, strict=False)]
        return hint(*items) if hasattr(hint, "_fields") else tuple(items)  # a named tuple
    if _ITEMS in value:
        return {inner(key, of_items[0]): inner(item, of_items[-1]) for key, item in value[_ITEMS]}
    if dataclasses.is_dataclass(hint):
        types_of = get_type_hints(hint)
        make: Any = hint
        return make(**{key: inner(item, types_of[key]) for key, item in value.items()})
    return {key: inner(item, of_items[-1]) for key, item in value.items()}


def _without_none(hint: Any) -> Any:
    """`X` for `X | None`."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else Any


def counted(n: int, noun: str) -> str:
    """A number with its noun: "no sinks", "1 sink", "3 sinks"."""
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"
