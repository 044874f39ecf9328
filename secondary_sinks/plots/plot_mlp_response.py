"""An MLP's response as a picture: what it writes along each component of its inputs.

A column for each principal component: above, the norm of what the MLP writes for `alpha` times the
component; below, its cosine with the sink direction. Points are the tokens themselves, at their
projection on the component, with what the MLP wrote for their whole input: where the curve meets
the orange points, the component alone explains the write.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.mlp_records import counted_kinds
from secondary_sinks.analyses.mlp_response import MlpResponse
from secondary_sinks.plots.style import (
    COLORS,
    add_legend,
    add_panel,
    check_panel,
    new_figure,
    styled,
)

_LEFT, _TOP, _BOTTOM, _GAP, _ROW_GAP, _RIGHT = 0.6, 0.75, 0.5, 0.16, 0.16, 0.15  # inches
_HEIGHT = 1.1
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
    check_panel(panel)
    n = min(len(response.components), _MAX_COLUMNS)
    width = max(_LEFT + n * panel + (n - 1) * _GAP + _RIGHT, 4.2)
    norms = np.concatenate([response.norm[:n].flatten().numpy(), response.token_norm.numpy()])
    top = float(np.nanmax(norms, initial=0.0)) or 1.0
    with styled():
        figure = new_figure(width, _TOP + 2 * _HEIGHT + _ROW_GAP + _BOTTOM)
        for column in range(n):
            left = _LEFT + column * (panel + _GAP)
            norm = add_panel(figure, left, _TOP, panel, _HEIGHT)
            _draw(norm, response, "norm", column)
            norm.set_ylim(-0.04 * top, 1.08 * top)
            norm.set_xticklabels([])
            norm.set_title(
                f"PC {column + 1}: {response.variance_ratio[column]:.0%}\n"
                f"AUC {response.separation[column]:.2f}"
            )
            cosine = add_panel(figure, left, _TOP + _HEIGHT + _ROW_GAP, panel, _HEIGHT)
            _draw(cosine, response, "cosine", column)
            cosine.set_ylim(-1.08, 1.08)
            cosine.axhline(0, color="black", linewidth=0.4, zorder=0)
            cosine.set_xlabel("alpha")
            for axes, label in ((norm, "norm of output"), (cosine, "cosine")):
                if column == 0:
                    axes.set_ylabel(label)
                else:
                    axes.set_yticklabels([])
        _draw_legend(figure, response)
    return figure


def _draw(axes: Axes, response: MlpResponse, what: str, column: int) -> None:
    """The tokens as points, the response to multiples of the component as a curve."""
    selected = response.selected.numpy()
    projection = response.projection[:, column].numpy()
    values = (response.norm if what == "norm" else response.cosine)[column]
    at_tokens = (response.token_norm if what == "norm" else response.token_cosine).numpy()
    axes.set_label(f"{what} {column + 1}")
    for kind, shown in (("ordinary", ~selected), ("secondary", selected)):
        axes.plot(
            projection[shown],
            at_tokens[shown],
            color=COLORS[kind],
            marker="o",
            markersize=2,
            markeredgewidth=0,
            linestyle="none",
            alpha=max(0.3, min(0.9, 30 / max(1, int(shown.sum())))),
            gid=kind,
        )
    axes.plot(response.alphas[column], values, color=_CURVE, gid="curve")
    axes.xaxis.set_major_locator(MaxNLocator(3))


def _draw_legend(figure: Figure, response: MlpResponse) -> None:
    selected = counted_kinds([kind for kind in response.kinds if kind != "ordinary"])
    n_ordinary = response.kinds.count("ordinary")
    handles = [Line2D([], [], color=_CURVE, label=f"MLP {response.writer} on alpha times PC")]
    for kind, label in (("secondary", selected), ("ordinary", f"{n_ordinary} ordinary")):
        color = COLORS[kind]
        handles.append(
            Line2D([], [], color=color, label=label, marker="o", markersize=3, linestyle="none")
        )
    add_legend(figure, handles, _LEFT, ncols=3)
