"""Invented sink maps for the tests of figures and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def _drawn_texts(figure):
    """Every visible text with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = []
    for text in figure.findobj(Text):
        if not (text.get_visible() and text.get_text()) or not text.get_window_extent().width:
            continue
        if text.axes is not None and not text.axes.axison:
            continue
        found.append((text, text.get_window_extent(renderer)))
    # Ticks beyond the limits of their axis exist, but are not drawn.
    shown = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for tick in axis._update_ticks():
                shown |= {tick.label1, tick.label2}
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.majorTicks, *axis.minorTicks)
        for label in (tick.label1, tick.label2)
    }
    return [(text, box) for text, box in found if text not in ticks or text in shown]


@pytest.fixture(scope="session")
def drawn_texts() -> Callable[..., list[tuple[Text, Any]]]:
    """A figure -> every visible text with its box in pixels."""
    return _drawn_texts
