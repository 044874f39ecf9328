"""Heat maps with one row a sink: the names of the rows, the cell that stands out, and what is left
out where a text has more sinks than a page has room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from secondary_sinks.plots.style import COLORS, SMALL, text_width, visible

_ROW = 0.16  # inches
_MOST = 60


class _Sink(Protocol):
    @property
    def position(self) -> int: ...
    @property
    def token(self) -> str: ...


@dataclass(frozen=True)
class SinkRows:
    """The rows of such maps, the same in all maps of a figure."""

    labels: tuple[str, ...]
    n_left_out: int

    @classmethod
    def of(cls, sinks: Sequence[_Sink]) -> SinkRows:
        """At most 60 rows, from the first sink."""
        labels = tuple(f"{s.position} {visible(s.token, limit=8)}" for s in sinks[:_MOST])
        return cls(labels, len(sinks) - len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def height(self) -> float:
        """Of all rows, in inches."""
        return len(self) * _ROW

    @property
    def label_width(self) -> float:
        """Of the longest label, in inches."""
        return max(text_width(label) for label in self.labels)

    def name(self, axes: Axes, *, shown: bool = True) -> None:
        """Give each row its label, or none beside a map that has them."""
        labels = self.labels if shown else [""] * len(self)
        axes.set_yticks(range(len(self)), labels, family="DejaVu Sans Mono", parse_math=False)
        axes.tick_params(axis="y", length=0)

    def tell_left_out(self, figure: Figure) -> None:
        """Say in a corner how many sinks have no row."""
        if self.n_left_out:
            figure.text(0.01, 0.01, f"and {self.n_left_out} more sinks", fontsize=SMALL)


def outline(axes: Axes, row: int, column: int, kind: str, what: str) -> None:
    """A frame in the color of a kind around one cell; `what` names it in the figure."""
    place = (column - 0.5, row - 0.5)
    axes.add_patch(
        Rectangle(place, 1, 1, fill=False, edgecolor=COLORS[kind], linewidth=1.2, gid=what)
    )
