"""Figures of decompositions and of heads: what they show, and that nothing runs into each other."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.head_reads import FACTORS, HeadReads, Logits, ReadSink
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.planted.planted_model import planted_model
from secondary_sinks.plots.style import SMALL


@functools.cache
def planted_host():
    return planted_model().load()


@functools.cache
def sinks_of_planted():
    return ss.detect_sinks(planted_host(), planted_model().tokens(64))


@functools.cache
def planted():
    host, sinks = planted_host(), sinks_of_planted()
    return ss.sink_decomposition(host, sinks, progress=False), ss.head_reads(host, sinks)


def invented(n_layers, n_heads, *, n_sinks=3):
    generator = torch.Generator().manual_seed(0)

    def logits():
        shape = (n_sinks, n_layers, n_heads)
        return Logits(**{name: 3 * torch.randn(shape, generator=generator) for name in FACTORS})

    shape = (n_layers, n_heads)
    shown = tuple(range(2, n_layers))
    return HeadReads(
        sinks=tuple(
            ReadSink(p, "t", "secondary" if p else "primary", shown, (9,)) for p in range(n_sinks)
        ),
        min_score=0.1,
        sink=logits(),
        ordinary=logits(),
        score=torch.rand(n_sinks, *shape, generator=generator),
        uniform_score=torch.zeros(n_sinks, n_layers),
        entropy=torch.rand(shape, generator=generator),
        uniform_entropy=torch.ones(n_layers),
        sink_attention=torch.rand(shape, generator=generator),
        value_seen=torch.rand(shape, generator=generator),
        dormant_share=torch.rand(shape, generator=generator),
        error=0.0,
        provenance=Provenance(ModelInfo("an $invented$ model")),
    )


@pytest.fixture
def check_texts(drawn_texts):
    """No text is smaller than allowed, outside the figure, or over another one."""

    def check(figure):
        texts = [(text, box) for text, box in drawn_texts(figure) if text.get_text().strip()]
        width, height = figure.get_size_inches() * figure.dpi
        for index, (text, box) in enumerate(texts):
            assert text.get_fontsize() >= SMALL
            assert min(box.x0, box.y0) >= -1, text
            assert max(box.x1 - width, box.y1 - height) <= 1, text
            for other, against in texts[index + 1 :]:
                assert not box.overlaps(against), (text, other)

    return check


@pytest.mark.slow
def test_erasers_are_outlined(check_texts):
    result, _ = planted()
    figure = result.plot()
    outlined = [
        (patch.get_x() + 0.5, patch.get_y() + 0.5)
        for axes in figure.axes
        for patch in axes.patches
        if patch.get_gid() == "eraser"
    ]
    expected = [(s.verdict.candidate_layer, row) for row, s in enumerate(result.sinks) if s.eraser]
    assert outlined == expected
    check_texts(figure)


@pytest.mark.slow
def test_tokens_that_are_not_sinks_are_drawn_empty(check_texts):
    sinks = sinks_of_planted()
    position = next(p for p in range(20, 64) if p not in {sink.position for sink in sinks.sinks})
    result = ss.sink_decomposition(planted_host(), sinks, sinks=position)
    figure = result.plot()
    assert not any(patch.get_gid() == "eraser" for axes in figure.axes for patch in axes.patches)
    check_texts(figure)
    check_texts(ss.head_reads(planted_host(), sinks, sinks=position).plot())


@pytest.mark.slow
def test_many_sinks_are_cut_and_said_to_be(check_texts):
    result, _ = planted()
    many = 70

    def repeated(value):
        return value[torch.zeros(many, dtype=torch.long)]

    def all_of(part):
        tensors = {
            entry.name: repeated(value)
            for entry in dataclasses.fields(part)
            if isinstance(value := getattr(part, entry.name), torch.Tensor)
        }
        return dataclasses.replace(part, **tensors)

    result = dataclasses.replace(
        result,
        sinks=result.sinks[:1] * many,
        write=all_of(result.write),
        head_write=all_of(result.head_write),
    )
    figure = result.plot()
    assert "and 10 more sinks" in [text.get_text() for text in figure.texts]
    check_texts(figure)


def test_dormant_heads_are_marked():
    reads = invented(12, 8)
    figure = reads.plot()
    for axes in figure.axes[0], figure.axes[2]:
        (marks,) = [one for one in axes.collections if one.get_gid() == "dormant"]
        assert len(marks.get_offsets()) == int(reads.is_dormant.sum())


@pytest.mark.parametrize(("n_layers", "n_heads", "n"), [(4, 2, 1), (12, 8, 6), (48, 40, 12)])
def test_heads_of_small_and_large_models(n_layers, n_heads, n, check_texts):
    check_texts(invented(n_layers, n_heads).plot(n_strongest=n))


def test_heads_of_a_planted_model_and_of_one_where_nobody_looks(check_texts):
    _, reads = planted()
    check_texts(reads.plot())
    nobody = dataclasses.replace(reads, score=torch.zeros_like(reads.score))
    figure = nobody.plot()
    assert len(figure.axes) == 4
    check_texts(figure)


def test_bad_arguments():
    result, reads = planted()
    for plot in (result.plot, reads.plot):
        with pytest.raises(ss.InputError, match="cell is 0"):
            plot(cell=0)
    with pytest.raises(ss.InputError, match="n_strongest is 0"):
        reads.plot(n_strongest=0)
