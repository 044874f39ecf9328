"""Heat maps with one row a sink: row labels, an outlined cell, and the number of sinks left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from secondary_sinks.plots.style import COLORS, SMALL, text_width, visible
from secondary_sinks.result import counted

_ROW = 0.16  # inches
_MOST = 60


class _Sink(Protocol):
    @property
    def position(self) -> int: ...
    @property
    def token(self) -> str: ...


@dataclass(frozen=True)
class SinkRows:
    """The rows, the same in all heat maps of a figure."""

    labels: tuple[str, ...]
    n_left_out: int

    @classmethod
    def of(cls, sinks: Sequence[_Sink]) -> SinkRows:
        """The rows of the first 60 sinks."""
        labels = tuple(f"{s.position} {visible(s.token, limit=8)}" for s in sinks[:_MOST])
        return cls(labels, len(sinks) - len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def height(self) -> float:
        """Height of all rows in inches."""
        return len(self) * _ROW

    @property
    def label_width(self) -> float:
        """Width of the longest label in inches."""
        return max(text_width(label) for label in self.labels)

    def name(self, axes: Axes, *, shown: bool = True) -> None:
        """Label the rows; `shown=False` beside a heat map that shows the labels."""
        labels = self.labels if shown else [""] * len(self)
        axes.set_yticks(range(len(self)), labels, family="DejaVu Sans Mono", parse_math=False)
        axes.tick_params(axis="y", length=0)

    def tell_left_out(self, figure: Figure) -> None:
        """Write in a corner how many sinks have no row."""
        if self.n_left_out:
            more = counted(self.n_left_out, "more sink")
            figure.text(0.01, 0.01, f"and {more}", fontsize=SMALL)


def outline(axes: Axes, row: int, column: int, kind: str, what: str) -> None:
    """Outline one cell in the color of a kind; `what` is the outline's id in the figure."""
    place = (column - 0.5, row - 0.5)
    axes.add_patch(
        Rectangle(place, 1, 1, fill=False, edgecolor=COLORS[kind], linewidth=1.2, gid=what)
    )
