"""The stages of the writer's MLP as a picture: where a sink becomes like the primary.

Left, the cosine of each stage with the primary's: one line for each sink, a gray band from the
tenth to the ninetieth percentile of ordinary tokens. Diamonds compare with the primary in the layer
where the primary itself emerges. Right, the norms of the same stages, because a cosine says little
where the norm is small.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from secondary_sinks.analyses.mlp_records import counted_kinds
from secondary_sinks.analyses.mlp_stage_alignment import MlpStages
from secondary_sinks.plots.style import (
    COLORS,
    add_legend,
    add_panel,
    check_panel,
    mlp_names,
    new_figure,
    styled,
)

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.55, 0.62, 0.65, 0.7, 0.15  # inches
_HEIGHT = 1.7
_DIAMOND: dict[str, Any] = {
    "marker": "D",
    "markersize": 3,
    "markerfacecolor": "none",
    "linestyle": "none",
    "color": COLORS["primary"],
}


def plot_mlp_stages(stages: MlpStages, *, panel: float = 2.6) -> Figure:
    """Cosines and norms by stage, sinks against ordinary tokens.

    Args:
        stages: of one text's sinks.
        panel: width of a panel in inches.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    check_panel(panel)
    width = _LEFT + 2 * panel + _GAP + _RIGHT
    with styled():
        figure = new_figure(width, _TOP + _HEIGHT + _BOTTOM)
        cosines = add_panel(figure, _LEFT, _TOP, panel, _HEIGHT)
        norms = add_panel(figure, _LEFT + panel + _GAP, _TOP, panel, _HEIGHT)
        _draw(cosines, stages, "cosine")
        _draw_emergence(cosines, stages)
        cosines.set_title("cosine with the primary's stage")
        cosines.axhline(0, color="black", linewidth=0.4, zorder=0)
        cosines.set_ylim(min(-0.05, *cosines.get_ylim()), 1.05)
        _draw(norms, stages, "norm")
        norms.set_title("norm")
        norms.set_yscale("log")
        norms.yaxis.set_major_locator(LogLocator(numticks=6))
        norms.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norms.yaxis.set_minor_formatter(NullFormatter())
        primary = stages.primary_norm.nanmedian(dim=0).values.numpy()
        norms.plot(range(len(primary)), primary, color=COLORS["primary"], gid="primary")
        _draw_legend(figure, stages)
    return figure


def _draw(axes: Axes, stages: MlpStages, what: Literal["cosine", "norm"]) -> None:
    places = np.arange(len(stages.stages))
    middle, low, high = stages.ordinary_band(of=what)
    color = COLORS["ordinary"]
    axes.fill_between(places, low, high, color=color, alpha=0.3, linewidth=0)
    axes.plot(places, middle, color=color, gid="ordinary")
    values = stages.cosine if what == "cosine" else stages.norm
    for line in values.numpy():
        axes.plot(
            places,
            line,
            color=COLORS["secondary"],
            linewidth=0.8,
            marker="o",
            markersize=2,
            alpha=max(0.25, min(1.0, 6 / len(values))),
            gid="sink",
        )
    axes.set_label(what)
    axes.set_xticks(places, stages.stages, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.3, len(places) - 0.7)


def _draw_emergence(axes: Axes, stages: MlpStages) -> None:
    for number, values in enumerate(stages.emergence_cosine.T):
        known = values[~values.isnan()].numpy()
        place = np.full(len(known), number + 0.14)
        axes.plot(place, known, markeredgewidth=0.7, gid="emergence", **_DIAMOND)


def _draw_legend(figure: Figure, stages: MlpStages) -> None:
    emergence = sorted({sink.emergence for sink in stages.sinks})[:3]
    tokens = counted_kinds([sink.kind for sink in stages.sinks])
    handles = [
        Line2D(
            [],
            [],
            color=COLORS["secondary"],
            marker="o",
            markersize=2,
            label=f"{tokens}, {mlp_names(sink.writer for sink in stages.sinks)}",
        ),
        Line2D([], [], color=COLORS["primary"], label="primary"),
        Line2D([], [], label=f"with primary in layer {', '.join(map(str, emergence))}", **_DIAMOND),
        Patch(color=COLORS["ordinary"], alpha=0.5, label="ordinary, 10-90 %"),
    ]
    add_legend(figure, handles, _LEFT, ncols=4 if figure.get_size_inches()[0] >= 6 else 2)
