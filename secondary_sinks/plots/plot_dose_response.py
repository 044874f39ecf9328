"""What becomes of a sink, over the norm that its writer writes.

Four panels over the written norm: attention drawn, norm of the residual, alignment, lifetime. The
dashed line is the clean run. Crosses in the first panel are total scores, where they were measured:
they lie on the curve as far as attention follows the path through the token's own keys.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.dose_response import DoseResponse
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, add_panel, new_figure, styled, visible

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.6, 0.4, 0.5, 0.6, 0.15  # inches


def plot_dose_response(curve: DoseResponse, *, panel: float = 1.6) -> Figure:
    """Draw score, norm, alignment and lifetime over the written norm.

    Norm and alignment are those after the onset layer; the score is the mean over heads and the
    layers that show the clean sink's life.

    Args:
        curve: the doses of one token.
        panel: width of a panel in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    if not panel > 0:
        raise InputError(f"panel must be above 0 inches, got {panel}")
    frame = curve.to_frame().sort_values("written_norm")
    height = 0.85 * panel
    panels = (
        ("direct_score", "sink score"),
        ("norm", "norm of the residual"),
        ("alignment", "alignment (cosine)"),
        ("lifetime", "lifetime (layers)"),
    )
    with styled():
        width = _LEFT + len(panels) * panel + (len(panels) - 1) * _GAP + _RIGHT
        figure = new_figure(width, _TOP + height + _BOTTOM)
        for number, (column, label) in enumerate(panels):
            axes = add_panel(figure, _LEFT + number * (panel + _GAP), _TOP, panel, height)
            axes.set_label(column)
            axes.plot(
                frame["written_norm"],
                frame[column],
                color=COLORS["secondary"],
                marker="o",
                markersize=2.5,
            )
            _finish(axes, curve, label)
            if column == "direct_score" and frame["total_score"].notna().any():
                axes.plot(
                    frame["written_norm"],
                    frame["total_score"],
                    color=COLORS["primary"],
                    linestyle="none",
                    marker="x",
                    label="total",
                )
                axes.legend(loc="best")
        title = (
            f"{visible(curve.token, limit=12)} at {curve.position}, output of MLP {curve.writer}"
        )
        if curve.kind == "chosen":
            title += ", not a sink"
        figure.text(_LEFT / width, 1 - 0.2 / (_TOP + height + _BOTTOM), title, parse_math=False)
    return figure


def _finish(axes: Axes, curve: DoseResponse, label: str) -> None:
    axes.set_xlabel("written norm")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=label.startswith("lifetime")))
    scaled = curve.scales.abs() > 0
    if scaled.any():
        clean = float((curve.written_norm[scaled] / curve.scales[scaled].abs()).mean())
        color = COLORS["ordinary"]
        axes.axvline(clean, color=color, linestyle="--", linewidth=0.8, gid="clean")
