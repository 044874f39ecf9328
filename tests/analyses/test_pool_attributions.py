"""Attributions of many texts: counts by hand, and intervals that know what a text is."""

from __future__ import annotations

import dataclasses
import functools

import pytest

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model


@functools.cache
def attributions():
    """Of four texts of the default planted model, which has two writers."""
    planted = planted_model()
    model = planted.load()
    return [
        ss.attribute_to_mlps(model, planted.tokens(64, seed=seed), n_controls=4, progress=False)
        for seed in range(4)
    ]


def test_writers_are_counted_over_texts():
    found = attributions()
    pooled = ss.pool_attributions(found)
    every = [sink for one in found for sink in one.sinks]
    assert pooled.n_sinks == len(every)
    assert {one.layer for one in pooled.writers} == {sink.writer for sink in every}
    for one in pooled.writers:
        own = [sink for sink in every if sink.writer == one.layer]
        assert one.n_sinks == len(own)
        assert one.share.value == pytest.approx(len(own) / len(every))
        assert one.share.low <= one.share.value <= one.share.high
        assert one.n_texts == sum(
            any(sink.writer == one.layer for sink in text.sinks) for text in found
        )
        feeders = {f for sink in own for f in sink.feeders}
        assert set(one.feeders) == feeders
        assert one.transplant_share.value == 1
        assert one.length_left.value < 0.25
        assert one.gain_over_random.low > 0
        assert one.p_value == pytest.approx(2.0**-one.n_texts)


def test_a_text_that_is_given_twice_is_no_second_witness_within_a_text():
    """Copies of sinks within texts change no interval's center and hardly its width; resampled
    sink by sink they would make it narrower by the square root of the copies."""
    once = attributions()
    many = [dataclasses.replace(one, sinks=one.sinks * 4) for one in once]

    def share(found):
        sinks = [(t, s.writer) for t, one in enumerate(found) for s in one.sinks]
        assert sinks
        pooled = ss.pool_attributions(
            [dataclasses.replace(one, controls=()) for one in found], seed=3
        )
        return pooled.writers[0].share

    # Copies index the same effects again, which a record of sinks alone does not need.
    a, b = share(once), share([_tiled(one, len(one.sinks)) for one in many])
    assert b.value == pytest.approx(a.value)
    assert (b.low, b.high) == pytest.approx((a.low, a.high))


def _tiled(attribution, n):
    """Effects of the copies stand where those of the sinks do."""

    def tile(part):
        return type(part)(
            **{
                name: value.repeat((n // len(value), 1)) if hasattr(value, "repeat") else value
                for name, value in vars(part).items()
            }
        )

    return dataclasses.replace(
        attribution, mlp_zero=tile(attribution.mlp_zero), transplant=tile(attribution.transplant)
    )


def test_it_comes_back_from_disk(tmp_path):
    pooled = ss.pool_attributions(attributions(), seed=1)
    back = ss.PooledAttribution.load(pooled.save(tmp_path / "pooled.safetensors"))
    assert back == pooled
    assert back.to_frame()["writer"].tolist() == [one.layer for one in pooled.writers]


def test_other_models_are_not_pooled():
    with pytest.raises(ss.InputError, match="0 models"):
        ss.pool_attributions([])
    one = attributions()[0]
    other = dataclasses.replace(one, model=one.model | {"name": "another"})
    with pytest.raises(ss.InputError, match="2 models"):
        ss.pool_attributions([one, other])
