"""Stages of the writer's MLP: cosines by hand in every family, a planted model, a real one."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model

HOOKS = {
    "input": "blocks.{}.mlp.hook_in",
    "gate": "blocks.{}.mlp.hook_pre",
    "pre": "blocks.{}.mlp.hook_pre",
    "up": "blocks.{}.mlp.hook_pre_linear",
    "product": "blocks.{}.mlp.hook_post",
    "output": "blocks.{}.mlp.hook_out",
    "written": "blocks.{}.hook_mlp_out",
}


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    model = planted_model()
    host = model.load()
    return host, ss.detect_sinks(host, model.tokens(64))


def test_cosines_are_those_of_the_recorded_stages(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(40)
    some = (
        ss.Sink(9, "", int(tokens[9]), "secondary", (1, 2)),
        ss.Sink(20, "", int(tokens[20]), "secondary", (2,)),
    )
    sinks = dataclasses.replace(ss.detect_sinks(model, tokens), sinks=some, phases=((0, 3),))
    found = ss.mlp_stage_alignment(model, sinks, writers={9: 1, 20: 2}, n_controls=3)
    cache = {}
    shown = [stage for stage in found.stages if stage in HOOKS]
    hooks = [
        (name, lambda value, hook, name=name: cache.__setitem__(name, value[0].clone()))
        for name in {HOOKS[stage].format(layer) for stage in shown for layer in range(3)}
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens[None], fwd_hooks=hooks)
    primary = found.primary_position
    for index, (position, layer) in enumerate(((9, 1), (20, 2))):
        for number, stage in enumerate(found.stages):
            if stage not in HOOKS:
                continue
            values = cache[HOOKS[stage].format(layer)]
            expected = torch.cosine_similarity(values[position], values[primary], dim=0)
            assert found.cosine[index, number].item() == pytest.approx(expected.item(), abs=1e-4)
            assert found.norm[index, number].item() == pytest.approx(
                values[position].norm().item(), rel=1e-4
            )
            born = found.emergence_cosine[index, number]
            if stage in ("input", "output", "written"):
                first = cache[HOOKS[stage].format(0)][primary]
                expected = torch.cosine_similarity(values[position], first, dim=0)
                assert born.item() == pytest.approx(expected.item(), abs=1e-4)
            else:
                assert born.isnan()
    assert (~found.ordinary.isnan()).all(), "there are enough tokens to compare with"
    assert [sink.n_matched for sink in found.sinks] == [3, 3]


def test_the_planted_writer_reads_another_feature_and_writes_the_same_direction():
    host, sinks = default()
    found = ss.mlp_stage_alignment(host, sinks, n_controls=6)
    by_stage = found.to_frame().pivot(index="position", columns="stage")
    assert {(s.writer, s.emergence) for s in found.sinks} == {(4, 1)}
    assert (by_stage["emergence_cosine"]["output"] > 0.95).all()
    assert (by_stage["emergence_cosine"]["input"] < 0.7).all()
    assert (by_stage["norm"]["output"] > 50 * by_stage["ordinary_norm"]["output"]).all()
    assert (by_stage["norm"]["output"] > 1e3 * by_stage["primary_norm"]["output"]).all()


def test_the_primary_is_like_itself():
    host, sinks = default()
    own = ss.mlp_stage_alignment(host, sinks, which=sinks.primary, n_controls=4)
    torch.testing.assert_close(own.cosine, torch.ones_like(own.cosine))
    assert own.sinks[0].writer == own.sinks[0].emergence == 1
    stages = [own.stages.index(stage) for stage in ("input", "output")]
    torch.testing.assert_close(own.emergence_cosine[:, stages], torch.ones(1, 2))


def test_band_table_and_file(tmp_path):
    host, sinks = default()
    found = ss.mlp_stage_alignment(host, sinks, n_controls=6, seed=5)
    middle, low, high = found.ordinary_band()
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert len(found.to_frame()) == 2 * len(found.stages)
    assert repr(found).startswith("MlpStages('planted', 2 sinks, median cosine: input ")
    back = ss.MlpStages.load(found.save(tmp_path / "stages.safetensors"))
    assert back.to_frame().equals(found.to_frame())
    assert (back.seed, back.sinks) == (5, found.sinks)
    again = ss.mlp_stage_alignment(host, sinks, n_controls=6, seed=5)
    assert torch.equal(again.ordinary, found.ordinary)


def test_bad_input():
    host, sinks = default()
    with pytest.raises(ss.InputError, match="n_controls is 0"):
        ss.mlp_stage_alignment(host, sinks, n_controls=0)
    with pytest.raises(ss.InputError, match="out of range"):
        ss.mlp_stage_alignment(host, sinks, writers=-1)


def test_qwen(qwen):
    """Unlike inputs become one output: the sinks are like the primary only behind the product."""
    from secondary_sinks.cli.app import demo_messages

    sinks = ss.detect_sinks(qwen, demo_messages(), max_tokens=48)
    which = [sink for sink in sinks.secondary if sink.position < 24]
    found = ss.mlp_stage_alignment(qwen, sinks, which=which)
    frame = found.to_frame()
    assert set(frame.writer) == {5}
    median = frame.groupby("stage").cosine.median()
    assert median["output"] > 0.98 > 0.9 > median["product"] > 0.75
    assert 0.3 < median["input"] < 0.7
    ordinary = frame.groupby("stage").ordinary_median.median()
    assert ordinary["gate"] > 0.7, "gates of all tokens are alike"
    assert abs(ordinary["product"]) < 0.1
