"""Neurons of the writer as pictures: how few make the sinks, and what they read.

`plot_neuron_contributions`: the share of the write that the first neurons make, one line a sink; what is left of
each sink without them, and with them alone, beside the controls (an open circle is no sink any
more); and which neurons the sinks share. `plot_neuron_inputs`: one neuron's pre-activations, split
over what the MLP reads, sinks beside ordinary tokens.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from secondary_sinks.analyses.neuron_contributions import NeuronContributions, SinkNeurons
from secondary_sinks.errors import InputError
from secondary_sinks.plots.sink_rows import SinkRows
from secondary_sinks.plots.style import (
    COLORS,
    add_panel,
    new_figure,
    styled,
    text_width,
)

_LEFT, _TOP, _GAP, _RIGHT = 0.55, 0.4, 0.65, 0.15  # inches
_COLUMN = 0.3
_MAX_NEURONS, _MAX_PARTS = 8, 24
_KINDS = {
    "ablate_top": "without",
    "keep_top": "alone",
    "ablate_active": "without active",
    "keep_active": "active alone",
    "ablate_random": "without random",
    "keep_random": "random alone",
}


def plot_neuron_contributions(found: NeuronContributions, *, panel: float = 1.9) -> Figure:
    """Cumulative share, tests and shared neurons of the sinks' writers.

    Args:
        found: at most 60 sinks of it are named at the right, from the first.
        panel: width of the two left panels in inches.

    Raises:
        InputError: a `panel` that is not above 0.
    """
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")
    rows = SinkRows.of(found.sinks)
    neurons = found.neurons_frame().head(_MAX_NEURONS)
    width_of_map = max(len(neurons) * _COLUMN, 0.6)
    height, height_of_map = 1.6, max(rows.height, 0.4)
    x_map = _LEFT + 2 * panel + _GAP + 0.3 + rows.label_width
    with styled():
        figure = new_figure(x_map + width_of_map + 0.85, _TOP + max(height, height_of_map) + 1.0)
        axes = add_panel(figure, _LEFT, _TOP, panel, height)
        _draw_cumulative(axes, found)
        axes = add_panel(figure, _LEFT + panel + _GAP, _TOP, panel, height)
        _draw_tests(axes, found)
        axes = add_panel(figure, x_map, _TOP, width_of_map, height_of_map)
        names = [f"{layer}.{neuron}" for layer, neuron in zip(*_columns(neurons), strict=True)]
        image = axes.imshow(
            _shares(found, neurons, len(rows)),
            aspect="auto",
            cmap="RdGy_r",
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        axes.set_label("shared")
        axes.set_title("share of the write")
        rows.name(axes)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_xlabel("layer.neuron")
        axes.tick_params(axis="x", length=0)
        bar = add_panel(figure, x_map + width_of_map + 0.1, _TOP, 0.08, min(height_of_map, height))
        figure.colorbar(image, cax=bar, ticks=[-1, 0, 1])
        rows.tell_left_out(figure)
    return figure


def plot_neuron_inputs(
    found: NeuronContributions, *, neuron: int | None = None, panel: float = 1.9
) -> Figure:
    """What one neuron's pre-activations are made of, a panel for each weight that reads.

    Args:
        found: contributions with inputs; the 24 largest parts of them are drawn.
        neuron: which; None takes the one that most sinks share.
        panel: width of a panel in inches.

    Raises:
        InputError: no inputs of that neuron, or a `panel` that is not above 0.
    """
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")
    split = [sink for sink in found.sinks if sink.inputs is not None]
    if neuron is None:
        known = [n for sink in split if sink.inputs for n in sink.inputs.neurons]
        if not known:
            raise InputError("the inputs of no neuron were split (n_inputs=0)")
        neuron = max(dict.fromkeys(known), key=known.count)
    own = [sink for sink in split if sink.inputs and neuron in sink.inputs.neurons]
    if not own:
        raise InputError(f"the inputs of neuron {neuron} were not split for any sink")
    own = [sink for sink in own if sink.writer == own[0].writer]
    inputs = own[0].inputs
    if inputs is None:
        raise InputError(f"the inputs of neuron {neuron} were not split for any sink")
    stages = list(inputs.reads)
    values = {stage: _parts(own, neuron, stage) for stage in stages}
    size = sum(np.abs(sinks).mean(axis=0) for sinks, _ in values.values())
    largest = np.sort(np.argsort(-size, kind="stable")[:_MAX_PARTS])
    names = [inputs.parts[index] for index in largest]
    height = len(names) * 0.13 + 0.1
    left = max(text_width(name) for name in names) + 0.25
    with styled():
        width = left + len(stages) * panel + (len(stages) - 1) * 0.3 + _RIGHT
        figure = new_figure(max(width, 3.4), 0.62 + height + 0.5)
        for number, stage in enumerate(stages):
            axes = add_panel(figure, left + number * (panel + 0.3), 0.62, panel, height)
            sinks, ordinary = values[stage]
            _draw_parts(axes, sinks[:, largest], ordinary[:, largest])
            axes.set_label(stage)
            total = sinks.sum(axis=1).mean()
            axes.set_title(f"{stage}, sum {total:.3g}")
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            axes.set_xlabel("part of the pre-activation")
        _draw_legend(figure, left, f"neuron {neuron} of MLP {own[0].writer}", len(own))
    return figure


def _columns(neurons: object) -> tuple[list[int], list[int]]:
    frame = neurons
    return list(frame["layer"]), list(frame["neuron"])  # type: ignore[index]


def _draw_cumulative(axes: Axes, found: NeuronContributions) -> None:
    for row, sink in zip(found.contribution, found.sinks, strict=True):
        order = row.abs().argsort(descending=True, stable=True)
        share = (sink.bias + row.double()[order].cumsum(0)) / sink.write
        color, alpha = COLORS["secondary"], max(0.25, min(1.0, 6 / len(found.sinks)))
        places = range(1, len(share) + 1)
        axes.plot(places, share.numpy(), color=color, linewidth=0.8, alpha=alpha, gid="sink")
        if sink.k:
            end = float(share[sink.k - 1])
            axes.plot([sink.k], [end], "o", color=color, markersize=3, alpha=alpha, gid="k")
    axes.axhline(found.share, color=COLORS["ordinary"], linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_label("cumulative")
    axes.set_xlabel("neurons, largest first")
    axes.set_ylabel("share of the write")
    axes.set_title(f"neurons of {_writers(found)}")


def _draw_tests(axes: Axes, found: NeuronContributions) -> None:
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
        own = [test for test in found.tests if test.kind == kind]
        color = COLORS["secondary" if kind.endswith("top") else "ordinary"]
        for alive in (False, True):
            some = [test for test in own if (test.lifetime > 0) == alive]
            spread = [place + 0.5 * ((t.sink + 0.5) / len(found.sinks) - 0.5) for t in some]
            axes.plot(
                spread,
                [test.length_left for test in some],
                color=color,
                marker="o",
                markersize=3,
                markeredgewidth=0.7,
                markerfacecolor=color if alive else "none",
                linestyle="none",
                gid=f"{kind} {'sink' if alive else 'gone'}",
            )


def _shares(found: NeuronContributions, neurons: object, n: int) -> np.ndarray:
    shares = np.full((n, max(1, len(neurons))), np.nan)  # type: ignore[arg-type]
    for column, (layer, neuron) in enumerate(zip(*_columns(neurons), strict=True)):
        for row, sink in enumerate(found.sinks[:n]):
            if sink.writer == layer:
                shares[row, column] = float(found.contribution[row, neuron]) / sink.write
    return shares


def _parts(own: list[SinkNeurons], neuron: int, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Parts of one neuron, [sink, part], of the sinks and of the ordinary tokens near each."""
    sinks, ordinary = [], []
    for sink in own:
        if sink.inputs is not None:
            row = sink.inputs.neurons.index(neuron)
            sinks.append(sink.inputs.reads[stage][row].numpy())
            ordinary.append(sink.inputs.ordinary[stage][row].numpy())
    return np.stack(sinks), np.stack(ordinary)


def _draw_parts(axes: Axes, sinks: np.ndarray, ordinary: np.ndarray) -> None:
    places = np.arange(sinks.shape[1])
    axes.barh(places, sinks.mean(axis=0), 0.75, color="#FBE6D8", linewidth=0)
    for line in sinks:
        axes.plot(line, places, "|", color=COLORS["secondary"], markersize=5, gid="sink")
    axes.plot(
        ordinary.mean(axis=0), places, "o", color=COLORS["ordinary"], markersize=2.5, gid="ordinary"
    )
    axes.axvline(0, color="black", linewidth=0.4)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _draw_legend(figure: Figure, left: float, title: str, n: int) -> None:
    width, height = figure.get_size_inches()
    color = COLORS["secondary"]
    handles = [
        Line2D([], [], color=color, marker="|", linestyle="none", label=f"{n} sinks, bar: mean"),
        Line2D(
            [],
            [],
            color=COLORS["ordinary"],
            marker="o",
            markersize=2.5,
            linestyle="none",
            label="ordinary, mean",
        ),
    ]
    figure.text(left / width, 1 - 0.18 / height, title)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left / width, 1 - 0.24 / height),
        ncols=2,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _writers(found: NeuronContributions) -> str:
    layers = sorted({sink.writer for sink in found.sinks})
    shown = ", ".join(str(layer) for layer in layers[:3])
    return f"MLP {shown}{' ...' if len(layers) > 3 else ''}"
