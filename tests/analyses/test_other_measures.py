"""What each measure names, where the answer is known."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.cli.app import demo_messages


def test_planted_tokens_are_named_as_they_were_planted():
    """A decoy that is massive and draws no attention is none of the evidence criterion's."""
    planted = ss.planted_model(large_decoys=(21,), large_decoy_norm=300.0)
    host, tokens = planted.load(), planted.tokens(64)
    truth = planted.truth(tokens)
    sinks = ss.detect_sinks(host, tokens)
    found = ss.other_measures(host, sinks, min_value=20.0, min_ratio=20.0)
    sinks = sorted([0, *(sink.position for sink in truth.sinks)])
    assert found.of("evidence") == sinks
    assert set(truth.decoys_large) <= set(found.of("massive"))
    assert not set(truth.decoys_large) & set(found.of("evidence"))
    assert 0 in found.of("gu")
    frame = found.agreement()
    assert len(frame) == 6
    assert ((frame.jaccard >= 0) & (frame.jaccard <= 1)).all()
    live = set(found.live_layers)
    assert live == {x + 1 for s in truth.sinks for x in range(s.onset, s.onset + s.lifetime)}


def test_measures_are_those_of_the_collectors(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(24)
    found = ss.other_measures(model, ss.detect_sinks(model, tokens), epsilon=0.2, min_rate=0.1)
    published = ss.detect_sinks(model, tokens, criterion="published")
    positions = {sink.position for sink in published.sinks if sink.kind != "noise"}
    assert found.named[1].nonzero().flatten().tolist() == sorted(positions)
    seen = ss.trace(
        model, tokens, [ss.SinkScores("gu"), ss.MassiveActivations(), ss.AttentionEntropy()]
    )
    rate = ss.sink_rate(seen["SinkScores"], 0.2)
    assert torch.equal(found.sink_rate, rate)
    compared = (rate > 0.1)[:16]
    assert found.of("gu") == compared.nonzero().flatten().tolist()
    assert torch.equal(found.massive_value, seen["MassiveActivations"].value)
    assert torch.equal(found.entropy.by_head, seen["AttentionEntropy"].by_head)
    assert len(found.entropy_frame()) == found.importance.shape[0] * found.importance.shape[1]


def test_qwen_the_published_rate_does_not_see_secondary_sinks(qwen):
    """They draw a tenth of the attention, in no head three tenths."""
    found = ss.other_measures(qwen, ss.detect_sinks(qwen, demo_messages()))
    secondary = found.secondary.nonzero().flatten().tolist()
    assert secondary == [2, 3, 7, 12, 18, 20, 23]
    assert not set(secondary) & set(found.of("gu"))
    assert 0 in found.of("gu")
    assert set(secondary) <= set(found.of("published"))
    assert len(set(secondary) & set(found.of("massive"))) == 6


@functools.cache
def names_every_token():
    planted = ss.planted_model()
    host, tokens = planted.load(), planted.tokens(100)
    return ss.other_measures(host, ss.detect_sinks(host, tokens), epsilon=0.0)


@pytest.mark.parametrize("count", [5, 50])
def test_every_named_token_of_the_figure_can_be_read(count):
    figure = names_every_token().plot(n_tokens=count)
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
    planted = ss.planted_model()
    host, tokens = planted.load(), planted.tokens(40)
    sinks = ss.detect_sinks(host, tokens)
    found = ss.other_measures(host, sinks)
    back = ss.OtherMeasures.load(found.save(tmp_path / "found.safetensors"))
    assert back.to_frame().equals(found.to_frame())
    assert torch.equal(back.entropy.by_query, found.entropy.by_query)
    with pytest.raises(ss.InputError, match="no measure"):
        found.of("size")
    with pytest.raises(ss.InputError, match="epsilon"):
        ss.other_measures(host, sinks, epsilon=2)
    with pytest.raises(ss.InputError, match="min_rate"):
        ss.other_measures(host, sinks, min_rate=1)
    with pytest.raises(ss.InputError, match="min_ratio"):
        ss.other_measures(host, sinks, min_ratio=-1)
