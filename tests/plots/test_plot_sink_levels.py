"""The picture of sink levels shows the counts, in their places, with their levels."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

import secondary_sinks as ss
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.plots.plot_sink_levels import plot_sink_levels
from secondary_sinks.plots.style import COLORS
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


def a_map(*lives, name="a model", n_layers=36):
    sinks = [Sink(0, "x", 1, "primary", tuple(range(2, 30)))]
    sinks += [
        Sink(9 + index, "y", 2, "secondary", tuple(range(onset, onset + lifetime)))
        for index, (onset, lifetime) in enumerate(lives)
    ]
    provenance = Provenance(ModelInfo(name, n_layers=n_layers))
    return SinkMap(None, (), 100, provenance, "published", 0, ((2, 30),), tuple(sinks))


@pytest.fixture
def levels():
    return ss.sink_levels([a_map((16, 18), (16, 18), (16, 17)), a_map((16, 18), (20, 5))])


def test_counts_stand_in_their_cells(levels):
    axes = plot_sink_levels(levels).axes[0]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(16, 18): "3", (16, 17): "1", (20, 5): "1"}
    image = axes.images[0]
    x0, _, y0, _ = image.get_extent()
    dark = image.get_array()[int(18 - y0 - 0.5), int(16 - x0 - 0.5)]
    assert dark == image.get_array().max() > 0
    assert (image.get_array() > 0).sum() == 3


def test_merged_levels_are_outlined_as_one(levels):
    boxes = {
        (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height())
        for patch in plot_sink_levels(levels).axes[0].patches
    }
    assert boxes == {(15.5, 16.5, 1, 2), (19.5, 4.5, 1, 1)}
    edge = plot_sink_levels(levels).axes[0].patches[0].get_edgecolor()
    assert to_hex(edge).upper() == COLORS["secondary"]


def test_every_cell_lies_inside_the_axes_also_at_the_edge_of_the_model():
    for lives in ([(0, 36)], [(35, 1)], [(0, 1)], [(0, 1), (35, 1), (0, 36)]):
        axes = plot_sink_levels(ss.sink_levels(a_map(*lives))).axes[0]
        for onset, lifetime in lives:
            assert axes.get_xlim()[0] <= onset - 0.5 < onset + 0.5 <= axes.get_xlim()[1]
            assert axes.get_ylim()[0] <= lifetime - 0.5 < lifetime + 0.5 <= axes.get_ylim()[1]
        assert axes.get_xlim()[0] >= -0.5


def test_cells_are_large_enough_for_their_numbers(levels):
    figure = plot_sink_levels(levels)
    figure.canvas.draw()
    axes = figure.axes[0]
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (1, 1)])
    assert x1 - x0 == pytest.approx(0.24 * figure.dpi, rel=0.01)
    assert y1 - y0 == pytest.approx(0.24 * figure.dpi, rel=0.01)
    assert list(plot_sink_levels(levels, cell=0.1).axes[0].texts) == []


def test_one_panel_a_model_none_on_another():
    many = [ss.sink_levels(a_map((5 + k, 9), name=f"model {k}")) for k in range(7)]
    figure = plot_sink_levels(many)
    assert [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes] == [
        f"model {k}" for k in range(7)
    ]
    boxes = [axes.get_position() for axes in figure.axes]
    for index, one in enumerate(boxes):
        assert 0 <= one.x0 < one.x1 <= 1
        assert 0 <= one.y0 < one.y1 <= 1
        assert not any(one.overlaps(other) for other in boxes[index + 1 :])


def test_a_model_without_sinks_says_so():
    axes = plot_sink_levels(ss.sink_levels([a_map(), a_map()])).axes[0]
    assert "no secondary" in axes.texts[0].get_text()
    assert "no sinks in 0 of 2 texts" in axes.get_title(loc="left")


def test_large_counts_are_short():
    maps = [a_map(*[(16, 18)] * 60)] * 40
    assert plot_sink_levels(ss.sink_levels(maps)).axes[0].texts[0].get_text() == "2.4k"


def test_bad_arguments(levels):
    with pytest.raises(ss.InputError, match="no sink levels"):
        plot_sink_levels([])
    with pytest.raises(ss.InputError, match="cell"):
        plot_sink_levels(levels, cell=0)
