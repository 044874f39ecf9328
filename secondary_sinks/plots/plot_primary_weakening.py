"""Figure of the primary's weakening: its score by layer, and against the secondary sinks.

Left, the primary's sink score by layer, one line for each text, colored by the secondary sinks that
live; middle, the points without the mean of their layer and text, with the slope; right, where
removals were given, the change of the primary's score by layer without the secondary sinks.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.primary_weakening import (
    STRENGTHS,
    PrimaryWeakening,
    Strength,
    remainders,
)
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, SMALL, add_panel, new_figure, styled

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.65, 0.45, 0.62, 0.75, 0.15  # inches
_BAR = 0.55


def plot_primary_weakening(
    weakening: PrimaryWeakening, *, strength: Strength = "number", panel: float = 1.9
) -> Figure:
    """The primary's score by layer and against the secondary sinks that live.

    Args:
        weakening: of one or many texts.
        strength: by which measure of the secondary sinks.
        panel: width of a panel in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `panel` that is not above 0, or an unknown measure.
    """
    if not panel > 0:
        raise InputError(f"panel must be above 0 inches, got {panel}")
    if strength not in STRENGTHS:
        raise InputError(f"strength={strength!r}; use {', '.join(STRENGTHS)}")
    n_panels = 3 if weakening.causal else 2
    height = 0.85 * panel
    width = _LEFT + n_panels * panel + (n_panels - 1) * _GAP + _BAR + _RIGHT
    with styled():
        figure = new_figure(width, _TOP + height + _BOTTOM)
        lines = add_panel(figure, _LEFT, _TOP, panel, height)
        bar = add_panel(figure, _LEFT + panel + 0.06, _TOP, 0.08, height)
        points = add_panel(figure, _LEFT + panel + _BAR + _GAP, _TOP, panel, height)
        _draw_lines(lines, bar, weakening, strength)
        _draw_points(points, weakening, strength)
        if weakening.causal:
            left = _LEFT + 2 * (panel + _GAP) + _BAR
            _draw_causal(add_panel(figure, left, _TOP, panel, height), weakening)
    return figure


def _draw_lines(axes: Axes, bar: Axes, weakening: PrimaryWeakening, strength: Strength) -> None:
    axes.set_label("layers")
    values = getattr(weakening, strength).numpy()
    colors = LinearSegmentedColormap.from_list("live", [COLORS["primary"], COLORS["secondary"]])
    scale = Normalize(0, float(np.nanmax(values, initial=0.0)) or 1.0)
    primary = weakening.primary.masked_fill(~weakening.counted, np.nan).numpy()
    layers = np.arange(primary.shape[1])
    for row, live in zip(primary, values, strict=True):
        axes.plot(layers, row, color=COLORS["ordinary"], linewidth=0.5, alpha=0.6)
        axes.scatter(layers, row, c=live, cmap=colors, norm=scale, s=6, linewidth=0, zorder=3)
    axes.set(xlabel="layer", ylabel="sink score of the primary")
    axes.set_title("each text, mean over heads", fontsize=SMALL)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.figure.colorbar(ScalarMappable(scale, colors), cax=bar)
    bar.yaxis.set_major_locator(MaxNLocator(4, integer=strength == "number"))
    bar.set_ylabel(_NAMES[strength], fontsize=SMALL)


_NAMES: dict[Strength, str] = {
    "number": "live secondary sinks",
    "norm": "their summed norm ratio",
    "score": "their summed sink score",
}


def _draw_points(axes: Axes, weakening: PrimaryWeakening, strength: Strength) -> None:
    axes.set_label("remainders")
    relation = weakening.relation(strength)
    x, y = remainders(weakening, strength)
    axes.plot(x, y, "o", color=COLORS["ordinary"], markersize=2.2, alpha=0.6, markeredgewidth=0)
    if not np.isnan(relation.slope) and len(x):
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, relation.slope * ends, color="black", linewidth=0.9, gid="slope")
    rho = relation.adjusted
    interval = "" if np.isnan(rho.low) else f"\n95 % interval {rho.low:.2f} to {rho.high:.2f}"
    title = "nothing to compare" if np.isnan(rho.rho) else f"correlation {rho.rho:.2f}{interval}"
    axes.set_title(title, fontsize=SMALL)
    axes.set(xlabel=f"{_NAMES[strength]},\nbeyond text and layer", ylabel="score, beyond the same")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))


def _draw_causal(axes: Axes, weakening: PrimaryWeakening) -> None:
    axes.set_label("removal")
    causal = weakening.causal
    if causal is None:
        return
    layers = np.arange(causal.by_layer.shape[1])
    for row in causal.by_layer.numpy():
        axes.plot(layers, row, color=COLORS["secondary"], linewidth=0.8, alpha=0.7, gid="removal")
    axes.axhline(0, color=COLORS["primary"], linewidth=0.8)
    known = not np.isnan(causal.low)
    interval = f"\n95 % interval {causal.low:.3f} to {causal.high:.3f}" if known else ""
    axes.set_title(f"effect of removal: {causal.mean:+.3f}{interval}", fontsize=SMALL)
    axes.set(xlabel="layer", ylabel="change of the score")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
