"""The stages of the writer's MLP as a picture: where a sink becomes like the primary.

Left, the cosine of each stage with the primary's: one line a sink, a gray band from the tenth to
the ninetieth percentile of ordinary tokens. Diamonds compare with the primary in the layer where
the primary itself emerges. Right, the norms of the same stages: a cosine of something that hardly
has a length says little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from secondary_sinks.analyses.mlp_stage_alignment import MlpStages
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, add_panel, new_figure, styled

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.55, 0.62, 0.65, 0.7, 0.15  # inches


def plot_mlp_stages(found: MlpStages, *, panel: float = 2.6) -> Figure:
    """Cosines and norms by stage, sinks against ordinary tokens.

    Args:
        found: the stages of one text's sinks.
        panel: width of a panel in inches.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")
    height = 1.7
    width = _LEFT + 2 * panel + _GAP + _RIGHT
    with styled():
        figure = new_figure(width, _TOP + height + _BOTTOM)
        cosines = add_panel(figure, _LEFT, _TOP, panel, height)
        norms = add_panel(figure, _LEFT + panel + _GAP, _TOP, panel, height)
        _draw(cosines, found, found.cosine, found.ordinary)
        _draw_emergence(cosines, found)
        cosines.set_label("cosine")
        cosines.set_title("cosine with the primary's stage")
        cosines.axhline(0, color="black", linewidth=0.4, zorder=0)
        cosines.set_ylim(min(-0.05, *cosines.get_ylim()), 1.05)
        _draw(norms, found, found.norm, found.ordinary_norm)
        norms.set_label("norm")
        norms.set_title("norm")
        norms.set_yscale("log")
        norms.yaxis.set_major_locator(LogLocator(numticks=6))
        norms.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norms.yaxis.set_minor_formatter(NullFormatter())
        norms.plot(
            range(len(found.stages)),
            found.primary_norm.nanmedian(dim=0).values.numpy(),
            color=COLORS["primary"],
            gid="primary",
        )
        _draw_legend(figure, found)
    return figure


def _draw(axes: Axes, found: MlpStages, values: Tensor, ordinary: Tensor) -> None:
    places = np.arange(len(found.stages))
    pooled = ordinary.permute(1, 0, 2).flatten(1)
    low, middle, high = torch.nanquantile(pooled, torch.tensor([0.1, 0.5, 0.9]), dim=1).numpy()
    color = COLORS["ordinary"]
    axes.fill_between(places, low, high, color=color, alpha=0.3, linewidth=0)
    axes.plot(places, middle, color=color, gid="ordinary")
    alpha = max(0.25, min(1.0, 6 / len(values)))
    for line in values.numpy():
        axes.plot(
            places,
            line,
            color=COLORS["secondary"],
            linewidth=0.8,
            marker="o",
            markersize=2,
            alpha=alpha,
            gid="sink",
        )
    axes.set_xticks(places, found.stages, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.3, len(places) - 0.7)


def _draw_emergence(axes: Axes, found: MlpStages) -> None:
    for number in range(len(found.stages)):
        values = found.emergence_cosine[:, number]
        known = values[~values.isnan()].numpy()
        axes.plot(
            np.full(len(known), number + 0.14),
            known,
            color=COLORS["primary"],
            marker="D",
            markersize=3,
            markerfacecolor="none",
            markeredgewidth=0.7,
            linestyle="none",
            gid="emergence",
        )


def _draw_legend(figure: Figure, found: MlpStages) -> None:
    width, height = figure.get_size_inches()
    diamond: dict[str, Any] = {
        "marker": "D",
        "markersize": 3,
        "markerfacecolor": "none",
        "linestyle": "none",
    }
    layers = sorted({sink.emergence for sink in found.sinks})
    where = ", ".join(str(layer) for layer in layers[:3])
    count = len(found.sinks)
    handles: list[Line2D | Patch] = [
        Line2D(
            [],
            [],
            color=COLORS["secondary"],
            marker="o",
            markersize=2,
            label=f"{count} sink{'' if count == 1 else 's'}, {_writers(found)}",
        ),
        Line2D([], [], color=COLORS["primary"], label="primary"),
        Line2D([], [], color=COLORS["primary"], label=f"with primary in layer {where}", **diamond),
        Patch(color=COLORS["ordinary"], alpha=0.5, label="ordinary, 10-90 %"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1 - 0.08 / height),
        ncols=4 if width >= 6 else 2,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _writers(found: MlpStages) -> str:
    layers = sorted({sink.writer for sink in found.sinks})
    shown = ", ".join(str(layer) for layer in layers[:3])
    return f"MLP {shown}{' ...' if len(layers) > 3 else ''}"
