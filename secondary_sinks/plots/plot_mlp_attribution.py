"""Which layers a sink needs, and which of them writes it.

Two heat maps, one row a sink and one column a layer. On the left, necessity: the share of the
sink's length along the sink direction that is lost when that MLP's output at its token is zeroed.
On the right, the direct write: what that MLP adds along the sink direction, over the residual's
projection after the onset (both beyond ordinary tokens). The writer is dark in both maps, and
outlined; feeders are dark on the left alone. Cells are empty where a token has nothing to lose: it
may not be a sink.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.attribute_to_mlps import MlpAttribution
from secondary_sinks.errors import InputError
from secondary_sinks.plots.sink_rows import SinkRows, outline
from secondary_sinks.plots.style import add_panel, new_figure, styled

_TOP, _BOTTOM, _GAP, _RIGHT, _BAR = 0.35, 0.45, 0.3, 0.15, 0.08  # inches


def plot_mlp_attribution(attribution: MlpAttribution, *, cell: float = 0.11) -> Figure:
    """Draw necessity and direct write, sinks by layers, with the writers outlined.

    Args:
        attribution: its first 60 sinks are drawn.
        cell: width of a layer in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `cell` that is not above 0.
    """
    if not cell > 0:
        raise InputError(f"cell must be above 0 inches, got {cell}")
    rows = SinkRows.of(attribution.sinks)
    left = rows.label_width + 0.3
    width, height = max(attribution.n_layers * cell, 1.9), max(rows.height, 0.5)
    bars = _GAP + _BAR + 0.45
    with styled():
        figure = new_figure(left + 2 * (width + bars) + _RIGHT, _TOP + height + _BOTTOM)
        panels = (
            ("necessity: share of the sink lost", _length_lost(attribution), "Greys", 0.0),
            ("direct write: share of the sink", _write_share(attribution), "RdGy_r", -1.0),
        )
        for number, (title, values, colors, least) in enumerate(panels):
            x = left + number * (width + bars)
            axes = add_panel(figure, x, _TOP, width, height)
            image = axes.imshow(
                values[: len(rows)],
                aspect="auto",
                cmap=colors,
                vmin=least,
                vmax=1,
                interpolation="nearest",
            )
            axes.set_title(title)
            axes.set_xlabel("layer of the MLP")
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
            rows.name(axes, shown=number == 0)
            for row, sink in enumerate(attribution.sinks[: len(rows)]):
                if sink.writer is not None:
                    outline(axes, row, sink.writer, "secondary", "writer")
            bar_axes = add_panel(figure, x + width + 0.1, _TOP, _BAR, height)
            bar = figure.colorbar(image, cax=bar_axes, ticks=[least, 0, 1] if least else [0, 1])
            bar.outline.set_linewidth(0.4)
        rows.tell_left_out(figure)
    return figure


def _length_lost(attribution: MlpAttribution) -> np.ndarray:
    lengths = [sink.length for sink in attribution.sinks]
    lost: np.ndarray = 1 - attribution.mlp_zero.length.numpy() / _wholes(lengths)
    return lost.clip(0, 1)


def _write_share(attribution: MlpAttribution) -> np.ndarray:
    written = attribution.direct_write
    projections = [
        float(written.excess_projection[index, sink.onset])
        for index, sink in enumerate(attribution.sinks)
    ]
    share: np.ndarray = written.excess.numpy() / _wholes(projections)
    return share.clip(-1, 1)


def _wholes(values: Iterable[float]) -> np.ndarray:
    """What shares are taken of, a row each; NaN where it is not above zero."""
    return np.array([[value if value > 0 else np.nan] for value in values])
