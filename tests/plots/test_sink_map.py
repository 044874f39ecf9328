"""The picture of a map shows every sink, where it is, and nothing on top of anything else."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import secondary_sinks as ss
from secondary_sinks.plots.plot_sink_map import plot_sink_map
from secondary_sinks.plots.style import COLORS

WIDTHS = (3.4, 7.0)


def panel(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def bars(figure):
    return [patch for patch in panel(figure, "lives").patches if "life" in str(patch.get_gid())]


def labels(figure):
    return [text for text in panel(figure, "lives").texts if text.get_gid() == "label"]


@pytest.mark.parametrize("n", [0, 1, 5, 50])
def test_there_is_one_bar_for_each_life(invented, n):
    sinks = invented(n, primary_lives=((1, 6), (10, 20)))
    drawn = bars(plot_sink_map(sinks))
    assert len(drawn) == len(sinks.sinks) == n + 2
    colors = [to_hex(bar.get_facecolor()).upper() for bar in drawn]
    assert colors.count(COLORS["primary"]) == 2
    assert colors.count(COLORS["secondary"]) == n


def test_bars_span_the_layers_of_their_lives(invented):
    sinks = invented(5)
    for bar, sink in zip(bars(plot_sink_map(sinks)), sinks.sinks, strict=True):
        box = bar.get_path().get_extents()
        assert (box.y0, box.y1) == (sink.l_start - 0.5, sink.layers[-1] + 0.5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [0, 5, 50, 300])
@pytest.mark.parametrize("n_tokens", [400, 10_000])
def test_no_text_lies_on_another_or_leaves_the_figure(invented, n, n_tokens, width, drawn_texts):
    figure = plot_sink_map(invented(n, n_tokens), width=width)
    texts = drawn_texts(figure)
    assert len(texts) > 10
    edges = figure.bbox
    for text, box in texts:
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= edges.x1 + 0.5, text
        assert box.y1 <= edges.y1 + 0.5, text
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        # A pixel of the empty margin that every text box has may be shared.
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, (one.get_text(), other.get_text())


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_is_smaller_than_7_points(invented, width, drawn_texts):
    for text, _ in drawn_texts(plot_sink_map(invented(9), width=width)):
        assert text.get_fontsize() >= 7
        assert "mathdefault" not in text.get_text()  # exponents would be smaller


@pytest.mark.slow
def test_all_labels_fit_at_50_and_the_strongest_are_kept_at_300(invented):
    assert len(labels(plot_sink_map(invented(50, 10_000)))) == 51
    figure = plot_sink_map(invented(300, 10_000))
    kept = labels(figure)
    assert 20 < len(kept) < 301
    assert kept[0].get_text().endswith(" 0")  # the primary
    assert len(bars(figure)) == 301
    assert any("strongest" in text.get_text() for text in figure.texts)


def test_labels_name_token_and_position_and_are_not_set_as_mathematics(invented):
    sinks = invented(5)
    shown = {tuple(text.get_text().split()) for text in labels(plot_sink_map(sinks))}
    assert ("\\n", "0") in shown
    assert {position for _, position in shown} == {str(sink.position) for sink in sinks.sinks}
    assert not any(text.get_parse_math() for text in labels(plot_sink_map(sinks)))


def test_lines_lead_from_each_bar_to_the_place_in_the_text(invented):
    sinks = invented(5)
    figure = plot_sink_map(sinks)
    figure.canvas.draw_idle()
    text = panel(figure, "text")
    lines = next(axes for axes in figure.axes if axes.collections and not axes.axison)
    for segment, sink in zip(lines.collections[0].get_segments(), sinks.sinks, strict=True):
        end = lines.transData.transform(segment[1])
        assert text.transData.inverted().transform(end)[0] == pytest.approx(sink.position)


def test_a_sink_of_one_token_is_not_lost_in_a_long_text(invented):
    sinks = invented(1, 10_000)
    image = panel(plot_sink_map(sinks), "text").images[0].get_array()
    assert image.shape[1] <= 600
    assert (np.asarray(image).max(axis=0) > 30).sum() == 2  # the primary and the secondary


def test_heat_map_shows_what_was_asked_for(invented):
    sinks = invented(3)
    aligned = panel(plot_sink_map(sinks, shade="alignment"), "text").images[0]
    assert np.allclose(aligned.get_array(), sinks.centered_alignment)
    drawn = panel(plot_sink_map(sinks), "text").images[0]
    assert np.allclose(drawn.get_array(), sinks.attention_ratio.clip(1, 100))
    published_score = dataclasses.replace(sinks, attention_ratio=None)
    score = panel(plot_sink_map(published_score), "text").images[0]
    assert np.allclose(
        np.ma.filled(score.get_array(), np.nan), sinks.sink_score.mean(dim=1), equal_nan=True
    )


def test_curves_are_the_measurements_in_the_colors_of_the_kinds(invented):
    sinks = invented(4)
    figure = plot_sink_map(sinks)
    for name, values in (("scores", sinks.sink_score.mean(dim=1)), ("norms", sinks.norm)):
        curves = {str(line.get_gid()): line for line in panel(figure, name).lines}
        assert set(curves) == {
            "ordinary",
            *(f"{sink.kind}-{sink.position}" for sink in sinks.sinks),
        }
        for sink in sinks.sinks:
            line = curves[f"{sink.kind}-{sink.position}"]
            assert line.get_color() == COLORS[sink.kind]
            assert np.allclose(line.get_ydata(), values[:, sink.position])
        ordinary = torch.ones(sinks.n_tokens, dtype=torch.bool)
        ordinary[[sink.position for sink in sinks.sinks]] = False
        rest = values[:, ordinary]
        rest = rest[:, ~rest.isnan().any(dim=0)].numpy()
        assert np.allclose(curves["ordinary"].get_ydata(), np.median(rest, axis=1))
    assert panel(figure, "norms").get_yscale() == "log"


def test_shading_of_attention_stands_one_layer_later(invented):
    figure = plot_sink_map(invented(4))  # alive after layers 8 to 17
    extents = {name: panel(figure, name).patches[0].get_extents() for name in ("scores", "norms")}
    for name, first in (("norms", 7.5), ("scores", 8.5)):
        axes = panel(figure, name)
        box = extents[name].transformed(axes.transData.inverted())
        assert (box.x0, box.x1) == pytest.approx((first, first + 10))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_text_without_sinks_says_so_and_shows_the_candidate(invented, width, drawn_texts):
    empty = dataclasses.replace(invented(0), sinks=(), phases=(), notes=("no primary sink " * 9,))
    figure = plot_sink_map(empty, width=width)
    assert bars(figure) == []
    assert any("no sinks" in text.get_text() for text, _ in drawn_texts(figure))
    assert any("no primary" in text.get_text() for text in figure.texts)
    candidate = panel(figure, "norms").lines[-1]
    assert np.allclose(candidate.get_ydata(), empty.norm[:, 0])


def test_without_secondary_sinks_nothing_is_shaded(invented):
    figure = plot_sink_map(invented(0))
    assert "no secondary sinks" in [text.get_text() for text in panel(figure, "lives").texts]
    assert list(panel(figure, "norms").patches) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_published_maps_show_their_lives_only(published, width, drawn_texts):
    figure = plot_sink_map(published, width=width)
    assert len(bars(figure)) == 2
    assert not any(axes.images for axes in figure.axes)
    assert not {"scores", "norms"} & {axes.get_label() for axes in figure.axes}
    drawn_texts(figure)


def test_a_life_in_separate_layers_has_a_gap(published):
    bar = bars(plot_sink_map(published))[1]
    heights = {tuple(polygon[:, 1][[0, 2]]) for polygon in bar.get_path().to_polygons()}
    assert heights == {(15.5, 18.5), (20.5, 22.5)}


def test_tokens_of_a_short_text_are_named(invented):
    figure = plot_sink_map(invented(2, 30))
    names = [label.get_text() for label in panel(figure, "text").get_xticklabels()]
    assert names[:3] == ["\\n", "·you", "\\u3002\\u4f60"]
    assert len(names) == 30
    long = panel(plot_sink_map(invented(2, 400)), "text").get_xticklabels()
    assert all(label.get_text().lstrip("−").isdigit() for label in long)


def test_two_tokens_are_enough(invented, drawn_texts):
    tiny = dataclasses.replace(
        invented(0, 30),
        n_tokens=2,
        token_strings=("a", "b"),
        norm=torch.ones(24, 2),
        alignment=torch.ones(24, 2),
        centered_alignment=torch.ones(24, 2),
        attention_ratio=torch.full((24, 2), torch.nan),
        mean_attention=torch.full((24, 2, 2), torch.nan),
    )
    drawn_texts(plot_sink_map(tiny))


@pytest.mark.slow
def test_processed_weights_are_noted_in_the_figure(invented):
    noted = dataclasses.replace(invented(1), notes=("weights are not raw (folded)",))
    assert any("not raw" in text.get_text() for text in plot_sink_map(noted).texts)


def test_bad_arguments(invented):
    with pytest.raises(ss.InputError, match="shade"):
        plot_sink_map(invented(0), shade="norm")
    for width in (0, 2.9, float("nan")):
        with pytest.raises(ss.InputError, match="width"):
            plot_sink_map(invented(0), width=width)
