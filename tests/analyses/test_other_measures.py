"""What each measure names, where the answer is known."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.cli.detect import demo_messages


@functools.cache
def default():
    """A planted model, and its map of a text."""
    planted = ss.planted_model()
    host = planted.load()
    return host, ss.detect_sinks(host, planted.tokens(100))


@pytest.mark.slow
def test_planted_tokens_are_named_as_they_were_planted():
    """A decoy that is massive and draws no attention is none of the evidence criterion's."""
    planted = ss.planted_model(large_decoys=(21,), large_decoy_norm=300.0)
    host, tokens = planted.load(), planted.tokens(64)
    truth = planted.truth(tokens)
    sinks = ss.detect_sinks(host, tokens)
    measures = ss.other_measures(host, sinks, min_value=20.0, min_ratio=20.0)
    sinks = sorted([0, *(sink.position for sink in truth.sinks)])
    assert measures.of("evidence") == sinks
    assert set(truth.decoys_large) <= set(measures.of("massive"))
    assert not set(truth.decoys_large) & set(measures.of("evidence"))
    assert 0 in measures.of("gu")
    frame = measures.agreement()
    assert len(frame) == 6
    assert ((frame.jaccard >= 0) & (frame.jaccard <= 1)).all()
    live = set(measures.live_layers)
    assert live == {x + 1 for s in truth.sinks for x in range(s.onset, s.onset + s.lifetime)}


def test_measures_are_those_of_the_collectors(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(24)
    measures = ss.other_measures(model, ss.detect_sinks(model, tokens), epsilon=0.2, min_rate=0.1)
    published = ss.detect_sinks(model, tokens, criterion="published")
    positions = {sink.position for sink in published.sinks if sink.kind != "noise"}
    assert measures.named[1].nonzero().flatten().tolist() == sorted(positions)
    traced = ss.trace(
        model, tokens, [ss.SinkScores("gu"), ss.MassiveActivations(), ss.AttentionEntropy()]
    )
    rate = ss.sink_rate(traced["SinkScores"], 0.2)
    assert torch.equal(measures.sink_rate, rate)
    compared = (rate > 0.1)[:16]
    assert measures.of("gu") == compared.nonzero().flatten().tolist()
    assert torch.equal(measures.massive_value, traced["MassiveActivations"].value)
    assert torch.equal(measures.entropy.by_head, traced["AttentionEntropy"].by_head)
    assert (
        len(measures.entropy_frame()) == measures.importance.shape[0] * measures.importance.shape[1]
    )


def test_qwen_the_published_rate_does_not_see_secondary_sinks(qwen):
    """They draw a tenth of the attention, in no head three tenths."""
    measures = ss.other_measures(qwen, ss.detect_sinks(qwen, demo_messages(), max_tokens=400))
    secondary = measures.secondary.nonzero().flatten().tolist()
    assert secondary == [2, 3, 7, 12, 18, 20, 23]
    assert not set(secondary) & set(measures.of("gu"))
    assert 0 in measures.of("gu")
    assert set(secondary) <= set(measures.of("published"))
    assert len(set(secondary) & set(measures.of("massive"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 50])
def test_every_named_token_of_the_figure_can_be_read(count):
    figure = ss.other_measures(*default(), epsilon=0.0).plot(n_tokens=count)  # names every token
    figure.canvas.draw()
    axes = figure.axes[0]
    labels = axes.get_xticklabels()
    assert len(labels) == count
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(boxes))
    title = figure.axes[1]._left_title.get_window_extent()
    assert min(box.y0 for box in boxes) > title.y1
    assert all(label.get_fontsize() >= 7 for label in labels)
    assert figure.bbox.x1 >= max(box.x1 for box in boxes)


def test_file_and_bad_input(tmp_path):
    host, sinks = default()
    measures = ss.other_measures(host, sinks)
    back = ss.OtherMeasures.load(measures.save(tmp_path / "result.safetensors"))
    assert back.to_frame().equals(measures.to_frame())
    assert torch.equal(back.entropy.by_query, measures.entropy.by_query)
    with pytest.raises(ss.InputError, match="no measure"):
        measures.of("size")
    with pytest.raises(ss.InputError, match="epsilon"):
        ss.other_measures(host, sinks, epsilon=2)
    with pytest.raises(ss.InputError, match="min_rate"):
        ss.other_measures(host, sinks, min_rate=1)
    with pytest.raises(ss.InputError, match="min_ratio"):
        ss.other_measures(host, sinks, min_ratio=-1)
