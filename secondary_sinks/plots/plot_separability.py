"""Separability as a picture: from which layer on future sinks are separable, and their vectors.

One row per site. Left, the probe's AUC by layer, against the same token (orange) and against
ordinary tokens (gray), with the 95 % quantile of shuffled labels of the former (dashed); right, the
vectors of the last layers up to the onset in two dimensions: future sinks orange, the same tokens
blue, ordinary tokens gray.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.separability import ORDINARY, SAME_TOKEN, SINK, Separability
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, SMALL, add_panel, new_figure, styled

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.75, 0.6, 0.5, 0.35, 0.15  # inches
_KINDS = {ORDINARY: COLORS["ordinary"], SAME_TOKEN: COLORS["primary"], SINK: COLORS["secondary"]}


def plot_separability(result: Separability, *, n_layers: int = 4, panel: float = 1.25) -> Figure:
    """AUC by layer and embeddings, one row per site.

    Args:
        result: of the sinks of one onset.
        n_layers: how many layers up to the onset are shown in two dimensions.
        panel: side of an embedding in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `panel` or `n_layers` that is not above 0.
    """
    if not panel > 0 or n_layers < 1:
        raise InputError(f"panel is {panel} inches, n_layers {n_layers}; both must be above 0")
    layers = range(max(0, result.onset + 1 - n_layers), result.onset + 1)
    wide, step = 1.5 * panel, panel + _GAP
    width = _LEFT + wide + _GAP + len(layers) * (panel + 0.12) + _RIGHT
    height = _TOP + len(result.sites) * step - _GAP + _BOTTOM
    with styled():
        figure = new_figure(width, height)
        for row, site in enumerate(result.sites):
            top = _TOP + row * step
            curves = add_panel(figure, _LEFT, top, wide, panel)
            last = row == len(result.sites) - 1
            _draw_curves(curves, result, row, with_label=last)
            for column, layer in enumerate(layers):
                left = _LEFT + wide + _GAP + column * (panel + 0.12)
                axes = add_panel(figure, left, top, panel, panel)
                axes.set_label(f"{site} {layer}")
                _draw_embedding(axes, result, row, layer)
                if row == 0:
                    axes.set_title(f"layer {layer}", fontsize=SMALL)
        _draw_legend(figure, result)
    return figure


def _draw_curves(axes: Axes, result: Separability, row: int, *, with_label: bool) -> None:
    axes.set_label(result.sites[row])
    layers = np.arange(result.onset + 1)
    same, ordinary = (
        contrast.auc[row].numpy() for contrast in (result.same_token, result.ordinary)
    )
    chance = result.same_token.chance_high[row].numpy()
    axes.plot(layers, ordinary, "o-", color=COLORS["ordinary"], markersize=2.5)
    axes.plot(layers, same, "o-", color=COLORS["secondary"], markersize=2.5, gid="same_token")
    axes.plot(layers, chance, "--", color="black", linewidth=0.7, gid="chance")
    axes.set_ylim(0.3, 1.05)
    axes.set_xlim(-0.3, result.onset + 0.3)
    axes.set_ylabel(f"{result.sites[row]}\nAUC of the probe")
    if with_label:
        axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if np.isnan(same).all() and np.isnan(ordinary).all():
        axes.text(0.5, 0.5, "too few texts", ha="center", color=COLORS["ordinary"],
                  transform=axes.transAxes)  # fmt: skip


def _draw_embedding(axes: Axes, result: Separability, row: int, layer: int) -> None:
    points = result.embedding[row, layer].numpy()
    for kind, color in _KINDS.items():
        x, y = points[(result.kind == kind).numpy()].T
        axes.plot(x, y, "o", color=color, markersize=2.6, alpha=0.7, markeredgewidth=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _draw_legend(figure: Figure, result: Separability) -> None:
    width, height = figure.get_size_inches()
    names = {SINK: "future sinks", SAME_TOKEN: "same token, not a sink", ORDINARY: "ordinary"}
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
    handles = [
        Line2D(
            [], [], color=_KINDS[kind], label=f"{int((result.kind == kind).sum())} {name}", **dot
        )
        for kind, name in names.items()
    ]
    handles.append(
        Line2D([], [], color="black", linestyle="--", linewidth=0.7, label="shuffled labels, 95 %")
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1 - 0.12 / height),
        ncols=4,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
    )
