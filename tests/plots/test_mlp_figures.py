"""Figures of the writer's MLP: what is in them, and that no text lies on another."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import secondary_sinks as ss
from secondary_sinks.analyses.mlp_response import MlpResponse
from secondary_sinks.analyses.mlp_stage_alignment import MlpStages, SinkStages
from secondary_sinks.analyses.neuron_contributions import (
    NeuronContributions,
    NeuronInputs,
    NeuronTest,
    SinkNeurons,
    fewest,
)
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.plots.style import COLORS

TOKENS = ("\n", " you", "。你", "$x$", "\\times", " internationalization")
DONE = ("ablate", "keep")
INVENTED = {
    "writer_rule": "largest_write",
    "provenance": Provenance(ModelInfo("an $invented$ model")),
}
GATED = ("input", "gate", "activation", "up", "product", "output", "written")
KINDS = tuple(f"{done}_{which}" for which in ("top", "active", "random") for done in DONE)
PARTS = ("embedding", *(f"{kind} {layer}" for layer in range(20) for kind in ("attn", "mlp")))


def stages_of(n, stages=GATED):
    generator = torch.Generator().manual_seed(n)
    shape = (n, len(stages))

    def random(*size):
        return torch.rand(size, generator=generator)

    emergence = random(*shape)
    emergence[:, 1:-2] = torch.nan
    return MlpStages(
        sinks=tuple(
            SinkStages(100 * i, TOKENS[i % 6], "secondary", 8, 5 + i % 4, 2, 4) for i in range(n)
        ),
        stages=stages,
        cosine=random(*shape),
        ordinary=random(*shape, 4) / 2,
        norm=300 * random(*shape),
        primary_norm=50 * random(*shape),
        ordinary_norm=20 * random(*shape, 4),
        emergence_cosine=emergence,
        emergence_ordinary=random(*shape, 4),
        primary_position=0,
        **INVENTED,
    )


def response_of(n_components, n_tokens=60):
    generator = torch.Generator().manual_seed(n_components)
    projection = 30 * torch.randn(n_tokens, n_components, generator=generator)
    alphas = projection.abs().amax(dim=0)[:, None] * torch.arange(-5, 6) / 5
    return MlpResponse(
        writer=5,
        alphas=alphas,
        norm=12_345 * alphas.abs() / alphas.abs().max(),
        cosine=torch.tanh(alphas),
        zero_norm=0.0,
        zero_cosine=float("nan"),
        components=torch.eye(n_components, 32),
        variance_ratio=torch.full((n_components,), 0.137),
        separation=torch.rand(n_components, generator=generator),
        projection=projection,
        kinds=("secondary",) * (n_tokens // 5) + ("ordinary",) * (n_tokens - n_tokens // 5),
        text=torch.zeros(n_tokens, dtype=torch.long),
        position=torch.arange(n_tokens),
        token_norm=100 * torch.rand(n_tokens, generator=generator),
        token_cosine=torch.rand(n_tokens, generator=generator),
        direction=torch.ones(32),
        agreement=1.0,
        **INVENTED,
    )


def neurons_of(n, parts=PARTS, width=5000, verified=True):
    generator = torch.Generator().manual_seed(n)
    contribution = torch.randn(n, width, generator=generator) / 50
    contribution[:, 4321] = 100.0
    contribution[::2, 17] = 40.0
    contribution[::3, 2900] = -30.0
    sinks, tests = [], []
    for index, row in enumerate(contribution):
        write = float(row.double().sum())
        neurons = fewest(row, write)
        values = {
            stage: 10 * torch.randn(min(8, len(neurons)), len(parts), generator=generator)
            for stage in ("gate", "up")
        }
        ordinary = {stage: one / 5 for stage, one in values.items()}
        inputs = NeuronInputs(neurons[:8], parts, values, ordinary)
        place = (100 * index, TOKENS[index % 6], "secondary", 20, 20)
        sinks.append(SinkNeurons(*place, 17, 300.0, 0.05, write, 0.0, neurons, 0.0, inputs))
        for kind in KINDS if verified else ():
            alive = kind in ("keep_top", "ablate_active", "ablate_random")
            tests += [
                NeuronTest(index, kind, draw, 17 * alive, 300.0, 0.95 * alive, 0.05)
                for draw in range(3 if kind.endswith("random") else 1)
            ]
    return NeuronContributions(
        sinks=tuple(sinks),
        contribution=contribution,
        share=0.9,
        tests=tuple(tests),
        primary_position=0,
        **INVENTED,
    )


DRAW = (
    {f"stages {n}": lambda n=n: stages_of(n).plot() for n in (1, 5, 50)}
    | {"stages of experts": lambda: stages_of(3, ("input", "output")).plot()}
    | {f"response {n}": lambda n=n: response_of(n).plot() for n in (1, 6, 20)}
    | {f"neurons {n}": lambda n=n: neurons_of(n).plot() for n in (1, 5, 70)}
    | {"neurons untested": lambda: neurons_of(5, verified=False).plot()}
    | {f"inputs {n}": lambda n=n: neurons_of(n).plot_inputs() for n in (1, 5, 50)}
    | {"inputs of few parts": lambda: neurons_of(2, ("embedding", "bias")).plot_inputs()}
)


@functools.cache
def drawn(name):
    """The figure of that name."""
    return DRAW[name]()


def panel(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def lines(axes, gid):
    return [line for line in axes.lines if line.get_gid() == gid]


def corners(text, figure):
    """The corners of the text itself, which a rotated text's upright box is far larger than."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    angle = text.get_rotation()
    anchor = text.get_transform().transform(text.get_position())
    turned = np.deg2rad(angle)
    rotation = np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]])
    if angle % 90 == 0:
        box = text.get_window_extent(renderer)
        return np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])
    text.set_rotation(0)
    box = text.get_window_extent(renderer)
    text.set_rotation(angle)
    flat = np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])
    return (flat - anchor) @ rotation.T + anchor


def apart(one, other):
    """Whether two convex shapes are apart, but for a pixel (separating axes)."""
    for shape in (one, other):
        for a, b in zip(shape, np.roll(shape, -1, axis=0), strict=True):
            normal = np.array([b[1] - a[1], a[0] - b[0]])
            normal = normal / max(np.linalg.norm(normal), 1e-9)
            first, second = one @ normal, other @ normal
            if min(first.max(), second.max()) - max(first.min(), second.min()) <= 1.5:
                return True
    return False


@pytest.mark.parametrize("name", DRAW)
def test_no_text_lies_on_another_leaves_the_figure_or_is_small(name, drawn_texts):
    figure = drawn(name)
    texts = [text for text, _ in drawn_texts(figure)]
    shapes = [corners(text, figure) for text in texts]
    edges = figure.bbox
    for text, shape in zip(texts, shapes, strict=True):
        assert text.get_fontsize() >= 7
        assert "mathdefault" not in text.get_text(), "exponents would be smaller"
        assert shape.min() >= -0.5, text
        assert shape[:, 0].max() <= edges.x1 + 0.5, text
        assert shape[:, 1].max() <= edges.y1 + 0.5, text
    for (one, a), (other, b) in itertools.combinations(zip(texts, shapes, strict=True), 2):
        assert apart(a, b), (one.get_text(), other.get_text())


def test_stages_are_the_numbers_in_the_colors_of_the_kinds():
    result = stages_of(5)
    axes = panel(drawn("stages 5"), "cosine")
    sinks = lines(axes, "sink")
    assert len(sinks) == 5
    for line, values in zip(sinks, result.cosine, strict=True):
        np.testing.assert_allclose(line.get_ydata(), values)
        assert line.get_color() == COLORS["secondary"]
    np.testing.assert_allclose(lines(axes, "ordinary")[0].get_ydata(), result.ordinary_band()[0])
    diamonds = sorted(y for line in lines(axes, "emergence") for y in line.get_ydata())
    known = result.emergence_cosine[~result.emergence_cosine.isnan()]
    np.testing.assert_allclose(diamonds, known.sort().values)
    assert [text.get_text() for text in axes.get_xticklabels()] == list(GATED)


@pytest.mark.slow
def test_response_has_a_column_for_each_component_and_its_tokens():
    response = response_of(6)
    for number in range(6):
        axes = panel(drawn("response 6"), f"norm {number + 1}")
        curve = lines(axes, "curve")[0]
        np.testing.assert_allclose(curve.get_xdata(), response.alphas[number])
        np.testing.assert_allclose(curve.get_ydata(), response.norm[number])
        assert len(lines(axes, "secondary")[0].get_xdata()) == int(response.selected.sum())
    assert len(drawn("response 20").axes) == 16, "at most 8 columns"


def test_neurons_show_how_few_and_what_is_left():
    result = neurons_of(5)
    axes = panel(drawn("neurons 5"), "cumulative")
    marks = [line.get_xdata()[0] for line in lines(axes, "k")]
    assert marks == [sink.k for sink in result.sinks]
    assert all(line.get_ydata()[-1] == pytest.approx(1) for line in lines(axes, "sink"))
    axes = panel(drawn("neurons 5"), "tests")
    gone, alive = lines(axes, "ablate_top gone")[0], lines(axes, "keep_top sink")[0]
    assert (len(gone.get_xdata()), len(alive.get_xdata())) == (5, 5)
    assert gone.get_markerfacecolor() == "none"
    image = panel(drawn("neurons 5"), "shared").images[0].get_array()
    assert image.shape[0] == 5
    assert image[:, 0].min() > 0.5, "the first column is the neuron that all share"


def test_inputs_show_the_largest_parts():
    result = neurons_of(5)
    axes = panel(drawn("inputs 5"), "gate")
    assert len(lines(axes, "sink")) == 5
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert len(names) == 24
    assert names == sorted(names, key=PARTS.index), "in the order of computation"
    assert result.plot_inputs(neuron=17).axes
    with pytest.raises(ss.InputError, match="neuron 5 were not split"):
        result.plot_inputs(neuron=5)
    with pytest.raises(ss.InputError, match="NeuronContributions has no figure 'unknown'"):
        result.plot(figure="unknown")


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_bad_sizes(size):
    for draw in (stages_of(1).plot, response_of(1).plot, neurons_of(1).plot):
        with pytest.raises(ss.InputError, match="panel"):
            draw(panel=size)
    with pytest.raises(ss.InputError, match="panel"):
        neurons_of(1).plot_inputs(panel=size)
