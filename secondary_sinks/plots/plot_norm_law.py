"""The norm law as a picture: attention drawn and lifetime over the norm that was written.

Three panels over the written norm, one point per sink: the sink score; the sink score with the
text's factor replaced by the mean factor (so that texts of different length compare), with the
fitted law; and the lifetime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from secondary_sinks.analyses.norm_law import NormLaw, NormRelation, Written
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, SMALL, add_panel, new_figure, styled
from secondary_sinks.statistics import Correlation

_LEFT, _TOP, _BOTTOM, _GAP, _RIGHT = 0.65, 0.45, 0.5, 0.75, 0.15  # inches


def plot_norm_law(
    law: NormLaw, *, written: Written = "written_norm", panel: float = 1.75
) -> Figure:
    """Score and lifetime over what was written.

    Args:
        law: the sinks of one or many texts.
        written: the measure on the horizontal axis.
        panel: width of a panel in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `panel` that is not above 0, or no such measure.
    """
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")
    if written not in ("written_norm", "written_length"):
        raise InputError(f"no measure {written!r}; use 'written_norm' or 'written_length'")
    score, lifetime = law.relation("score", written), law.relation("lifetime", written)
    x = getattr(law, written).numpy()
    height = 0.9 * panel
    with styled():
        figure = new_figure(_LEFT + 3 * panel + 2 * _GAP + _RIGHT, _TOP + height + _BOTTOM)
        panels = [
            add_panel(figure, _LEFT + number * (panel + _GAP), _TOP, panel, height)
            for number in range(3)
        ]
        for axes, name in zip(panels, ("score", "within", "lifetime"), strict=True):
            axes.set_label(name)
            axes.set_xlabel(written.replace("_", " "))
        _points(panels[0], x, law.score.numpy())
        _finish(panels[0], "sink score", f"all texts: {_rho(score, 'pooled')}")
        _draw_law(panels[1], x, score)
        _finish(
            panels[1], "score, text factor removed", f"within texts: {_rho(score, 'within_texts')}"
        )
        _points(panels[2], x, law.lifetime.numpy())
        _finish(panels[2], "lifetime (layers)", f"within texts: {_rho(lifetime, 'within_texts')}")
        panels[2].set_yscale("linear")
        panels[2].yaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[2].set_ylim(bottom=0)
    return figure


def _points(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    look: dict[str, Any] = {"markersize": 3, "alpha": 0.7, "markeredgewidth": 0}
    axes.plot(x, y, "o", color=COLORS["secondary"], gid="sinks", **look)


def _draw_law(axes: Axes, x: np.ndarray, relation: NormRelation) -> None:
    fit = relation.law
    if np.isnan(fit.exponent):
        axes.text(
            0.5, 0.5, "no law to fit", ha="center", color=COLORS["ordinary"],
            transform=axes.transAxes,
        )  # fmt: skip
        return
    positive = x > 0
    predicted = fit.factor * x[positive] ** fit.exponent
    _points(axes, x[positive], predicted * np.exp(fit.residual.numpy()[positive]))
    ends = np.array([x[positive].min(), x[positive].max()])
    axes.plot(ends, fit.factor * ends**fit.exponent, color="black", linewidth=0.9, gid="law")
    axes.text(
        0.04,
        0.96,
        f"exponent {fit.exponent:.2f}\nexplains {fit.explained:.0%}",
        transform=axes.transAxes,
        va="top",
        fontsize=SMALL,
    )


def _finish(axes: Axes, label: str, title: str) -> None:
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=SMALL)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _rho(relation: NormRelation, name: str) -> str:
    correlation: Correlation = getattr(relation, name)
    if np.isnan(correlation.rho):
        return "no correlation"
    rho = f"rho {correlation.rho:.2f}"
    if np.isnan(correlation.low):
        return rho
    return f"{rho}\n95 % interval {correlation.low:.2f} to {correlation.high:.2f}"
