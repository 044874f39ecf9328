"""Figure of a patching scan: one heat map for each site, layers upward, tokens to the right.

Colors are normalized effects: white is the base run, full color the metric of the source run. A
framed cell of an estimated scan was run exactly as well.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from secondary_sinks.analyses.patch_activations import PatchResult
from secondary_sinks.plots.style import (
    SMALL,
    add_panel,
    new_figure,
    styled,
    text_width,
    visible,
)

_LEFT, _RIGHT, _TOP, _GAP = 0.6, 0.85, 0.55, 0.3  # inches
_LABELED = 60
"""With more columns than this, the token strings are left out."""


def plot_patch_result(patched: PatchResult, *, width: float | None = None) -> Figure:
    """Draw a scan; by default as wide as its columns need, between 3.5 and 7 inches."""
    n_sites, n_layers, n_pairs = patched.value.shape
    if width is None:
        width = min(7.0, max(3.5, _LEFT + _RIGHT + 0.14 * n_pairs))
    panel_height = min(2.2, max(0.6, 0.11 * n_layers))
    labels = [visible(token, limit=10) for token in patched.tokens]
    spelled = n_pairs <= _LABELED
    below = max(map(text_width, labels)) + 0.25 if spelled else 0.45
    height = _TOP + n_sites * panel_height + (n_sites - 1) * _GAP + below
    panel_width = width - _LEFT - _RIGHT
    shown = _shown(patched)
    limit = float(np.nanmax(np.abs(shown), initial=0.0)) or 1.0
    with styled():
        figure = new_figure(width, height)
        for site, name in enumerate(patched.sites):
            top = _TOP + site * (panel_height + _GAP)
            axes = add_panel(figure, _LEFT, top, panel_width, panel_height)
            axes.set_label(name)
            axes.set_title(name)
            image = axes.imshow(
                shown[site],
                origin="lower",
                aspect="auto",
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                interpolation="nearest",
            )
            _mark_checked(axes, patched, site)
            _label_layers(axes, patched.layers)
            if site < n_sites - 1:
                axes.set_xticks([])
            elif spelled:
                axes.set_xticks(range(n_pairs), labels, rotation=90, family="DejaVu Sans Mono")
            else:
                axes.set_xlabel("column")
        bar = add_panel(figure, _LEFT + panel_width + 0.1, _TOP, 0.09, panel_height)
        figure.colorbar(image, cax=bar)
        bar.yaxis.set_major_locator(MaxNLocator(4))
        bar.tick_params(labelsize=SMALL)
        heading = f"{patched.direction}, {patched.scan}: {_unit(patched)}"
        figure.text(0.1 / width, 1 - 0.2 / height, heading, fontsize=8, weight="bold")
    return figure


def _shown(patched: PatchResult) -> np.ndarray:
    values = patched.normalized if patched.source != patched.base else patched.effect
    array: np.ndarray = values.float().numpy()
    return array


def _unit(patched: PatchResult) -> str:
    return f"{patched.metric}, 0 is {patched.base:.3g}, 1 is {patched.source:.3g}"


def _label_layers(axes: Axes, layers: tuple[int, ...]) -> None:
    step = max(1, -(-len(layers) // 6))
    places = range(0, len(layers), step)
    axes.set_yticks(list(places), [str(layers[place]) for place in places])
    axes.set_ylabel("layer")


def _mark_checked(axes: Axes, patched: PatchResult, site: int) -> None:
    for where, layer, pair in patched.checked.tolist():
        if where == site:
            corner = (pair - 0.5, layer - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, linewidth=0.5, gid="checked"))
