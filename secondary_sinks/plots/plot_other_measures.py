"""Four measures as a picture: which tokens each names, and the entropy of attention by layer.

Above, a column for every token that some measure names, a row a measure: blue where the detection
says primary, orange where it says secondary, gray where it says neither. Below, the entropy of the
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
_NAMES = {"evidence": "evidence", "reference": "reference", "gu": "Gu et al.", "massive": "massive"}
_ALIVE = "#FBE6D8"


def plot_other_measures(found: OtherMeasures, *, n_tokens: int = 50) -> Figure:
    """Named tokens and entropy.

    Args:
        found: of one text.
        n_tokens: how many named tokens are shown, at most: those that most measures name first.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: `n_tokens` below 1.
    """
    if n_tokens < 1:
        raise InputError(f"n_tokens is {n_tokens}; it must be 1 or more")
    named = (found.named & found.compared).sum(dim=0)
    order = torch.argsort(named, descending=True, stable=True)[
        : min(n_tokens, int((named > 0).sum()))
    ]
    shown = sorted(order.tolist())
    labels = [f"{visible(found.token_strings[t], limit=_LONGEST)} {t}" for t in shown]
    width = max(len(shown) * _CELL, 3.6)
    rows = len(MEASURES) * 0.2
    under = 0.15 + max(map(text_width, labels), default=0.3)
    height = _TOP + rows + under + 0.3 + _CURVES + _BOTTOM
    with styled():
        figure = new_figure(_LEFT + width + _RIGHT, height)
        dots = add_panel(figure, _LEFT, _TOP, max(len(shown), 1) * _CELL, rows)
        curves = add_panel(figure, _LEFT, _TOP + rows + under + 0.3, width, _CURVES)
        _draw_dots(dots, found, shown, labels)
        n_all = int((named > 0).sum())
        count = f"{len(shown)} of {n_all} named tokens" if n_all > len(shown) else "named tokens"
        dots.set_title(count, fontsize=SMALL)
        _draw_entropy(curves, found)
    return figure


def _draw_dots(axes: Axes, found: OtherMeasures, shown: list[int], labels: list[str]) -> None:
    axes.set_label("named")
    for row in range(len(MEASURES)):
        for column, token in enumerate(shown):
            if not found.named[row, token]:
                continue
            kind = "ordinary"
            if found.named[0, token]:
                kind = "secondary" if found.secondary[token] else "primary"
            axes.plot(column, row, "o", color=COLORS[kind], markersize=4, gid=MEASURES[row])
    axes.set_yticks(range(len(MEASURES)), [_NAMES[name] for name in MEASURES])
    axes.set_xticks(range(len(shown)), labels, rotation=90, fontsize=SMALL, parse_math=False)
    for label in axes.get_xticklabels():
        label.set_fontfamily("DejaVu Sans Mono")
    axes.set_xlim(-0.5, max(len(shown), 1) - 0.5)
    axes.set_ylim(len(MEASURES) - 0.5, -0.5)
    axes.tick_params(length=0)


def _draw_entropy(axes: Axes, found: OtherMeasures) -> None:
    axes.set_label("entropy")
    value = found.entropy.normalized_by_head.numpy()
    layers = np.arange(len(value))
    for start, end in alive_spans(found.live_layers):
        axes.axvspan(start - 0.5, end - 0.5, color=_ALIVE, linewidth=0, zorder=0)
    low, high = np.nanquantile(value, [0.05, 0.95], axis=1)
    axes.fill_between(layers, low, high, color=COLORS["ordinary"], alpha=0.3, linewidth=0)
    axes.plot(layers, np.nanmean(value, axis=1), color="black", gid="entropy")
    axes.set(xlabel="layer", ylabel="entropy / uniform", ylim=(0, 1), xlim=(-0.5, len(value) - 0.5))
    axes.set_title("entropy of attention, mean and range over heads", fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
