"""Token statistics as a picture: rates with their intervals, one row per group.

Left, the tokens that are sinks most often; right, classes, tenths of the text, and occurrences. The
dashed line is the rate of all tokens: a group to the right of it becomes sinks more often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from secondary_sinks.analyses.token_statistics import TokenRate, TokenStatistics
from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import (
    COLORS,
    SMALL,
    add_panel,
    new_figure,
    styled,
    text_width,
    visible,
)

_TOP, _BOTTOM, _GAP, _RIGHT, _ROW = 0.35, 0.3, 0.55, 0.2, 0.145  # inches
_LONGEST = 18  # characters of a token
_TITLES = {"class": "class", "position": "place in the text", "occurrence": "occurrence of the id"}


def plot_token_statistics(
    result: TokenStatistics, *, n_tokens: int = 50, panel: float = 1.9
) -> Figure:
    """Rates by token, class, position and occurrence.

    Args:
        result: over one or many texts.
        n_tokens: how many tokens are shown at most; only those that are sinks at least once.
        panel: width of a panel in inches.

    Returns:
        A matplotlib `Figure`.

    Raises:
        InputError: a `panel` or `n_tokens` that is not above 0.
    """
    if not panel > 0 or n_tokens < 1:
        raise InputError(f"panel is {panel} inches, n_tokens {n_tokens}; both must be above 0")
    tokens = [rate for rate in result.of("token") if rate.n_sinks][:n_tokens]
    others = {by: result.of(by) for by in ("class", "position", "occurrence")}
    names = [f"{visible(rate.group, limit=_LONGEST)}  {rate.n_sinks}/{rate.n}" for rate in tokens]
    left = 0.2 + max(map(text_width, names), default=0.6)
    second = left + panel + _GAP + 0.95
    stack = sum(len(rows) * _ROW for rows in others.values()) + 2 * (_GAP + 0.1)
    height = max(len(tokens) * _ROW, stack, 1.0)
    with styled():
        figure = new_figure(second + panel + _RIGHT, _TOP + height + _BOTTOM)
        axes = add_panel(figure, left, _TOP, panel, max(len(tokens), 1) * _ROW)
        _draw(axes, tokens, result.rate, names)
        axes.set_label("token")
        axes.set_title(f"token, sinks of occurrences{_left_out(result, tokens)}", fontsize=SMALL)
        for label in axes.get_yticklabels():
            label.set_fontfamily("DejaVu Sans Mono")
        top = _TOP
        for by, rows in others.items():
            axes = add_panel(figure, second, top, panel, max(len(rows), 1) * _ROW)
            axes.set_label(by)
            labels = [f"{rate.group}  {rate.n_sinks}/{rate.n}" for rate in rows]
            _draw(axes, rows, result.rate, labels)
            axes.set_title(_TITLES[by], fontsize=SMALL)
            top += len(rows) * _ROW + _GAP + 0.1
    return figure


def _left_out(result: TokenStatistics, tokens: Sequence[TokenRate]) -> str:
    n_all = sum(rate.n_sinks > 0 for rate in result.of("token"))
    return f" ({len(tokens)} of {n_all})" if n_all > len(tokens) else ""


def _draw(axes: Axes, rows: Sequence[TokenRate], overall: float, labels: Sequence[str]) -> None:
    places = np.arange(len(rows))
    rates = np.array([row.rate for row in rows])
    spread = np.array([(row.rate - row.low, row.high - row.rate) for row in rows]).reshape(-1, 2).T
    axes.errorbar(
        rates,
        places,
        xerr=np.maximum(spread, 0),
        fmt="o",
        color=COLORS["secondary"],
        markersize=3,
        elinewidth=0.8,
    )
    if not np.isnan(overall):
        axes.axvline(overall, color=COLORS["ordinary"], linestyle="--", linewidth=0.8, gid="all")
    axes.set_yticks(places, labels, fontsize=SMALL, parse_math=False)
    axes.set_ylim(len(rows) - 0.5 if rows else 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
