"""Figure: which tokens each of four measures names, and the entropy of attention by layer.

Above, a column for every token that some measure names and a row for each measure: blue where the
map has a primary sink, orange where it has a secondary one, else gray. Below, the entropy of the
attention of each layer over that of uniform attention: the mean over heads, and the range that
holds nine in ten of them; shaded layers see secondary sinks.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.other_measures import MEASURES, OtherMeasures
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import (
    ALIVE,
    COLORS,
    SMALL,
    add_panel,
    alive_spans,
    new_figure,
    styled,
    text_width,
    visible,
)

_LEFT, _TOP, _BOTTOM, _RIGHT = 0.85, 0.35, 0.5, 0.2  # inches
_CELL, _LONGEST, _CURVES = 0.145, 10, 1.4
_NAMES = {"gu": "Gu et al."}


def plot_other_measures(measures: OtherMeasures, *, n_tokens: int = 50) -> Figure:
    """Which tokens are named, and the entropy of attention.

    Args:
        measures: result of `other_measures`.
        n_tokens: how many named tokens are shown, at most: those that most measures name first.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: `n_tokens` below 1.
    """
    if n_tokens < 1:
        raise InputError(f"n_tokens is {n_tokens}; it must be 1 or more")
    n_naming = (measures.named & measures.compared).sum(dim=0)
    n_named = int((n_naming > 0).sum())
    order = torch.argsort(n_naming, descending=True, stable=True)
    shown = sorted(order[: min(n_tokens, n_named)].tolist())
    labels = [f"{visible(measures.token_strings[t], limit=_LONGEST)} {t}" for t in shown]
    width = max(len(shown) * _CELL, 3.6)
    rows = len(MEASURES) * 0.2
    under = 0.15 + max(map(text_width, labels), default=0.3)
    height = _TOP + rows + under + 0.3 + _CURVES + _BOTTOM
    with styled():
        figure = new_figure(_LEFT + width + _RIGHT, height)
        dots = add_panel(figure, _LEFT, _TOP, max(len(shown), 1) * _CELL, rows)
        curves = add_panel(figure, _LEFT, _TOP + rows + under + 0.3, width, _CURVES)
        _draw_dots(dots, measures, shown, labels)
        some = f"{len(shown)} of {n_named} " if n_named > len(shown) else ""
        dots.set_title(f"{some}named tokens", fontsize=SMALL)
        _draw_entropy(curves, measures)
    return figure


def _draw_dots(axes: Axes, measures: OtherMeasures, shown: list[int], labels: list[str]) -> None:
    axes.set_label("named")
    for row in range(len(MEASURES)):
        for column, token in enumerate(shown):
            if not measures.named[row, token]:
                continue
            kind = "ordinary"
            if measures.named[0, token]:
                kind = "secondary" if measures.secondary[token] else "primary"
            axes.plot(column, row, "o", color=COLORS[kind], markersize=4, gid=MEASURES[row])
    axes.set_yticks(range(len(MEASURES)), [_NAMES.get(name, name) for name in MEASURES])
    axes.set_xticks(range(len(shown)), labels, rotation=90, fontsize=SMALL, parse_math=False)
    for label in axes.get_xticklabels():
        label.set_fontfamily("DejaVu Sans Mono")
    axes.set_xlim(-0.5, max(len(shown), 1) - 0.5)
    axes.set_ylim(len(MEASURES) - 0.5, -0.5)
    axes.tick_params(length=0)


def _draw_entropy(axes: Axes, measures: OtherMeasures) -> None:
    axes.set_label("entropy")
    value = measures.entropy.normalized_by_head.numpy()
    layers = np.arange(len(value))
    for start, end in alive_spans(measures.live_layers):
        axes.axvspan(start - 0.5, end - 0.5, color=ALIVE, linewidth=0, zorder=0)
    low, high = np.nanquantile(value, [0.05, 0.95], axis=1)
    axes.fill_between(layers, low, high, color=COLORS["ordinary"], alpha=0.3, linewidth=0)
    axes.plot(layers, np.nanmean(value, axis=1), color="black", gid="entropy")
    axes.set(xlabel="layer", ylabel="entropy / uniform", ylim=(0, 1), xlim=(-0.5, len(value) - 0.5))
    axes.set_title("entropy of attention, mean and range over heads", fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
