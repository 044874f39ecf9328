"""Figure of a removal: the primary sink with and without the other sinks.

Above, the primary's sink score by layer: in the clean text, after the edit, and in the controls (a
gray band from the lowest to the highest). Shaded layers are those whose attention sees the sinks
that were to be removed. Below, the change head by head. At the right, the loss of every run.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.remove_sinks import SinkRemoval
from secondary_sinks.plots.style import (
    ALIVE,
    COLORS,
    SMALL,
    add_panel,
    alive_spans,
    new_figure,
    styled,
)
from secondary_sinks.result import counted

_LEFT, _TOP, _CURVES, _GAP = 0.6, 0.52, 1.5, 0.62  # inches
_HEAD_ROW = 0.11


def plot_sink_removal(removal: SinkRemoval, *, width: float = 6.5) -> Figure:
    """Draw a removal (or its reverse), `width` inches wide."""
    n_heads = removal.clean_score.shape[1]
    map_height = min(2.6, max(0.8, n_heads * _HEAD_ROW))
    height = _TOP + _CURVES + _GAP + map_height + 0.5
    losses_width = 1.15
    panel = width - _LEFT - losses_width - 1.05
    with styled():
        figure = new_figure(width, height)
        curves = add_panel(figure, _LEFT, _TOP, panel, _CURVES)
        heads = add_panel(figure, _LEFT, _TOP + _CURVES + _GAP, panel, map_height)
        bar = add_panel(figure, _LEFT + panel + 0.08, _TOP + _CURVES + _GAP, 0.09, map_height)
        losses = add_panel(figure, width - losses_width - 0.1, _TOP, losses_width, _CURVES)
        _draw_curves(curves, removal)
        _draw_heads(heads, bar, removal)
        _draw_losses(losses, removal)
        _draw_legend(figure, removal)
    return figure


def _draw_curves(axes: Axes, removal: SinkRemoval) -> None:
    frame = removal.to_frame()
    axes.set_label("primary")
    for start, end in alive_spans(removal.live_layers):
        axes.axvspan(start - 0.5, end - 0.5, color=ALIVE, linewidth=0, zorder=0)
    if removal.control_where:
        axes.fill_between(
            frame["layer"],
            frame["control_low"],
            frame["control_high"],
            color=COLORS["ordinary"],
            alpha=0.4,
            linewidth=2.5,  # controls that change nothing are a line, which must be seen
        )
    axes.plot(frame["layer"], frame["clean"], color=COLORS["primary"], gid="clean")
    axes.plot(frame["layer"], frame["edited"], color=COLORS["secondary"], gid="edited")
    axes.set(xlim=(-0.5, len(frame) - 0.5), ylabel="sink score of the primary")
    axes.set_ylim(bottom=0)
    axes.set_title("attention to the primary, mean over heads")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def _draw_heads(axes: Axes, bar: Axes, removal: SinkRemoval) -> None:
    frame = removal.heads()
    change = frame.pivot(index="head", columns="layer", values="change").to_numpy(dtype=float)
    limit = float(np.nanmax(np.abs(change), initial=0.0)) or 1.0
    axes.set_label("heads")
    image = axes.imshow(
        change,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    axes.set(xlabel="layer", ylabel="head")
    axes.set_title("change of attention to the primary, head by head")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.figure.colorbar(image, cax=bar)
    bar.yaxis.set_major_locator(MaxNLocator(4))
    bar.tick_params(labelsize=SMALL)


def _draw_losses(axes: Axes, removal: SinkRemoval) -> None:
    axes.set_label("losses")
    before = float(removal.clean_loss.mean())
    after = float(removal.edited_loss.mean())
    controls = removal.control_loss.mean(dim=1).tolist()
    axes.axhline(0, color=COLORS["primary"], linewidth=1.0)
    axes.plot([0], [after - before], "o", color=COLORS["secondary"], markersize=5, gid="edited")
    if controls:
        spread = np.linspace(0.8, 1.2, len(controls)) if len(controls) > 1 else [1.0]
        shown = [value - before for value in controls]
        axes.plot(spread, shown, "o", color=COLORS["ordinary"], markersize=3.5, gid="controls")
    axes.set_xlim(-0.5, 1.5)
    axes.set_xticks([0, 1], ["edit", "controls"])
    axes.set_title("change of loss, nats")


def _draw_legend(figure: Figure, removal: SinkRemoval) -> None:
    width, height = figure.get_size_inches()
    edited = f"{counted(len(removal.where), 'MLP output')} edited"
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=COLORS["primary"], label="clean"),
        Line2D([], [], color=COLORS["secondary"], label=edited),
    ]
    if removal.control_where:
        label = f"range of {counted(len(removal.control_where), 'control')}"
        handles.append(Patch(color=COLORS["ordinary"], alpha=0.4, label=label))
    handles.append(Patch(color=ALIVE, label="layers that see the sinks"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1 - 0.08 / height),
        ncols=len(handles),
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.4,
    )
