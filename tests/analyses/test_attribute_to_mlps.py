"""Attribution to MLPs: planted writers without a hint, tokens that are not sinks, a real model."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.attribute_to_mlps import spell_writers
from secondary_sinks.planted.planted_model import planted_model, random_planted
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.writers import resolve_writers

SEEDS = [1, 2, 4, 8, 13, 15]  # both architectures, one and two phases, feeders and none


@functools.cache
def planted(seed):
    """Truth, sink map and attribution of one random planted model."""
    model = random_planted(seed)
    loaded, tokens = model.load(), model.tokens(64)
    sink_map = ss.detect_sinks(loaded, tokens)
    attribution = ss.attribute_to_mlps(loaded, sink_map, n_controls=4, progress=False)
    return model.truth(tokens), sink_map, attribution


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    model = planted_model()
    loaded = model.load()
    return loaded, ss.detect_sinks(loaded, model.tokens(64))


@functools.cache
def attributed():
    """The attribution of that text."""
    return ss.attribute_to_mlps(*default(), n_controls=3, progress=False)


def check_sum(writes):
    parts = (writes.mlp + writes.attention).cumsum(dim=1) + writes.embedding[:, None]
    scale = float(writes.projection.abs().max().clamp_min(1))
    torch.testing.assert_close(parts, writes.projection, rtol=1e-4, atol=1e-4 * scale)
    assert writes.error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_writers_and_feeders_are_the_planted_ones(seed):
    truth, _, attribution = planted(seed)
    assert len(attribution.sinks) == len(truth.sinks)
    by_position = {sink.position: sink for sink in attribution.sinks}
    for expected in truth.sinks:
        sink = by_position[expected.position]
        assert sink.verdict.reason == ""
        assert (sink.writer, sink.feeders) == (expected.writer, expected.feeders)
        assert sink.verdict.co_writers == sink.attention_feeders == ()
        assert (sink.onset, sink.lifetime) == (expected.onset, expected.lifetime)
        assert sink.verdict.write_share == pytest.approx(1, abs=0.25)
        assert sink.verdict.runner_up_share < 0.05
    assert attribution.writers == {sink.position: sink.writer for sink in truth.sinks}
    check_sum(attribution.direct_write)


@pytest.mark.parametrize("seed", SEEDS)
def test_transplants_make_the_planted_sink(seed):
    truth, _, attribution = planted(seed)
    rows = {sink.position: row for row, sink in enumerate(attribution.sinks)}
    for expected in truth.sinks:
        row = rows[expected.position]
        sink = attribution.sinks[row]
        assert attribution.transplant.share[row, expected.writer] == 1
        assert sink.verdict.transplant_share == 1
        assert attribution.transplant.lifetime[row, expected.writer] == expected.lifetime
        assert sink.comparison.transplant_interval == (expected.lifetime,) * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_ablations_leave_an_ordinary_token(seed):
    truth, _, attribution = planted(seed)
    rows = {sink.position: row for row, sink in enumerate(attribution.sinks)}
    for expected in truth.sinks:
        row = rows[expected.position]
        sink = attribution.sinks[row]
        for ablation in (attribution.mlp_zero, attribution.mlp_mean):
            assert ablation.lifetime[row, expected.writer] == 0
            assert ablation.norm[row, expected.writer] < sink.norm
            assert ablation.alignment[row, expected.writer] < 0.9 < sink.alignment
            assert ablation.score[row, expected.writer] < sink.score
        bystanders = set(range(expected.writer)) - set(expected.feeders)
        lifetime = attribution.mlp_zero.lifetime[row]
        assert all(lifetime[layer] == expected.lifetime for layer in bystanders)
        without_attention = attribution.attention_zero.lifetime[row]
        assert (without_attention[: expected.writer + 1] > 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_controls_make_no_sinks(seed):
    """Random directions of the writer's norm, and what the same layer writes elsewhere."""
    _, sink_map, attribution = planted(seed)
    sinks = {sink.position for sink in sink_map.sinks}
    frame = attribution.controls_frame()
    others = frame[(frame.test == "sufficiency") & (frame.kind != "other_layer")]
    made = others.groupby("kind").at_once.mean().to_dict()
    assert made.pop("writer") == 1
    assert set(made) <= {"random_direction", "same_token", "ordinary"}
    assert all(share == 0 for share in made.values())
    assert "random_direction" in made
    assert not sinks & set(others.position)
    for sink in attribution.sinks:
        assert sink.comparison.p_value == 2**-4


@pytest.mark.slow
def test_seeds_choose_the_controls():
    model, sink_map = default()

    def ask(seed):
        return ss.attribute_to_mlps(model, sink_map, attention=False, n_controls=3, seed=seed)

    first, again, other = ask(1), ask(1), ask(2)
    assert first.controls == again.controls
    assert first.provenance.seed == 1
    assert torch.equal(first.mlp_zero.norm, again.mlp_zero.norm)
    assert first.controls != other.controls
    assert [s.writer for s in first.sinks] == [s.writer for s in other.sinks]
    assert first.attention_zero is None
    assert first.sinks[0].attention_feeders == ()


@pytest.mark.slow
def test_full_passes_give_the_same_answer():
    model, sink_map = default()
    sinks = sink_map.secondary[:1]
    kwargs = {"attention": False, "n_controls": 1, "progress": False}
    both = ss.attribute_to_mlps(model, sink_map, **kwargs)
    first = ss.attribute_to_mlps(model, sink_map, sinks=sinks, **kwargs)
    full = ss.attribute_to_mlps(model, sink_map, sinks=sinks, method="full", **kwargs)
    assert (first.provenance.engine, full.provenance.engine) == ("cached", "full")
    assert first.sinks == both.sinks[:1]
    assert first.controls == tuple(c for c in both.controls if c.sink == 0)
    assert torch.equal(full.mlp_zero.lifetime, first.mlp_zero.lifetime)
    torch.testing.assert_close(full.mlp_mean.norm, first.mlp_mean.norm, rtol=1e-3, atol=1e-3)


def test_the_primary_has_a_writer_too():
    model, sink_map = default()
    attribution = ss.attribute_to_mlps(model, sink_map, sinks="primary", n_controls=4)
    assert [sink.writer for sink in attribution.sinks] == [1]
    assert repr(attribution) == "MlpAttribution('planted', writer of 1 sink: MLP 1)"


def test_other_analyses_take_the_writers():
    model, sink_map = default()
    writers = resolve_writers(model, sink_map, sink_map.secondary, attributed().writers)
    assert (writers.layers, writers.rule) == ((4, 4), "given")
    first, second = sink_map.secondary
    some = resolve_writers(model, sink_map, [first, second], {first.position: 3})
    assert (some.layers, some.rule) == ((3, 4), "mixed"), "the other has the largest write"
    alone = resolve_writers(model, sink_map, [first, second])
    assert (alone.layers, alone.rule) == ((4, 4), "largest_write")
    with pytest.raises(ss.InputError, match="the sinks are at"):
        resolve_writers(model, sink_map, [first], {second.position: 3})


def test_a_token_that_is_not_a_sink_is_measured_and_not_called_one():
    model, sink_map = default()
    position = int(ordinary_tokens(sink_map)[20:].nonzero()[0]) + 20
    sink = sink_map.secondary[0]
    attribution = ss.attribute_to_mlps(
        model, sink_map, sinks=[sink, position], n_controls=3, progress=False
    )
    of_sink, of_token = attribution.sinks
    assert of_sink.writer == 4
    assert (of_token.kind, of_token.lifetime) == ("chosen", 0)
    assert of_token.onset == sink_map.select(position)[0].l_start
    assert of_token.verdict.reason == f"the token at position {position} is not a sink"
    assert of_token.writer is None
    assert of_token.feeders == of_token.verdict.co_writers == of_token.attention_feeders == ()
    assert attribution.writers == {sink.position: 4}
    # Its effects are those of an ordinary token.
    for ablation in (attribution.mlp_zero, attribution.mlp_mean, attribution.attention_zero):
        assert (ablation.lifetime[1] == 0).all()
        assert ablation.norm[1].isfinite().all()
        assert (ablation.norm[1] < of_sink.norm).all()
        assert (ablation.score[1] < of_sink.score / 5).all()
    assert (attribution.transplant.share[1] == 0).all()
    controls = [control for control in attribution.controls if control.sink == 1]
    assert controls
    for control in controls:
        if control.kind in ("writer", "other_layer"):
            assert (control.position == position) == (control.test == "necessity")
            assert control.source in (position, -1)
        else:
            assert position not in (control.position, control.source)
    assert repr(attribution) == (
        "MlpAttribution('planted', writer of 1 sink: MLP 4; 1 token that is not a sink)"
    )
    frame = attribution.to_frame()
    assert frame.kind.tolist() == ["secondary", "chosen"]
    assert frame.writer.isna().tolist() == [False, True]
    patches = attribution.plot().axes[0].patches
    assert len([patch for patch in patches if patch.get_gid() == "writer"]) == 1


def test_same_token_controls_are_taken_where_the_token_is_not_a_sink():
    model, sink_map = default()
    first, second = sink_map.secondary
    tokens = sink_map.tokens.clone()
    tokens[40] = first.token_id
    again = ss.detect_sinks(model, tokens)
    fewer = dataclasses.replace(
        again, sinks=tuple(s for s in again.sinks if s.position != 40)
    )  # as if the token at 40 had not become one
    attribution = ss.attribute_to_mlps(model, fewer, n_controls=4, attention=False)
    frame = attribution.controls_frame()
    same = frame[frame.kind == "same_token"]
    assert set(same[same.test == "necessity"].position) == {40}
    assert set(same[same.test == "sufficiency"].source) == {40}
    assert not (frame[frame.kind != "same_token"].position == 40).any()
    assert second.position in set(frame.position)


def test_tables_figure_and_file(tmp_path):
    model, sink_map = default()
    attribution = attributed()
    frame = attribution.to_frame()
    assert frame.writer.tolist() == [sink.writer for sink in attribution.sinks]
    assert frame.feeders.tolist() == [sink.feeders for sink in attribution.sinks]
    assert (frame.lifetime_without == 0).all()
    layers = attribution.layers_frame()
    assert len(layers) == 2 * attribution.n_layers
    at = layers[(layers.position == attribution.sinks[1].position) & (layers.layer == 4)]
    assert at["mlp_zero.norm"].item() == pytest.approx(attribution.mlp_zero.norm[1, 4].item())
    assert repr(attribution) == "MlpAttribution('planted', writer of 2 sinks: MLP 4)"
    assert "<table" in attribution._repr_html_()
    figure = attribution.plot()
    outlined = [p for p in figure.axes[0].patches if p.get_gid() == "writer"]
    assert [p.get_x() + 0.5 for p in outlined] == [4, 4]
    with pytest.raises(ss.InputError, match="cell"):
        attribution.plot(cell=0)
    part = ss.attribute_to_mlps(model, sink_map, attention=False, n_controls=3)
    for name, saved in (("whole", attribution), ("part", part)):
        loaded = ss.MlpAttribution.load(saved.save(tmp_path / f"{name}.safetensors"))
        assert (loaded.sinks, loaded.controls) == (saved.sinks, saved.controls)
        assert loaded.provenance == saved.provenance
        assert torch.equal(loaded.mlp_mean.norm, saved.mlp_mean.norm)
        assert torch.equal(loaded.transplant.score, saved.transplant.score)
        assert (loaded.direct_write.error, loaded.provenance.seed) == (saved.direct_write.error, 0)
        assert (loaded.attention_zero is None) == (saved.attention_zero is None)
        assert loaded.to_frame().equals(saved.to_frame())
    with pytest.raises(ss.LoadError, match="not a MlpAttribution"):
        ss.MlpAttribution.load(sink_map.save(tmp_path / "map.safetensors"))


def test_a_sink_without_writer_is_shown_as_such():
    attribution = attributed()
    verdict = dataclasses.replace(
        attribution.sinks[0].verdict, writer=None, feeders=(), reason="the tests disagree"
    )
    unsure = dataclasses.replace(attribution.sinks[0], verdict=verdict)
    attribution = dataclasses.replace(attribution, sinks=(unsure, *attribution.sinks[1:]))
    assert repr(attribution).endswith("writers: none of 1 sink, MLP 4 of 1)")
    assert attribution.to_frame().writer.isna().tolist() == [True, False]
    assert attribution.writers == {attribution.sinks[1].position: 4}
    assert len([p for p in attribution.plot().axes[0].patches if p.get_gid() == "writer"]) == 1


@pytest.mark.parametrize(
    ("writers", "expected"),
    [
        ([], "no sinks"),
        ([5], "writer of 1 sink: MLP 5"),
        ([None], "writer of 1 sink: none"),
        ([5, 5], "writer of 2 sinks: MLP 5"),
        ([None, None], "writer of 2 sinks: none"),
        ([5, None, 5, 5, 5, 5, 5], "writers: MLP 5 of 6 sinks, none of 1"),
    ],
)
def test_writers_in_words(writers, expected):
    assert spell_writers(writers) == expected


@pytest.mark.slow
def test_bad_input(tiny):
    model, sink_map = default()
    bare = planted_model(secondary=()).load()
    bare_map = ss.detect_sinks(bare, planted_model(secondary=()).tokens(48))
    with pytest.raises(ss.InputError, match=r"no secondary sinks.*margins.*sinks="):
        ss.attribute_to_mlps(bare, bare_map)
    with pytest.raises(ss.InputError, match="the sink map was measured in"):
        ss.attribute_to_mlps(tiny("llama"), sink_map)
    with pytest.raises(ss.InputError, match="expected a sink map, got Tensor"):
        ss.attribute_to_mlps(model, sink_map.tokens)
    published = ss.detect_sinks(model, sink_map.tokens, criterion="published")
    with pytest.raises(ss.InputError, match="criterion='evidence'"):
        ss.attribute_to_mlps(model, published)
    elsewhere = dataclasses.replace(sink_map.secondary[0], position=50)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.attribute_to_mlps(model, sink_map, sinks=[elsewhere])
    with pytest.raises(ss.InputError, match="no selected sinks"):
        ss.attribute_to_mlps(model, sink_map, sinks=[])
    with pytest.raises(ss.InputError, match="sinks='some'"):
        ss.attribute_to_mlps(model, sink_map, sinks="some")
    with pytest.raises(ss.InputError, match="n_controls must be 1 or more, got 0"):
        ss.attribute_to_mlps(model, sink_map, n_controls=0)
    with pytest.raises(ss.InputError, match="expected a sink map, got list"):
        ss.attribute_to_mlps(model, [sink_map, sink_map])
    means = ss.mean_activations(bare, bare_map, progress=False)
    with pytest.raises(ss.InputError, match=r"the mean activations"):
        ss.attribute_to_mlps(model, sink_map, means=means)


def test_qwen(qwen):
    """The system prompt's sinks: written by MLP 5, fed by 3 and 4, found with no hint."""
    path = resources.files("secondary_sinks") / "data" / "demo_prompt.json"
    chat = json.loads(path.read_text())["messages"]
    sink_map = ss.detect_sinks(qwen, chat, max_tokens=80)
    sinks = [sink for sink in sink_map.secondary if sink.position < 24]
    assert [sink.position for sink in sinks] == [2, 3, 7, 12, 18, 20, 23]
    attribution = ss.attribute_to_mlps(
        qwen, sink_map, sinks=sinks, attention=False, n_controls=4, progress=False
    )
    for sink in attribution.sinks:
        assert sink.writer == 5
        assert {3, 4} <= set(sink.feeders) <= {0, 1, 2, 3, 4}
        assert sink.verdict.write_share > 0.5
        assert sink.comparison.p_value == 2**-4
    after = attribution.mlp_zero.lifetime[:, 6:]
    assert (after > 0).all()
    check_sum(attribution.direct_write)
