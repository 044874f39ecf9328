"""Stages of the writer's MLP: cosines by hand in every family, a planted model, a real one."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.mlp_stage_alignment import stage_cosines, stage_norms
from secondary_sinks.cli.detect import demo_messages
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
    planted = planted_model()
    model = planted.load()
    return model, ss.detect_sinks(model, planted.tokens(64))


def test_cosines_are_those_of_the_recorded_stages(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(40)
    sinks = (
        ss.Sink(9, "", int(tokens[9]), "secondary", (1, 2)),
        ss.Sink(20, "", int(tokens[20]), "secondary", (2,)),
    )
    sink_map = dataclasses.replace(ss.detect_sinks(model, tokens), sinks=sinks, phases=((0, 3),))
    result = ss.mlp_stage_alignment(model, sink_map, writers={9: 1, 20: 2}, n_controls=3)
    assert result.writer_rule == "given"
    cache = {}
    shown = [stage for stage in result.stages if stage in HOOKS]
    hooks = [
        (name, lambda value, hook, name=name: cache.__setitem__(name, value[0].clone()))
        for name in {HOOKS[stage].format(layer) for stage in shown for layer in range(3)}
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens[None], fwd_hooks=hooks)
    primary = result.primary_position
    for index, (position, layer) in enumerate(((9, 1), (20, 2))):
        for number, stage in enumerate(result.stages):
            if stage not in HOOKS:
                continue
            values = cache[HOOKS[stage].format(layer)]
            expected = torch.cosine_similarity(values[position], values[primary], dim=0)
            assert result.cosine[index, number].item() == pytest.approx(expected.item(), abs=1e-4)
            assert result.norm[index, number].item() == pytest.approx(
                values[position].norm().item(), rel=1e-4
            )
            emergence = result.emergence_cosine[index, number]
            if stage in ("input", "output", "written"):
                first = cache[HOOKS[stage].format(0)][primary]
                expected = torch.cosine_similarity(values[position], first, dim=0)
                assert emergence.item() == pytest.approx(expected.item(), abs=1e-4)
            else:
                assert emergence.isnan()
    assert (~result.ordinary.isnan()).all(), "there are enough tokens to compare with"
    assert [sink.n_matched for sink in result.sinks] == [3, 3]


@pytest.mark.slow
def test_the_planted_writer_reads_another_feature_and_writes_the_same_direction():
    result = ss.mlp_stage_alignment(*default(), n_controls=6)
    by_stage = result.to_frame().pivot(index="position", columns="stage")
    assert {(s.writer, s.emergence) for s in result.sinks} == {(4, 1)}
    assert result.writer_rule == "largest_write"
    assert (by_stage["emergence_cosine"]["output"] > 0.95).all()
    assert (by_stage["emergence_cosine"]["input"] < 0.7).all()
    assert (by_stage["norm"]["output"] > 50 * by_stage["ordinary_norm"]["output"]).all()
    assert (by_stage["norm"]["output"] > 1e3 * by_stage["primary_norm"]["output"]).all()


def test_the_primary_is_like_itself():
    result = ss.mlp_stage_alignment(*default(), sinks="primary", n_controls=4)
    torch.testing.assert_close(result.cosine, torch.ones_like(result.cosine))
    assert result.sinks[0].writer == result.sinks[0].emergence == 1
    stages = [result.stages.index(stage) for stage in ("input", "output")]
    torch.testing.assert_close(result.emergence_cosine[:, stages], torch.ones(1, 2))


def test_a_token_that_is_not_a_sink_is_like_ordinary_ones():
    model, sink_map = default()
    sink = sink_map.secondary[0]
    position = next(p for p in range(20, 40) if p not in {s.position for s in sink_map.sinks})
    result = ss.mlp_stage_alignment(model, sink_map, sinks=[position, sink], writers=4)
    assert repr(result).startswith("MlpStages('planted', 1 sink and 1 chosen token, median")
    frame = result.to_frame().set_index(["kind", "stage"])
    assert frame.loc[("chosen", "output"), "emergence_cosine"] < 0.5
    assert (
        frame.loc[("chosen", "output"), "norm"] < 0.05 * frame.loc[("secondary", "output"), "norm"]
    )
    alone = ss.mlp_stage_alignment(model, sink_map, sinks=position)
    assert (alone.sinks[0].kind, alone.sinks[0].onset) == ("chosen", sink.l_start)


def test_band_table_and_file(tmp_path):
    model, sink_map = default()
    result = ss.mlp_stage_alignment(model, sink_map, n_controls=6, seed=5)
    middle, low, high = result.ordinary_band()
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert len(result.to_frame()) == 2 * len(result.stages)
    assert repr(result).startswith("MlpStages('planted', 2 sinks, median cosine: input ")
    loaded = ss.MlpStages.load(result.save(tmp_path / "stages.safetensors"))
    assert loaded.to_frame().equals(result.to_frame())
    assert (loaded.provenance, loaded.sinks) == (result.provenance, result.sinks)
    assert loaded.provenance.seed == 5
    again = ss.mlp_stage_alignment(model, sink_map, n_controls=6, seed=5)
    assert torch.equal(again.ordinary, result.ordinary)


def test_bad_input():
    model, sink_map = default()
    with pytest.raises(ss.InputError, match="n_controls is 0"):
        ss.mlp_stage_alignment(model, sink_map, n_controls=0)
    with pytest.raises(ss.InputError, match="out of range"):
        ss.mlp_stage_alignment(model, sink_map, writers=-1)


def test_stages_that_are_missing_or_zero_have_no_cosine():
    tokens = {"input": torch.tensor([[1.0, 0], [0, 0]]), "up": torch.ones(2, 3)}
    other = {"input": torch.tensor([[1.0, 1.0]])}
    cosines = stage_cosines(tokens, other, ("input", "up", "output"))
    assert cosines[0, 0].item() == torch.tensor(0.5).sqrt().item()
    assert cosines.isnan().tolist() == [[False, True, True], [True, True, True]]
    assert stage_norms(tokens, ("up", "gate"))[0, 0] == torch.tensor(3.0).sqrt()


def test_qwen(qwen):
    """Unlike inputs become one output: the sinks are like the primary only behind the product."""
    sink_map = ss.detect_sinks(qwen, demo_messages(), max_tokens=48)
    sinks = [sink for sink in sink_map.secondary if sink.position < 24]
    frame = ss.mlp_stage_alignment(qwen, sink_map, sinks=sinks).to_frame()
    assert set(frame.writer) == {5}
    median = frame.groupby("stage").cosine.median()
    assert median["output"] > 0.98 > 0.9 > median["product"] > 0.75
    assert 0.3 < median["input"] < 0.7
    ordinary = frame.groupby("stage").ordinary_median.median()
    assert ordinary["gate"] > 0.7, "gates of all tokens are alike"
    assert abs(ordinary["product"]) < 0.1
