"""An MLP's response as a picture: what it writes along each component of its inputs.

A column for each principal component: above, the norm of what the MLP writes for `alpha` times the
component; below, its cosine with the sink direction. Points are the tokens themselves, at their
projection on the component, with what the MLP wrote for their whole input: where the curve meets
the orange points, the component alone explains the write.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.mlp_response import MlpResponse
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, add_panel, new_figure, styled

_LEFT, _TOP, _BOTTOM, _GAP, _ROW_GAP, _RIGHT = 0.6, 0.75, 0.5, 0.16, 0.16, 0.15  # inches
_CURVE = "#222222"
_MAX_COLUMNS = 8


def plot_mlp_response(response: MlpResponse, *, panel: float = 1.1) -> Figure:
    """Norm and cosine over alpha, a column for each component (at most 8).

    Args:
        response: of one MLP.
        panel: width of a panel in inches.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")
    n = min(len(response.components), _MAX_COLUMNS)
    height = 1.1
    width = max(_LEFT + n * panel + (n - 1) * _GAP + _RIGHT, 4.2)
    rows = (
        ("norm", response.norm, response.token_norm),
        ("cosine", response.cosine, response.token_cosine),
    )
    with styled():
        figure = new_figure(width, _TOP + 2 * height + _ROW_GAP + _BOTTOM)
        for row, (name, curves, tokens) in enumerate(rows):
            shown = np.concatenate([curves[:n].flatten().numpy(), tokens.numpy()])
            top = float(np.nanmax(shown, initial=0.0)) or 1.0
            for column in range(n):
                place = (_LEFT + column * (panel + _GAP), _TOP + row * (height + _ROW_GAP))
                axes = add_panel(figure, *place, panel, height)
                axes.set_label(f"{name} {column + 1}")
                _draw_tokens(axes, response, column, tokens.numpy())
                axes.plot(response.alphas[column], curves[column], color=_CURVE, gid="curve")
                axes.set_ylim((-1.08, 1.08) if name == "cosine" else (-0.04 * top, 1.08 * top))
                axes.xaxis.set_major_locator(MaxNLocator(3))
                if column == 0:
                    axes.set_ylabel("norm of output" if name == "norm" else "cosine")
                else:
                    axes.set_yticklabels([])
                if row == 0:
                    axes.set_xticklabels([])
                    axes.set_title(
                        f"PC {column + 1}: {response.variance_ratio[column]:.0%}\n"
                        f"AUC {response.separation[column]:.2f}"
                    )
                else:
                    axes.axhline(0, color="black", linewidth=0.4, zorder=0)
                    axes.set_xlabel("alpha")
        _draw_legend(figure, response)
    return figure


def _draw_tokens(axes: Axes, response: MlpResponse, column: int, values: np.ndarray) -> None:
    is_sink = response.is_sink.numpy()
    projection = response.projection[:, column].numpy()
    for kind, chosen in (("ordinary", ~is_sink), ("secondary", is_sink)):
        axes.plot(
            projection[chosen],
            values[chosen],
            color=COLORS[kind],
            marker="o",
            markersize=2,
            markeredgewidth=0,
            linestyle="none",
            alpha=max(0.3, min(0.9, 30 / max(1, int(chosen.sum())))),
            gid=kind,
        )


def _draw_legend(figure: Figure, response: MlpResponse) -> None:
    width, height = figure.get_size_inches()
    n = int(response.is_sink.sum())
    handles = [Line2D([], [], color=_CURVE, label=f"MLP {response.layer} on alpha times PC")]
    for kind, count in (("sinks", n), ("ordinary", len(response.is_sink) - n)):
        color = COLORS["secondary" if kind == "sinks" else kind]
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linestyle": "none"}
        handles.append(Line2D([], [], color=color, label=f"{count} {kind}", **style))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1 - 0.08 / height),
        ncols=3,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
    )
