"""Attribution to MLPs: planted truth without a hint, the sum of direct writes, a real model."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.observe.residual_geometry import background_tokens
from secondary_sinks.planted.planted_model import planted_model, random_planted
from secondary_sinks.sinks.direct_writes import direct_writes

SEEDS = [0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 13, 15]  # of those with secondary sinks


@functools.cache
def planted(seed):
    """Truth, sink map, attribution and model of one random planted model."""
    model = random_planted(seed)
    host, tokens = model.load(), model.tokens(64)
    sinks = ss.detect_sinks(host, tokens)
    found = ss.attribute_to_mlps(host, sinks, n_controls=4, progress=False)
    return model.truth(tokens), sinks, found


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    model = planted_model()
    host = model.load()
    return host, ss.detect_sinks(host, model.tokens(64))


@pytest.mark.parametrize("seed", SEEDS)
def test_writers_and_feeders_are_the_planted_ones(seed):
    truth, _, found = planted(seed)
    assert len(found.sinks) == len(truth.sinks)
    by_position = {sink.position: sink for sink in found.sinks}
    for expected in truth.sinks:
        sink = by_position[expected.position]
        assert sink.verdict.reason == ""
        assert (sink.writer, sink.feeders) == (expected.writer, expected.feeders)
        assert sink.verdict.co_writers == sink.attention_feeders == ()
        assert (sink.onset, sink.lifetime) == (expected.onset, expected.lifetime)
        assert sink.verdict.write_share == pytest.approx(1, abs=0.25)
        assert sink.verdict.runner_up_share < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_transplants_make_the_planted_sink(seed):
    truth, _, found = planted(seed)
    rows = {sink.position: row for row, sink in enumerate(found.sinks)}
    for expected in truth.sinks:
        row = rows[expected.position]
        assert found.transplant.share[row, expected.writer] == 1
        assert found.transplant.lifetime[row, expected.writer] == expected.lifetime
        assert found.sinks[row].comparison.transplant_interval == (expected.lifetime,) * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_ablations_leave_an_ordinary_token(seed):
    truth, _, found = planted(seed)
    rows = {sink.position: row for row, sink in enumerate(found.sinks)}
    for expected in truth.sinks:
        row = rows[expected.position]
        own = found.sinks[row]
        for ablation in (found.mlp_zero, found.mlp_mean):
            assert ablation.lifetime[row, expected.writer] == 0
            assert ablation.norm[row, expected.writer] < own.norm
            assert ablation.alignment[row, expected.writer] < 0.9 < own.alignment
            assert ablation.score[row, expected.writer] < own.score
        bystanders = set(range(expected.writer)) - set(expected.feeders)
        assert all(found.mlp_zero.lifetime[row, m] == expected.lifetime for m in bystanders)
        kept = found.attention_zero.lifetime[row]
        assert (kept[: expected.writer + 1] > 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_controls_make_no_sinks(seed):
    """Random directions of the writer's norm, and what the same layer writes elsewhere."""
    _, sinks, found = planted(seed)
    taken = {sink.position for sink in sinks.sinks}
    frame = found.controls_frame()
    others = frame[(frame.test == "sufficiency") & (frame.kind != "other_layer")]
    made = others.groupby("kind").at_once.mean().to_dict()
    assert made.pop("writer") == 1
    assert set(made) <= {"random_direction", "same_token", "ordinary"}
    assert all(share == 0 for share in made.values())
    assert "random_direction" in made
    assert not taken & set(others.position)
    for sink in found.sinks:
        assert sink.comparison.p_value == 2**-4


@pytest.mark.parametrize("seed", SEEDS)
def test_direct_writes_of_planted_models_add_up(seed):
    _, _, found = planted(seed)
    check_sum(found.direct_write)


def check_sum(writes):
    parts = (writes.mlp + writes.attention).cumsum(dim=1) + writes.embedding[:, None]
    scale = float(writes.projection.abs().max().clamp_min(1))
    torch.testing.assert_close(parts, writes.projection, rtol=1e-4, atol=1e-4 * scale)
    assert writes.error < 1e-5


def test_direct_writes_add_up_in_every_family(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(24)
    sinks = ss.detect_sinks(model, tokens)
    some = [ss.Sink(p, "", int(tokens[p]), "secondary", (layer,)) for p, layer in ((5, 1), (23, 2))]
    writes = direct_writes(model, sinks, some)
    check_sum(writes)
    # By hand: the projection of the residual on the primary's direction in that layer.
    _, cache = model.run_with_cache(tokens[None])
    for row, sink in enumerate(some):
        residual = cache["resid_post", sink.l_start][0]
        common = residual[background_tokens(residual)].mean(dim=0)
        direction = residual[sinks.primary_position] - common
        direction = direction / direction.norm()
        written = cache["mlp_out", 0][0, sink.position] @ direction
        assert writes.mlp[row, 0].item() == pytest.approx(written.item(), rel=1e-3, abs=1e-4)
        whole = residual[sink.position] @ direction
        assert writes.projection[row, sink.l_start].item() == pytest.approx(
            whole.item(), rel=1e-3, abs=1e-4
        )


def test_a_residual_that_is_no_sum_is_refused():
    host, sinks = default()
    double = [("blocks.5.hook_resid_post", lambda value, hook: 2 * value)]
    with pytest.raises(ss.ModelError, match="do not add up"):
        direct_writes(host, sinks, sinks.secondary, fwd_hooks=double)


def test_seeds_choose_the_controls():
    host, sinks = default()

    def ask(seed):
        return ss.attribute_to_mlps(host, sinks, attention=False, n_controls=3, seed=seed)

    one, again, other = ask(1), ask(1), ask(2)
    assert one.controls == again.controls
    assert one.seed == 1
    assert torch.equal(one.mlp_zero.norm, again.mlp_zero.norm)
    assert one.controls != other.controls
    assert [s.writer for s in one.sinks] == [s.writer for s in other.sinks]
    assert one.attention_zero is None
    assert one.sinks[0].attention_feeders == ()


def test_the_same_answer_from_text_map_and_full_passes():
    host, sinks = default()
    kwargs = {"attention": False, "n_controls": 2, "progress": False}
    by_map = ss.attribute_to_mlps(host, sinks, **kwargs)
    by_text = ss.attribute_to_mlps(host, sinks.tokens, **kwargs)
    both = ss.attribute_to_mlps(host, sinks.tokens, sinks, which=sinks.secondary[:1], **kwargs)
    full = ss.attribute_to_mlps(host, sinks, which=sinks.secondary[:1], method="full", **kwargs)
    assert (by_map.engine, full.engine) == ("cached", "full")
    assert by_map.controls == by_text.controls
    assert both.sinks == by_map.sinks[:1]
    assert torch.equal(full.mlp_zero.lifetime, both.mlp_zero.lifetime)
    torch.testing.assert_close(full.mlp_mean.norm, both.mlp_mean.norm, rtol=1e-3, atol=1e-3)


def test_who_wrote_the_primary():
    host, sinks = default()
    found = ss.attribute_to_mlps(host, sinks, which=sinks.primary, n_controls=4)
    assert [sink.writer for sink in found.sinks] == [1]


def test_same_token_controls_are_taken_where_the_token_is_no_sink():
    host, sinks = default()
    first, second = sinks.secondary
    tokens = sinks.tokens.clone()
    tokens[40] = first.token_id
    again = ss.detect_sinks(host, tokens)
    fewer = dataclasses.replace(
        again, sinks=tuple(s for s in again.sinks if s.position != 40)
    )  # as if the token at 40 had not become one
    found = ss.attribute_to_mlps(host, fewer, n_controls=4, attention=False)
    frame = found.controls_frame()
    same = frame[frame.kind == "same_token"]
    assert set(same[same.test == "necessity"].position) == {40}
    assert set(same[same.test == "sufficiency"].source) == {40}
    assert not (frame[frame.kind != "same_token"].position == 40).any()
    assert second.position in set(frame.position)


def test_tables_figure_and_file(tmp_path):
    host, sinks = default()
    found = ss.attribute_to_mlps(host, sinks, n_controls=3)
    frame = found.to_frame()
    assert frame.writer.tolist() == [sink.writer for sink in found.sinks]
    assert frame.feeders.tolist() == [sink.feeders for sink in found.sinks]
    assert (frame.lifetime_without == 0).all()
    layers = found.layers_frame()
    assert len(layers) == 2 * found.n_layers
    at = layers[(layers.position == found.sinks[1].position) & (layers.layer == 4)]
    assert at["mlp_zero.norm"].item() == pytest.approx(found.mlp_zero.norm[1, 4].item())
    assert repr(found) == "MlpAttribution('planted', 2 sinks, writers: MLP 4 of 2)"
    assert "<table" in found._repr_html_()
    figure = found.plot()
    outlined = [p for p in figure.axes[0].patches if p.get_gid() == "writer"]
    assert [p.get_x() + 0.5 for p in outlined] == [4, 4]
    with pytest.raises(ss.InputError, match="cell"):
        found.plot(cell=0)
    for name, one in (
        ("whole", found),
        ("part", ss.attribute_to_mlps(host, sinks, attention=False, n_controls=3)),
    ):
        back = ss.MlpAttribution.load(one.save(tmp_path / f"{name}.safetensors"))
        assert (back.sinks, back.controls, back.model) == (one.sinks, one.controls, one.model)
        assert torch.equal(back.mlp_mean.norm, one.mlp_mean.norm)
        assert torch.equal(back.transplant.score, one.transplant.score)
        assert (back.direct_write.error, back.seed) == (one.direct_write.error, 0)
        assert (back.attention_zero is None) == (one.attention_zero is None)
        assert back.to_frame().equals(one.to_frame())
    with pytest.raises(ss.LoadError, match="not a MlpAttribution"):
        ss.MlpAttribution.load(sinks.save(tmp_path / "map.safetensors"))


def test_a_sink_without_writer_is_shown_as_such():
    host, sinks = default()
    found = ss.attribute_to_mlps(host, sinks, attention=False, n_controls=2)
    verdict = dataclasses.replace(
        found.sinks[0].verdict, writer=None, feeders=(), reason="the tests disagree"
    )
    unsure = dataclasses.replace(found.sinks[0], verdict=verdict)
    found = dataclasses.replace(found, sinks=(unsure, *found.sinks[1:]))
    assert repr(found).endswith("writers: no writer of 1, MLP 4 of 1)")
    assert found.to_frame().writer.isna().tolist() == [True, False]
    assert len([p for p in found.plot().axes[0].patches if p.get_gid() == "writer"]) == 1


def test_bad_input(tiny, tokens_of):
    host, sinks = default()
    bare = planted_model(secondary=())
    with pytest.raises(ss.InputError, match=r"no secondary sinks.*margins.*which="):
        ss.attribute_to_mlps(bare.load(), bare.tokens(48))
    with pytest.raises(ss.InputError, match="sink map is of"):
        ss.attribute_to_mlps(tiny("llama"), sinks)
    with pytest.raises(ss.InputError, match="other tokens"):
        ss.attribute_to_mlps(host, sinks.tokens.flip(0), sinks)
    with pytest.raises(ss.InputError, match="criterion='evidence'"):
        ss.attribute_to_mlps(host, ss.detect_sinks(host, sinks.tokens, criterion="published"))
    stranger = dataclasses.replace(sinks.secondary[0], position=50)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.attribute_to_mlps(host, sinks, which=[stranger])
    with pytest.raises(ss.InputError, match="which is empty"):
        ss.attribute_to_mlps(host, sinks, which=[])
    with pytest.raises(ss.InputError, match="which='all'"):
        ss.attribute_to_mlps(host, sinks, which="all")
    with pytest.raises(ss.InputError, match="n_controls is 0"):
        ss.attribute_to_mlps(host, sinks, n_controls=0)
    with pytest.raises(ss.InputError, match="one at a time"):
        ss.attribute_to_mlps(host, sinks.tokens.expand(2, -1))


def test_qwen(qwen):
    """The system prompt's sinks: written by MLP 5, fed by 3 and 4, found with no hint."""
    path = resources.files("secondary_sinks") / "data" / "demo_prompt.json"
    chat = json.loads(path.read_text())["messages"]
    sinks = ss.detect_sinks(qwen, chat, max_tokens=80)
    which = [sink for sink in sinks.secondary if sink.position < 24]
    assert [sink.position for sink in which] == [2, 3, 7, 12, 18, 20, 23]
    found = ss.attribute_to_mlps(
        qwen, sinks, which=which, attention=False, n_controls=4, progress=False
    )
    for sink in found.sinks:
        assert sink.writer == 5
        assert {3, 4} <= set(sink.feeders) <= {0, 1, 2, 3, 4}
        assert sink.verdict.write_share > 0.5
        assert sink.comparison.p_value == 2**-4
    after = found.mlp_zero.lifetime[:, 6:]
    assert (after > 0).all()
    check_sum(found.direct_write)
