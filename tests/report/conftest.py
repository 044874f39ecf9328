"""Invented sink maps for the tests of figures and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from secondary_sinks.explain.sinks import Evidence, Sink, SinkMap

TOKENS = ("\n", " you", "。你", "$x$", "\\times", " internationalization")


def _invented(
    n_secondary: int,
    n_tokens: int = 400,
    *,
    n_layers: int = 24,
    primary_lives: tuple[tuple[int, int], ...] = ((2, 22),),
) -> SinkMap:
    generator = torch.Generator().manual_seed(n_secondary)
    shape = (n_layers, n_tokens)
    norm = 8 + 4 * torch.rand(shape, generator=generator)
    ratio = 0.5 + torch.rand(shape, generator=generator)
    score = torch.rand(n_layers, 2, n_tokens, generator=generator) / n_tokens
    alignment = torch.rand(shape, generator=generator) * 0.3
    places = torch.randperm(n_tokens - 20, generator=generator)[:n_secondary].sort().values + 2
    lives = [(0, start, end) for start, end in primary_lives]
    lives += [(position, 8, 18) for position in places.tolist()]
    sinks = []
    for position, start, end in lives:
        norm[start:end, position] = 1000.0 if position == 0 else 200.0
        score[start + 1 : end + 1, :, position] = 0.3 if position == 0 else 0.05
        ratio[start + 1 : end + 1, position] = 40.0
        alignment[start:end, position] = 0.98
        layers = tuple(range(start, end))
        n = len(layers)
        evidence = Evidence(
            alignment=(0.98,) * n,
            centered_alignment=(0.98,) * n,
            norm=(200.0,) * n,
            norm_ratio=(20.0,) * n,
            centered_norm_ratio=(22.0,) * n,
            sink_score=(0.05,) * n,
            attention_ratio=40.0,
            n_queries=100,
        )
        kind = "primary" if position == 0 else "secondary"
        sinks.append(Sink(position, TOKENS[position % 6], 5 + position, kind, layers, evidence))
    score[:, :, -8:] = torch.nan
    return SinkMap(
        tokens=torch.zeros(n_tokens, dtype=torch.long),
        token_strings=tuple(TOKENS[index % 6] for index in range(n_tokens)),
        n_tokens=n_tokens,
        model={"name": "an $invented$ model", "n_layers": n_layers, "processing": ()},
        criterion="evidence",
        thresholds={"min_alignment": 0.9, "min_norm_ratio": 1.5, "min_attention_ratio": 4.0},
        primary_position=0,
        phases=primary_lives,
        sinks=tuple(sinks),
        alignment=alignment,
        centered_alignment=alignment,
        norm=norm,
        centered_norm=norm,
        ordinary_norm=norm.median(dim=1).values,
        ordinary_centered_norm=norm.median(dim=1).values,
        sink_score=score,
        attention_ratio=ratio,
    )


@pytest.fixture(scope="session")
def invented() -> Callable[..., SinkMap]:
    """Number of secondary sinks, length -> a map with them at random positions.

    All have onset 8 and lifetime 10; their tokens are hard to draw.
    """
    return _invented


@pytest.fixture
def published() -> SinkMap:
    """A map as `read_reference` makes it: sinks, no arrays; one lives in separate layers."""
    return SinkMap(
        tokens=None,
        token_strings=(),
        n_tokens=1390,
        model={"name": "published"},
        criterion="reference",
        thresholds={},
        primary_position=0,
        phases=((6, 35),),
        sinks=(
            Sink(0, "#1", 1, "primary", tuple(range(6, 35))),
            Sink(589, "#220", 220, "secondary", (16, 17, 18, 21, 22)),
        ),
    )


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
