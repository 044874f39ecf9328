"""Norm profiles as a picture: keys, values and residuals by layer, on logarithmic scales.

The primary is blue, each chosen sink a thin orange line, solid in the layers that show its life.
The gray band holds the middle nine tenths of the ordinary tokens, the gray line is their median.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from secondary_sinks.analyses.norm_profiles import PARTS, NormProfiles, Part
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, add_panel, new_figure, styled

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.65, 0.5, 0.5, 0.6, 0.15  # inches

_LABELS: dict[Part, str] = {
    "key": "norm of the key",
    "value": "norm of the value",
    "residual": "norm of the residual",
}


def plot_norm_profiles(profiles: NormProfiles, *, panel: float = 1.9) -> Figure:
    """Keys, values and residuals of one text.

    Args:
        profiles: the norms.
        panel: width of a panel in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")
    height = 0.85 * panel
    width = _LEFT + len(PARTS) * panel + (len(PARTS) - 1) * _GAP + _RIGHT
    with styled():
        figure = new_figure(width, _TOP + height + _BOTTOM)
        for number, part in enumerate(PARTS):
            axes = add_panel(figure, _LEFT + number * (panel + _GAP), _TOP, panel, height)
            axes.set_label(part)
            _draw(axes, profiles, part)
        _draw_legend(figure, profiles)
    return figure


def _draw(axes: Axes, profiles: NormProfiles, part: Part) -> None:
    curves = profiles.curves(part)
    layers = np.arange(len(curves.primary))
    low, median, high = curves.ordinary.numpy()
    gray, orange = COLORS["ordinary"], COLORS["secondary"]
    axes.fill_between(layers, low, high, color=gray, alpha=0.3, linewidth=0)
    axes.plot(layers, median, color=gray, gid="ordinary")
    for sink, norm in zip(profiles.sinks, curves.sinks.numpy(), strict=True):
        axes.plot(layers, norm, color=orange, linewidth=0.6, linestyle=":", alpha=0.8)
        shown = np.full(len(layers), np.nan)
        alive = profiles.shown_layers(sink, part)
        shown[alive] = norm[alive]
        axes.plot(layers, shown, color=orange, linewidth=0.8, alpha=0.8, gid="sink")
    axes.plot(layers, curves.primary.numpy(), color=COLORS["primary"], gid="primary")
    axes.set(xlabel="layer", ylabel=_LABELS[part], yscale="log", xlim=(-0.5, len(layers) - 0.5))
    bottom, top = axes.get_ylim()
    subs = (1.0,) if top / bottom > 200 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_legend(figure: Figure, profiles: NormProfiles) -> None:
    width, height = figure.get_size_inches()
    kinds = sorted({sink.kind for sink in profiles.sinks}) or ["secondary"]
    chosen = f"{len(profiles.sinks)} {' or '.join(kinds)}, while alive"
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=COLORS["primary"], label="primary"),
        Line2D([], [], color=COLORS["secondary"], label=chosen),
        Patch(color=COLORS["ordinary"], alpha=0.3, label="ordinary: median, 5 to 95 %"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1 - 0.12 / height),
        ncols=len(handles),
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.4,
    )
