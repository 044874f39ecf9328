"""Neurons of the writer as pictures: how few make the sinks, and what they read.

`plot_neuron_contributions`: the share of the write that the first neurons make, one line for each
sink; what is left of each sink without them and with them alone, and the same for controls (an open
circle means no sink any more); and which neurons the sinks share. `plot_neuron_inputs`: one
neuron's pre-activations, split over what the MLP reads, at sinks and at ordinary tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from secondary_sinks.analyses.mlp_records import counted_kinds
from secondary_sinks.analyses.neuron_contributions import NeuronContributions, SinkNeurons
from secondary_sinks.errors import InputError
from secondary_sinks.plots.sink_rows import SinkRows
from secondary_sinks.plots.style import (
    ALIVE,
    COLORS,
    add_legend,
    add_panel,
    check_panel,
    mlp_names,
    new_figure,
    styled,
    text_width,
)

if TYPE_CHECKING:
    import pandas as pd

_LEFT, _TOP, _GAP, _RIGHT = 0.55, 0.4, 0.65, 0.15  # inches
_HEIGHT, _COLUMN = 1.6, 0.3
_INPUTS_TOP, _INPUTS_GAP = 0.62, 0.3
_MAX_NEURONS, _MAX_PARTS = 8, 24
_KINDS = {
    "ablate_top": "without",
    "keep_top": "alone",
    "ablate_active": "without active",
    "keep_active": "active alone",
    "ablate_random": "without random",
    "keep_random": "random alone",
}


def plot_neuron_contributions(contributions: NeuronContributions, *, panel: float = 1.9) -> Figure:
    """Cumulative share, tests and shared neurons of the sinks' writers.

    Args:
        contributions: at most 60 of its sinks are named at the right, from the first.
        panel: width of the two left panels in inches.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    check_panel(panel)
    rows = SinkRows.of(contributions.sinks)
    neurons = contributions.neurons_frame().head(_MAX_NEURONS)
    map_width, map_height = max(len(neurons) * _COLUMN, 0.6), max(rows.height, 0.4)
    map_left = _LEFT + 2 * panel + _GAP + 0.3 + rows.label_width
    with styled():
        figure = new_figure(map_left + map_width + 0.85, _TOP + max(_HEIGHT, map_height) + 1.0)
        _draw_cumulative(add_panel(figure, _LEFT, _TOP, panel, _HEIGHT), contributions)
        _draw_tests(add_panel(figure, _LEFT + panel + _GAP, _TOP, panel, _HEIGHT), contributions)
        axes = add_panel(figure, map_left, _TOP, map_width, map_height)
        image = axes.imshow(
            _shares(contributions, neurons, len(rows)),
            aspect="auto",
            cmap="RdGy_r",
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        axes.set_label("shared")
        axes.set_title("share of the write")
        rows.name(axes)
        names = [f"{layer}.{neuron}" for layer, neuron in zip(*_columns(neurons), strict=True)]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_xlabel("layer.neuron")
        axes.tick_params(axis="x", length=0)
        bar = add_panel(figure, map_left + map_width + 0.1, _TOP, 0.08, min(map_height, _HEIGHT))
        figure.colorbar(image, cax=bar, ticks=[-1, 0, 1])
        rows.tell_left_out(figure)
    return figure


def plot_neuron_inputs(
    contributions: NeuronContributions, *, neuron: int | None = None, panel: float = 1.9
) -> Figure:
    """What one neuron's pre-activations are made of, a panel for each weight that reads.

    Args:
        contributions: with inputs; the 24 largest parts of them are drawn.
        neuron: which; None takes the one that most sinks share.
        panel: width of a panel in inches.

    Raises:
        InputError: no inputs of that neuron, or a `panel` that is not above 0.
    """
    check_panel(panel)
    neuron, sinks = _sinks_of(contributions, neuron)
    stages = list(sinks[0].inputs.reads) if sinks[0].inputs else []
    parts = {stage: _parts(sinks, neuron, stage) for stage in stages}
    size = sum(np.abs(at_sinks).mean(axis=0) for at_sinks, _ in parts.values())
    largest = np.sort(np.argsort(-size, kind="stable")[:_MAX_PARTS])
    names = [sinks[0].inputs.parts[index] for index in largest if sinks[0].inputs]
    height = len(names) * 0.13 + 0.1
    left = max(text_width(name) for name in names) + 0.25
    width = left + len(stages) * panel + (len(stages) - 1) * _INPUTS_GAP + _RIGHT
    with styled():
        figure = new_figure(max(width, 3.4), _INPUTS_TOP + height + 0.5)
        for number, (stage, (at_sinks, ordinary)) in enumerate(parts.items()):
            place = left + number * (panel + _INPUTS_GAP)
            axes = add_panel(figure, place, _INPUTS_TOP, panel, height)
            _draw_parts(axes, at_sinks[:, largest], ordinary[:, largest])
            axes.set_label(stage)
            axes.set_title(f"{stage}, sum {at_sinks.sum(axis=1).mean():.3g}")
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            axes.set_xlabel("part of the pre-activation")
        title_top = 1 - 0.18 / figure.get_size_inches()[1]
        title = f"neuron {neuron} of MLP {sinks[0].writer}"
        figure.text(left / figure.get_size_inches()[0], title_top, title)
        _draw_inputs_legend(figure, left, sinks)
    return figure


def _sinks_of(
    contributions: NeuronContributions, neuron: int | None
) -> tuple[int, list[SinkNeurons]]:
    """The neuron, and the sinks of one writer whose inputs were split for it."""
    split = [(sink, sink.inputs.neurons) for sink in contributions.sinks if sink.inputs]
    if neuron is None:
        known = [number for _, neurons in split for number in neurons]
        if not known:
            raise InputError("the inputs of no neuron were split (n_inputs=0)")
        neuron = max(dict.fromkeys(known), key=known.count)
    sinks = [sink for sink, neurons in split if neuron in neurons]
    if not sinks:
        raise InputError(f"the inputs of neuron {neuron} were not split for any sink")
    return neuron, [sink for sink in sinks if sink.writer == sinks[0].writer]


def _columns(neurons: pd.DataFrame) -> tuple[list[int], list[int]]:
    return neurons["layer"].tolist(), neurons["neuron"].tolist()


def _draw_cumulative(axes: Axes, contributions: NeuronContributions) -> None:
    color, alpha = COLORS["secondary"], max(0.25, min(1.0, 6 / len(contributions.sinks)))
    for shares, sink in zip(contributions.write_share.double(), contributions.sinks, strict=True):
        order = shares.abs().argsort(descending=True, stable=True)
        share = sink.bias / sink.write + shares[order].cumsum(0)
        places = range(1, len(share) + 1)
        axes.plot(places, share.numpy(), color=color, linewidth=0.8, alpha=alpha, gid="sink")
        if sink.k:
            end = float(share[sink.k - 1])
            axes.plot([sink.k], [end], "o", color=color, markersize=3, alpha=alpha, gid="k")
    axes.axhline(contributions.share, color=COLORS["ordinary"], linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_label("cumulative")
    axes.set_xlabel("neurons, largest first")
    axes.set_ylabel("share of the write")
    axes.set_title(f"neurons of {mlp_names(sink.writer for sink in contributions.sinks)}")


def _draw_tests(axes: Axes, contributions: NeuronContributions) -> None:
    axes.set_label("tests")
    axes.set_title("what is left of the sinks")
    axes.set_xticks(
        range(len(_KINDS)), list(_KINDS.values()), rotation=40, ha="right", rotation_mode="anchor"
    )
    axes.set_xlim(-0.6, len(_KINDS) - 0.4)
    axes.set_ylabel("length, over the clean")
    axes.axhline(1, color=COLORS["ordinary"], linestyle="--", linewidth=0.8)
    axes.axhline(0, color="black", linewidth=0.4, zorder=0)
    for place, kind in enumerate(_KINDS):
        color = COLORS["secondary" if kind.endswith("top") else "ordinary"]
        for alive in (False, True):
            tests = [t for t in contributions.tests if t.kind == kind and (t.lifetime > 0) == alive]
            spread = [(t.sink + 0.5) / len(contributions.sinks) - 0.5 for t in tests]
            axes.plot(
                [place + 0.5 * offset for offset in spread],
                [test.length_left for test in tests],
                color=color,
                marker="o",
                markersize=3,
                markeredgewidth=0.7,
                markerfacecolor=color if alive else "none",
                linestyle="none",
                gid=f"{kind} {'sink' if alive else 'gone'}",
            )


def _shares(contributions: NeuronContributions, neurons: pd.DataFrame, n: int) -> np.ndarray:
    """Share of the write, [sink, neuron], of the first n sinks; NaN for other layers' neurons."""
    shares = np.full((n, max(1, len(neurons))), np.nan)
    of_neuron = contributions.write_share
    for column, (layer, neuron) in enumerate(zip(*_columns(neurons), strict=True)):
        for row, sink in enumerate(contributions.sinks[:n]):
            if sink.writer == layer:
                shares[row, column] = float(of_neuron[row, neuron])
    return shares


def _parts(sinks: list[SinkNeurons], neuron: int, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Parts of one neuron, [sink, part], of the sinks and of the ordinary tokens near each."""
    inputs = [(sink.inputs, sink.inputs.neurons.index(neuron)) for sink in sinks if sink.inputs]
    return (
        torch.stack([split.reads[stage][row] for split, row in inputs]).numpy(),
        torch.stack([split.ordinary[stage][row] for split, row in inputs]).numpy(),
    )


def _draw_parts(axes: Axes, at_sinks: np.ndarray, ordinary: np.ndarray) -> None:
    places = np.arange(at_sinks.shape[1])
    axes.barh(places, at_sinks.mean(axis=0), 0.75, color=ALIVE, linewidth=0)
    for line in at_sinks:
        axes.plot(line, places, "|", color=COLORS["secondary"], markersize=5, gid="sink")
    axes.plot(
        ordinary.mean(axis=0), places, "o", color=COLORS["ordinary"], markersize=2.5, gid="ordinary"
    )
    axes.axvline(0, color="black", linewidth=0.4)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _draw_inputs_legend(figure: Figure, left: float, sinks: list[SinkNeurons]) -> None:
    tokens = counted_kinds([sink.kind for sink in sinks])
    secondary: dict[str, Any] = {"color": COLORS["secondary"], "marker": "|"}
    ordinary: dict[str, Any] = {"color": COLORS["ordinary"], "marker": "o", "markersize": 2.5}
    handles = [
        Line2D([], [], linestyle="none", label=f"{tokens}, bar: mean", **secondary),
        Line2D([], [], linestyle="none", label="ordinary, mean", **ordinary),
    ]
    add_legend(figure, handles, left, 0.24, ncols=2, handlelength=1.0)
