"""Figure: which heads look at the primary, which at secondary sinks, and why.

Two maps with a cell for each head: its sink score for the primary (blue) and for the secondary
sinks (orange, summed); a dot marks dormant heads. On the right, for the strongest heads of each
kind, the parts of the difference between their logit to a sink and to an ordinary key. Bars to the
right favor the sink, bars to the left ordinary keys, and the black mark is their sum.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.head_reads import PARTS, HeadReads
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, SMALL, add_panel, new_figure, styled

_TOP, _BOTTOM, _LEFT, _RIGHT, _BAR = 0.35, 0.5, 0.5, 0.2, 0.08  # inches
_ROW = 0.17
_DrawnKind = Literal["primary", "secondary"]
_KINDS: tuple[_DrawnKind, ...] = get_args(_DrawnKind)
_PART_COLORS = dict(
    zip(PARTS, ("#009E73", "#56B4E9", "#E69F00", "#CC79A7", "#BDBDBD", "#7A7A7A"), strict=True)
)


def plot_head_reads(reads: HeadReads, *, n_strongest: int = 6, cell: float = 0.12) -> Figure:
    """Maps of sink scores with dormant heads marked, and the logits of the strongest heads.

    Args:
        reads: result of `head_reads`.
        n_strongest: heads of each kind whose logits are drawn.
        cell: size of a head in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: an argument that is not above 0.
    """
    if not cell > 0:
        raise InputError(f"cell is {cell} inches; it must be above 0")
    if n_strongest < 1:
        raise InputError(f"n_strongest is {n_strongest}; it must be 1 or more")
    width = max(reads.n_heads * cell, 1.3)
    height = max(reads.n_layers * cell, 1.0)
    strongest: dict[_DrawnKind, list[tuple[int, int]]] = {
        kind: _strongest(reads, kind, n_strongest) for kind in _KINDS
    }
    n_rows = sum(len(heads) for heads in strongest.values())
    rows_height = (n_rows + 2) * _ROW
    tallest = max(height, rows_height + 0.75)
    between = 0.1 + _BAR + 0.65
    right = _LEFT + 2 * (width + between) + 0.25
    bars_width = 2.6
    with styled():
        figure = new_figure(right + bars_width + _RIGHT, _TOP + tallest + _BOTTOM)
        for number, kind in enumerate(_KINDS):
            x = _LEFT + number * (width + between)
            axes = add_panel(figure, x, _TOP, width, height)
            _map(figure, axes, reads, kind, x + width + 0.1, height)
        if n_rows:
            axes = add_panel(figure, right, _TOP, bars_width, rows_height)
            _bars(axes, reads, strongest)
            _legend(figure, right, _TOP + rows_height + 0.4)
    return figure


def _map(
    figure: Figure,
    axes: Axes,
    reads: HeadReads,
    kind: _DrawnKind,
    bar_at: float,
    height: float,
) -> None:
    score = reads.primary_score if kind == "primary" else reads.secondary_score
    colors = LinearSegmentedColormap.from_list(kind, ["white", COLORS[kind]])
    image = axes.imshow(
        score.numpy(), aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest"
    )
    title = "primary" if kind == "primary" else "secondary sinks"
    axes.set_title(f"sink score, {title}")
    axes.set_xlabel("head")
    axes.set_ylabel("layer" if kind == "primary" else "")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    layer, head = reads.is_dormant.numpy().nonzero()
    if len(layer):
        axes.scatter(head, layer, s=3, color="black", linewidths=0, gid="dormant")
    place = add_panel(figure, bar_at, _TOP, _BAR, height)
    bar = figure.colorbar(image, cax=place, ticks=[0, 0.5, 1])
    bar.outline.set_linewidth(0.4)


def _strongest(reads: HeadReads, kind: _DrawnKind, n: int) -> list[tuple[int, int]]:
    """(layer, head) of those with the largest scores, among those that look at that kind."""
    score = reads.primary_score if kind == "primary" else reads.secondary_score
    score = score * reads.reads(kind)
    order = score.flatten().argsort(descending=True, stable=True)[:n].tolist()
    places = [divmod(index, reads.n_heads) for index in order]
    return [place for place in places if score[place] > 0]


def _bars(axes: Axes, reads: HeadReads, strongest: dict[_DrawnKind, list[tuple[int, int]]]) -> None:
    labels, places, row = [], [], 0.0
    for kind, heads in strongest.items():
        if not heads:
            continue
        axes.text(
            1,
            row,
            f"to the {kind}",
            color=COLORS[kind],
            fontsize=SMALL,
            ha="right",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        row += 1
        excess = {
            name: reads.of_kind(getattr(reads.sink, name), kind)
            - reads.of_kind(getattr(reads.ordinary, name), kind)
            for name in ("logit", *PARTS)
        }
        for layer, head in heads:
            _stack(axes, row, {name: float(values[layer, head]) for name, values in excess.items()})
            labels.append(f"{layer}.{head}")
            places.append(row)
            row += 1
    axes.axvline(0, color="black", linewidth=0.4, zorder=0)
    axes.set_ylim(row - 0.4, -0.6)
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1.0), max(high, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("logit to the sink less that to ordinary keys (nats)")
    axes.set_title("strongest heads (layer.head)")


def _stack(axes: Axes, row: float, values: dict[str, float]) -> None:
    """The parts of one logit from zero to the left and to the right, and a mark at their sum."""
    for sign in (1, -1):
        start = 0.0
        for name in PARTS:
            if values[name] * sign > 0:  # neither zero nor NaN
                color = _PART_COLORS[name]
                axes.barh(row, values[name], 0.7, left=start, color=color, linewidth=0)
                start += values[name]
    total = values["logit"]
    axes.plot([total, total], [row - 0.4, row + 0.4], color="black", linewidth=1.2)


def _legend(figure: Figure, left: float, top: float) -> None:
    width, height = (float(size) for size in np.asarray(figure.get_size_inches()))
    handles = [Patch(color=_PART_COLORS[name], label=name.replace("_", " ")) for name in PARTS]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=((left - 0.1) / width, 1 - top / height),
        ncols=3,
        handlelength=0.9,
        handletextpad=0.4,
        columnspacing=1.0,
        borderaxespad=0,
    )
