"""Sink levels as a picture: how many sinks share an onset and a lifetime.

Each cell counts the sinks with exactly that onset (x) and lifetime (y); each outline is a level,
the lifetimes that were merged into one. Few dark cells mean that the model has discrete levels, a
cloud that it has none. No sink can lie above the dashed line: it would outlive the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, SMALL, add_panel, new_figure, styled
from secondary_sinks.result import counted
from secondary_sinks.sinks.levels import SinkLevels

_LEFT, _TOP, _BOTTOM, _GAP = 0.55, 0.55, 0.5, 0.25  # inches
_LEAST = 8  # cells a side, so that a single level does not fill the panel
_ROW_WIDTH = 10.0  # inches; wider rows of panels are broken


def plot_sink_levels(levels: SinkLevels | Sequence[SinkLevels], *, cell: float = 0.24) -> Figure:
    """Heat map of sink counts by onset and lifetime, one panel per model.

    Args:
        levels: of one model or of several.
        cell: side of a cell in inches. Panels show the onsets and lifetimes that occur, with some
            room around them, and grow with their range. Below 0.18 the numbers, which are never
            smaller than 7 points, are left out.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: no levels, or a `cell` that is not above 0.
    """
    panels = [levels] if isinstance(levels, SinkLevels) else list(levels)
    if not panels:
        raise InputError("no sink levels to plot")
    if not cell > 0:
        raise InputError(f"cell is {cell} inches; it must be above 0")
    ranges = [_range(panel) for panel in panels]
    sizes = [((x1 - x0 + 1) * cell, (y1 - y0 + 1) * cell) for x0, x1, y0, y1 in ranges]
    rows = _rows([_LEFT + max(w, 1.9) + _GAP for w, _ in sizes])
    heights = [_TOP + max(sizes[index][1] for index in row) + _BOTTOM for row in rows]
    width = max(sum(_LEFT + max(sizes[i][0], 1.9) + _GAP for i in row) for row in rows)
    with styled():
        figure = new_figure(width, sum(heights) + 0.1)
        for number, row in enumerate(rows):
            left, top = 0.0, sum(heights[:number])
            for index in row:
                axes = add_panel(figure, left + _LEFT, top + _TOP, *sizes[index])
                _draw(axes, panels[index], ranges[index], with_numbers=cell >= 0.18)
                left += _LEFT + max(sizes[index][0], 1.9) + _GAP
    return figure


def _rows(widths: Sequence[float]) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    for index, width in enumerate(widths):
        if rows[-1] and sum(widths[i] for i in rows[-1]) + width > _ROW_WIDTH:
            rows.append([])
        rows[-1].append(index)
    return rows


def _range(levels: SinkLevels) -> tuple[int, int, int, int]:
    """First and last onset, first and last lifetime of a panel."""
    onsets = [onset for onset, _ in levels.counts] or [levels.n_layers // 2]
    lifetimes = [lifetime for _, lifetime in levels.counts] or [levels.n_layers // 2]
    x0, x1 = _widened(min(onsets), max(onsets), 0, levels.n_layers - 1)
    y0, y1 = _widened(min(lifetimes), max(lifetimes), 1, levels.n_layers)
    return x0, x1, y0, y1


def _widened(first: int, last: int, least: int, most: int) -> tuple[int, int]:
    """At least one cell of room on both sides and 8 cells in all, inside the model's depth."""
    extra = max(2, _LEAST - (last - first + 1))
    first, last = first - extra // 2, last + extra - extra // 2
    if first < least:
        first, last = least, last + least - first
    if last > most:
        first, last = max(least, first - (last - most)), most
    return first, max(last, first)


def _draw(
    axes: Axes, levels: SinkLevels, extent: tuple[int, int, int, int], *, with_numbers: bool
) -> None:
    x0, x1, y0, y1 = extent
    grid = np.zeros((y1 - y0 + 1, x1 - x0 + 1))
    for (onset, lifetime), count in levels.counts.items():
        grid[lifetime - y0, onset - x0] = count
    largest = max(float(grid.max()), 1.0)
    # The root keeps single sinks visible beside a level of hundreds.
    axes.imshow(
        np.sqrt(grid),
        origin="lower",
        extent=(x0 - 0.5, x1 + 0.5, y0 - 0.5, y1 + 0.5),
        cmap="Greys",
        vmin=0,
        vmax=math.sqrt(largest) * 1.25,
        interpolation="nearest",
        aspect="auto",
    )
    if with_numbers:
        for (onset, lifetime), count in levels.counts.items():
            dark = math.sqrt(count / largest) > 0.6
            axes.text(
                onset,
                lifetime,
                _short(count),
                ha="center",
                va="center",
                fontsize=SMALL,
                color="white" if dark else "black",
                gid="count",
            )
    _outline(axes, levels)
    end = levels.n_layers
    axes.plot([0, end], [end, 0], color=COLORS["ordinary"], linewidth=0.8, linestyle="--")
    axes.set(
        xlim=(x0 - 0.5, x1 + 0.5),
        ylim=(y0 - 0.5, y1 + 0.5),
        xlabel="onset (layer)",
        ylabel="lifetime (layers)",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title(_title(levels), fontsize=SMALL, parse_math=False)
    if not levels.counts:
        axes.text(
            (x0 + x1) / 2,
            (y0 + y1) / 2,
            f"no {'' if levels.sinks == 'all' else levels.sinks}\nsinks",
            ha="center",
            va="center",
            color=COLORS["ordinary"],
            bbox={"facecolor": "white", "linewidth": 0},
        )


def _outline(axes: Axes, levels: SinkLevels) -> None:
    for level in levels.levels:
        shortest, longest = level.lifetimes
        axes.add_patch(
            Rectangle(
                (level.onset - 0.5, shortest - 0.5),
                1,
                longest - shortest + 1,
                fill=False,
                edgecolor=COLORS["secondary"],
                linewidth=1.4,
                gid="level",
            )
        )


def _title(levels: SinkLevels) -> str:
    name = levels.provenance.model.name
    name = name if len(name) <= 30 else name[:29] + "…"
    sinks = counted(levels.n_sinks, "sink")
    texts = counted(levels.n_texts, "text")
    return f"{name}\n{sinks} in {levels.n_texts_with_sinks} of {texts}"


def _short(count: int) -> str:
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:.0f}k"
