"""The lower half of the figure of a sink map: sinks and ordinary tokens from layer to layer.

Two panels, each with one curve for every sink and a gray band for the ordinary tokens: attention
drawn (the sink score, averaged over heads) and residual norm. The shading says where secondary
sinks live. It stands one layer further right for attention, because the residual after block l is
what block l + 1 attends to.

These are measurements side by side. That the primary weakens *because of* the secondary sinks is
shown by an intervention, not by this picture.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from secondary_sinks.plots.style import ALIVE, COLORS, SMALL, alive_spans
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.sink_map import SinkMap

CURVES_HEIGHT = 1.5
"""Height of a panel in inches."""

_ROW = 0.16  # height of a row of the legend in inches


def draw_scores(axes: Axes, sink_map: SinkMap) -> None:
    """Sink score of every sink by layer, averaged over heads; the layer is the attention's.

    Logarithmic, so that a token called a sink within the band of ordinary tokens is seen at once.
    """
    axes.set_label("scores")
    axes.set_title("attention drawn")
    if sink_map.sink_score is None:
        return
    score = _array(sink_map.sink_score.float().mean(dim=1))
    axes.set_yscale("log")
    _draw_curves(axes, sink_map, score, shift=1)
    axes.set_ylabel("sink score")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_share))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_norms(axes: Axes, sink_map: SinkMap) -> None:
    """Residual norm of every sink by layer, logarithmic."""
    axes.set_label("norms")
    axes.set_title("size of the residual")
    if sink_map.norm is None:
        return
    axes.set_yscale("log")
    _draw_curves(axes, sink_map, _array(sink_map.norm), shift=0)
    axes.set_ylabel("norm of the residual")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_height(sink_map: SinkMap, width: float) -> float:
    """Height in inches of the legend in a figure of that width."""
    entries = len(_handles(sink_map))
    return math.ceil(entries / _legend_columns(width)) * _ROW


def draw_legend(figure: Figure, sink_map: SinkMap, *, left: float, top: float) -> None:
    """Draw the legend in rows, with its upper left corner at a place in inches."""
    width, height = figure.get_size_inches()
    handles = _handles(sink_map)
    if not handles:
        return
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left / width, 1 - top / height),
        ncols=_legend_columns(width),
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.4,
        fontsize=SMALL,
    )


def _legend_columns(width: float) -> int:
    return 5 if width >= 6 else 2


def _handles(sink_map: SinkMap) -> list[Line2D | Patch]:
    present = [kind for kind in ("primary", "secondary", "noise") if _positions(sink_map, kind)]
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=COLORS[kind], linewidth=2, label=kind) for kind in present
    ]
    if sink_map.norm is None:
        return handles
    if not sink_map.primary:
        label = f"token {sink_map.primary_position} (not a sink)"
        handles.append(Line2D([], [], color=COLORS["primary"], linestyle=":", label=label))
    label = "ordinary: median, 5-95 %"
    handles.append(Line2D([], [], color=COLORS["ordinary"], linewidth=2, label=label))
    if sink_map.secondary:
        handles.append(Patch(color=ALIVE, label="secondary alive"))
    return handles


def _positions(sink_map: SinkMap, kind: str) -> list[int]:
    return sorted({sink.position for sink in sink_map.sinks if sink.kind == kind})


def _draw_curves(axes: Axes, sink_map: SinkMap, values: np.ndarray, *, shift: int) -> None:
    """Shading, band and curves of values [layer, token]."""
    n_layers = values.shape[0]
    layers = np.arange(n_layers)
    alive = alive_spans(layer for sink in sink_map.secondary for layer in sink.layers)
    for start, end in alive:
        first, last = start + shift - 0.5, min(end + shift, n_layers) - 0.5
        if first < last:
            axes.axvspan(first, last, color=ALIVE, linewidth=0, zorder=0)
    _draw_ordinary(axes, sink_map, values)
    for kind in ("noise", "secondary", "primary"):
        own = _positions(sink_map, kind)
        for position in own:
            axes.plot(
                layers,
                values[:, position],
                color=COLORS[kind],
                linewidth=1.6 if kind == "primary" else 0.8,
                alpha=max(0.3, min(1.0, 6 / len(own))) if kind != "primary" else 1.0,
                gid=f"{kind}-{position}",
            )
    if not sink_map.primary:
        color = COLORS["primary"]
        axes.plot(layers, values[:, sink_map.primary_position], color=color, linestyle=":")
    axes.set(xlim=(-0.5, n_layers - 0.5), xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def _draw_ordinary(axes: Axes, sink_map: SinkMap, values: np.ndarray) -> None:
    """Median and 5-95 % band of the ordinary tokens."""
    rest = values[:, ordinary_tokens(sink_map).numpy()]
    layers = np.flatnonzero(~np.isnan(rest).all(axis=1))  # some have no attention
    rest = rest[layers][:, ~np.isnan(rest[layers]).any(axis=0)]
    if rest.size == 0:
        return
    low, middle, high = np.quantile(rest, (0.05, 0.5, 0.95), axis=1)
    color = COLORS["ordinary"]
    axes.fill_between(layers, low, high, color=color, alpha=0.3, linewidth=0)
    axes.plot(layers, middle, color=color, linewidth=1.0, gid="ordinary")


def _short(value: float, _: object = None) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _share(value: float, _: object = None) -> str:
    """A share without its leading zero; shares too small for a short label have none."""
    return f"{value:g}".lstrip("0") if value > 9e-4 else ""


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().float().cpu().numpy()
    return array
