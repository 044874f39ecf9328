"""Figure: what every block adds to each sink, and which one ends it.

Three heat maps. Two have a row for each sink and a column for each layer: what that layer's MLP,
and its attention, adds along the sink direction, over the length that the sink has after its last
layer (both beyond ordinary tokens). Red adds, gray erases; the eraser is outlined. Rows of tokens
that are not sinks are empty. The third has a row for each head, the mean over the sinks; its colors
have another scale, because heads usually add little.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.decomposition.sink_decomposition import SinkDecomposition
from secondary_sinks.errors import InputError
from secondary_sinks.plots.sink_rows import SinkRows, outline
from secondary_sinks.plots.style import add_panel, new_figure, styled

_TOP, _BOTTOM, _GAP, _RIGHT, _BAR = 0.35, 0.55, 0.3, 0.15, 0.08  # inches
_LEAST_SCALE = 0.01


def plot_sink_decomposition(decomposition: SinkDecomposition, *, cell: float = 0.11) -> Figure:
    """Heat maps of what MLPs, attention blocks and heads write, with the erasers outlined.

    Args:
        decomposition: result of `sink_decomposition`; at most 60 sinks are drawn, from the first.
        cell: width of a layer in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `cell` that is not above 0.
    """
    if not cell > 0:
        raise InputError(f"cell is {cell} inches; it must be above 0")
    rows = SinkRows.of(decomposition.sinks)
    left = rows.label_width + 0.3
    width = max(decomposition.n_layers * cell, 1.9)
    height = max(rows.height, 0.5)
    heads_height = max(decomposition.n_heads * cell, 0.5)
    between = _GAP + _BAR + 0.5
    tallest = max(height, heads_height)
    mlp = decomposition.shares(decomposition.write.excess).numpy()
    attention = decomposition.shares(decomposition.write.attention_excess).numpy()
    heads = decomposition.shares(decomposition.head_write.excess).nanmean(dim=0).T
    with styled():
        figure = new_figure(left + 3 * (width + between) + 0.2 + _RIGHT, _TOP + tallest + _BOTTOM)
        for number, (kind, shares) in enumerate((("MLP", mlp), ("attention", attention))):
            x = left + number * (width + between)
            axes = add_panel(figure, x, _TOP, width, height)
            _draw(figure, axes, shares[: len(rows)], 1.0, x + width + 0.1, height)
            axes.set_title(f"{kind}: share of the sink")
            rows.name(axes, shown=number == 0)
            for row, sink in enumerate(decomposition.sinks[: len(rows)]):
                if sink.eraser and sink.eraser.startswith("mlp") == (kind == "MLP"):
                    outline(axes, row, sink.verdict.candidate_layer, "primary", "eraser")
        x = left + 2 * (width + between) + 0.2
        axes = add_panel(figure, x, _TOP, width, heads_height)
        scale = max(float(heads.nan_to_num().abs().max()), _LEAST_SCALE)
        _draw(figure, axes, heads.numpy(), scale, x + width + 0.1, heads_height)
        axes.set_title("heads: mean share")
        axes.set_ylabel("head", labelpad=2)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        rows.tell_left_out(figure)
    return figure


def _draw(
    figure: Figure, axes: Axes, shares: np.ndarray, scale: float, bar_at: float, height: float
) -> None:
    image = axes.imshow(
        shares.clip(-scale, scale),
        aspect="auto",
        cmap="RdGy_r",
        vmin=-scale,
        vmax=scale,
        interpolation="nearest",
    )
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    place = add_panel(figure, bar_at, _TOP, _BAR, height)
    bar = figure.colorbar(image, cax=place, ticks=[-scale, 0, scale])
    bar.ax.set_yticklabels([f"{value:+.2g}" if value else "0" for value in (-scale, 0, scale)])
    bar.outline.set_linewidth(0.4)
