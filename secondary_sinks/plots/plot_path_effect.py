"""Figure of a path effect: what the receiver reads by layer, clean, without the path, without the
write."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.path_effect import MEASURES, PathEffect
from secondary_sinks.plots.style import COLORS, add_panel, new_figure, styled, visible


def plot_path_effect(path: PathEffect, *, width: float = 4.5) -> Figure:
    """Draw a path effect, `width` inches wide."""
    curves = (
        ("clean", "clean", COLORS["primary"], "-"),
        ("without_write", f"MLP {path.writer} edited", COLORS["secondary"], "-"),
        (
            "without_path",
            f"without the write in the {path.receiver} of this layer",
            "#009E73",
            "--",
        ),
    )
    with styled():
        figure = new_figure(width, 2.95)
        axes = add_panel(figure, 0.75, 0.85, width - 0.9, 1.6)
        axes.set_label("path")
        for name, label, color, style in curves:
            values = getattr(path, name).mean(dim=1).numpy()
            axes.plot(
                path.layers, values, color=color, linestyle=style, marker="o", ms=2.5, label=label
            )
        axes.set(xlabel="layer of the receiver", ylabel=MEASURES[path.receiver])
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        token = visible(path.token, limit=12)
        heading = f"MLP {path.writer} at token {path.position} ({token})"
        figure.text(0.1 / width, 1 - 0.2 / 2.95, heading, fontsize=8, weight="bold")
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(0.1 / width, 1 - 0.26 / 2.95),
            ncols=1 if width < 4 else 2,
            borderaxespad=0,
        )
    return figure
