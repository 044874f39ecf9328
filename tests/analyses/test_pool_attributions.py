"""Attributions of many texts: counts by hand, and intervals that know what a text is."""

from __future__ import annotations

import dataclasses
import functools

import pytest

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model

pytestmark = pytest.mark.slow


@functools.cache
def attributions():
    """Of four texts of the default planted model, which has two writers."""
    planted = planted_model()
    model = planted.load()
    sink_maps = [ss.detect_sinks(model, planted.tokens(64, seed=seed)) for seed in range(4)]
    return [
        ss.attribute_to_mlps(model, sink_map, n_controls=4, attention=False, progress=False)
        for sink_map in sink_maps
    ]


def test_writers_are_counted_over_texts():
    texts = attributions()
    pooled = ss.pool_attributions(texts)
    every = [sink for text in texts for sink in text.sinks]
    assert pooled.n_sinks == len(every)
    assert {writer.layer for writer in pooled.writers} == {sink.writer for sink in every}
    for writer in pooled.writers:
        written = [sink for sink in every if sink.writer == writer.layer]
        assert writer.n_sinks == len(written)
        assert writer.share.value == pytest.approx(len(written) / len(every))
        assert writer.share.low <= writer.share.value <= writer.share.high
        assert writer.n_texts == sum(
            any(sink.writer == writer.layer for sink in text.sinks) for text in texts
        )
        feeders = {feeder for sink in written for feeder in sink.feeders}
        assert set(writer.feeders) == feeders
        assert writer.transplant_share.value == 1
        assert writer.length_left.value < 0.25
        assert writer.gain_over_random.low > 0
        assert writer.p_value == pytest.approx(2.0**-writer.n_texts)


def test_copies_of_sinks_within_texts_add_no_evidence():
    """They change no interval's center and hardly its width; resampled sink by sink they would make
    it narrower by the square root of the copies."""

    def share(texts):
        assert any(text.sinks for text in texts)
        return ss.pool_attributions(texts, seed=3).writers[0].share

    once = [dataclasses.replace(text, controls=()) for text in attributions()]
    copied = [dataclasses.replace(text, sinks=text.sinks * 4) for text in once]
    a, b = share(once), share(copied)
    assert b.value == pytest.approx(a.value)
    assert (b.low, b.high) == pytest.approx((a.low, a.high))


def test_tokens_that_are_not_sinks_are_left_out():
    texts = attributions()
    chosen = dataclasses.replace(texts[0].sinks[0], kind="chosen")
    with_token = dataclasses.replace(texts[0], sinks=(*texts[0].sinks, chosen))
    pooled = ss.pool_attributions([with_token, *texts[1:]], seed=1)
    assert pooled == ss.pool_attributions(texts, seed=1)
    with pytest.raises(ss.InputError, match="tokens that are not sinks"):
        ss.pool_attributions([dataclasses.replace(texts[0], sinks=(chosen,))])


def test_representations():
    texts = attributions()
    pooled = ss.pool_attributions(texts)
    largest = pooled.writers[0]
    assert repr(pooled) == (
        f"PooledAttribution('planted', 4 texts, writer of {largest.n_sinks} sinks: "
        f"MLP {largest.layer})"
    )
    single = dataclasses.replace(texts[0], sinks=texts[0].sinks[:1])
    assert repr(ss.pool_attributions([single])) == (
        f"PooledAttribution('planted', 1 text, writer of 1 sink: MLP {single.sinks[0].writer})"
    )


def test_it_comes_back_from_disk(tmp_path):
    pooled = ss.pool_attributions(attributions(), seed=1)
    back = ss.PooledAttribution.load(pooled.save(tmp_path / "pooled.safetensors"))
    assert back == pooled
    assert back.to_frame()["writer"].tolist() == [writer.layer for writer in pooled.writers]


def test_other_models_are_not_pooled():
    with pytest.raises(ss.InputError, match="0 models"):
        ss.pool_attributions([])
    text = attributions()[0]
    other = dataclasses.replace(text, provenance=text.provenance.extended(weights="other"))
    with pytest.raises(ss.InputError, match="2 models"):
        ss.pool_attributions([text, other])
