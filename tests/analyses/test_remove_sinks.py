"""Removing sinks: the planted truth, TransformerLens by hand, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.remove_sinks import SinkRemoval
from secondary_sinks.intervene import whole_text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.whole_text import run_whole_texts, texts_per_pass
from secondary_sinks.planted.planted_model import planted_model, random_planted

N = 24
I = ss.Intervention  # noqa: E741


@pytest.fixture(scope="module")
def planted():
    """A planted model, the truth about a text, the model in a bridge, and the text's map."""
    model = planted_model()
    bridge, tokens = model.load(), model.tokens(96)
    return model, model.truth(tokens), bridge, ss.detect_sinks(bridge, tokens)


@pytest.fixture(scope="module")
def removal(planted):
    *_, bridge, sink_map = planted
    return ss.remove_sinks(bridge, sink_map, seed=3)


def test_the_planted_primary_rises_where_the_sinks_lived(planted, removal):
    _, truth, _, _ = planted
    assert removal.writer_rule == "largest_write"
    assert {*removal.where} == {(s.position, s.writer) for s in truth.sinks}
    live = {x + 1 for s in truth.sinks for x in range(s.onset, s.onset + s.lifetime)}
    assert removal.live_layers == sorted(live)
    assert not removal.is_sink.any()
    frame = removal.to_frame()
    assert (frame.change[frame.live] > 0.05).all()
    assert frame.change[~frame.live].abs().max() < 0.002
    assert (removal.primary_control - removal.primary_clean).abs().max() < 0.002
    assert removal.p_value == pytest.approx(1 / 6)


def test_only_sink_heads_change(planted, removal):
    model, *_ = planted
    heads = removal.heads()
    assert {*heads["head"][heads.change.abs() > 0.05]} == set(range(model.plan.n_sink_heads))


def test_the_reverse_lowers_the_primary(planted):
    _, truth, bridge, sink_map = planted
    added = ss.remove_sinks(bridge, sink_map, reverse=True)
    assert added.reverse
    assert added.donors == tuple(s.position for s in truth.sinks)
    assert added.is_sink.any(dim=1).all()
    assert not {p for p, _ in added.where} & set(added.donors)
    frame = added.to_frame()
    assert (frame.change[frame.live] < -0.005).all()
    assert (added.primary_control - added.primary_clean).abs().max() < 0.002


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 5, 8])
def test_random_planted_models(seed):
    model = random_planted(seed)
    bridge = model.load()
    sink_map = ss.detect_sinks(bridge, model.tokens(72))
    removed = ss.remove_sinks(bridge, sink_map, n_controls=2, progress=False)
    added = ss.remove_sinks(bridge, sink_map, reverse=True, n_controls=1, progress=False)
    assert not removed.is_sink.any()
    assert removed.primary_edited > removed.primary_clean + 0.01
    assert added.primary_edited < added.primary_clean - 0.005
    for one in (removed, added):
        assert (one.primary_control - one.primary_clean).abs().max() < 0.004


def test_a_feeder_named_as_writer_removes_its_sink_as_well(planted):
    _, truth, bridge, sink_map = planted
    fed = [s for s in truth.sinks if s.feeders]
    chosen = [s.position for s in fed]
    writers = {s.position: s.feeders[0] for s in fed}
    one = ss.remove_sinks(bridge, sink_map, sinks=chosen, writers=writers, n_controls=0)
    assert one.writer_rule == "given"
    assert one.where == tuple(sorted(writers.items()))
    assert not one.is_sink.any()
    assert one.primary_edited > one.primary_clean
    assert one.p_value == 1
    both = {s.position: [s.feeders[0], s.writer] for s in fed}
    two = ss.remove_sinks(bridge, sink_map, sinks=chosen, writers=both, n_controls=0)
    assert len(two.where) == 2 * len(fed)
    assert two.tokens_frame().writers.tolist() == [(s.feeders[0], s.writer) for s in fed]


def test_tokens_that_are_not_sinks(planted):
    _, _, bridge, sink_map = planted
    nothing = ss.remove_sinks(bridge, sink_map, sinks=[7, 30], n_controls=2)
    assert [sink.kind for sink in nothing.sinks] == ["chosen", "chosen"]
    assert nothing.tokens_frame().outcome.tolist() == ["edited, never a sink"] * 2
    assert "2 tokens edited, never sinks: score" in repr(nothing)
    assert "removed" not in repr(nothing)
    assert nothing.primary_edited == pytest.approx(nothing.primary_clean, abs=0.002)
    assert not {7, 30} & {p for control in nothing.control_where for p, _ in control}
    written = bridge_output(bridge, sink_map, sink_map.secondary[0])
    made = ss.remove_sinks(
        bridge, sink_map, sinks=7, writers=4, edit=ss.Replace(written), n_controls=0
    )
    assert "1 token became a sink" in repr(made)
    assert made.primary_edited < made.primary_clean


def bridge_output(model, sink_map, sink):
    """The output of MLP 4 at a sink."""
    value = {}
    hook = ("blocks.4.hook_mlp_out", lambda v, hook: value.update(out=v[0, sink.position].clone()))
    with torch.no_grad():
        model.run_with_hooks(sink_map.tokens[None], fwd_hooks=[hook])
    return value["out"]


def test_the_result_says_what_became_of_each_sink(planted):
    """A sink that is weaker is not removed, and one life of two may stay."""
    _, _, bridge, sink_map = planted
    sink = sink_map.secondary[0]
    run = functools.partial(ss.remove_sinks, bridge, sink_map, sinks=sink, n_controls=0)
    weaker = run(edit=ss.Scale(0.3))
    assert weaker.tokens_frame().outcome.tolist() == ["weakened, still aligned"]
    assert weaker.is_sink.any()
    assert repr(weaker).startswith("SinkRemoval(1 sink weakened, still aligned: score 0.144 to 0.")
    assert "no controls" in repr(weaker)
    same = run(edit=ss.Scale(1.0))
    assert "1 sink still a sink" in repr(same)
    halves = sink.layers[:2], sink.layers[2:]
    lives = [dataclasses.replace(sink, layers=layers) for layers in halves]
    others = [one for one in sink_map.sinks if one is not sink]
    divided = dataclasses.replace(sink_map, sinks=(*others, *lives))
    kept = ss.remove_sinks(
        bridge, divided, sinks=lives[0], edit=ss.Scale(1.0), writers=4, n_controls=0
    )
    assert kept.is_sink[0].nonzero().flatten().tolist() == list(halves[0])


def test_the_primary_can_be_removed(planted):
    _, _, bridge, sink_map = planted
    removed = ss.remove_sinks(bridge, sink_map, sinks="primary", n_controls=1)
    assert removed.tokens_frame().outcome.tolist() == ["removed"]
    assert removed.primary_edited < removed.primary_clean / 5


def test_many_edits_equal_transformer_lens_by_hand(tiny, family, tokens_of, visible_keys):
    model, tokens = tiny(family), tokens_of(N)
    clean = CleanRun(ss.detect_sinks(model, tokens))
    edits = [I("mlp_out", 1, p, ss.Zero()) for p in (3, 5, 11)]
    edits.append(I("mlp_out", 0, 7, ss.Resample(2)))
    before, (after,) = run_whole_texts(model, clean, [edits])

    def zero(value, hook):
        value[:, [3, 5, 11]] = 0
        return value

    def resample(value, hook):
        value[:, 7] = value[:, 2]
        return value

    patterns, residuals = [], []
    logits = model.run_with_hooks(
        tokens[None],
        fwd_hooks=[
            ("blocks.1.hook_mlp_out", zero),
            ("blocks.0.hook_mlp_out", resample),
            *(
                (f"blocks.{x}.attn.hook_pattern", lambda v, hook: patterns.append(v[0]))
                for x in range(3)
            ),
            *(
                (f"blocks.{x}.hook_resid_post", lambda v, hook: residuals.append(v[0]))
                for x in range(3)
            ),
        ],
    )[0].detach()
    for layer in range(3):
        pattern = patterns[layer]
        n_seeing = visible_keys(family, N)[layer].tril(-1).sum(dim=0)[:-1]
        expected = pattern.tril(-1).sum(dim=1)[:, :-1] / n_seeing
        torch.testing.assert_close(after.sink_score[layer, :, :-1], expected.detach())
        torch.testing.assert_close(
            after.norm[layer], residuals[layer].norm(dim=-1).detach(), rtol=1e-4, atol=1e-4
        )
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
    assert after.output.loss == pytest.approx(loss.item(), rel=1e-4)
    unedited = model(tokens[None])[0].detach()
    kl = (unedited.softmax(-1) * (unedited.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(after.output.token_kl, kl, rtol=1e-3, atol=1e-5)
    assert before.output.kl == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(before.sink_score[..., :-1], clean.score[..., :-1])


def test_results_do_not_depend_on_the_chunks(planted, removal, monkeypatch):
    *_, bridge, sink_map = planted
    assert texts_per_pass(bridge, 96, 1, logits=True) == 1
    small = ss.remove_sinks(bridge, sink_map, seed=3, memory_budget=1, progress=False)
    assert small.control_where == removal.control_where
    torch.testing.assert_close(small.control_score, removal.control_score, equal_nan=True)
    real, sizes = whole_text._one_pass, []

    def small_machine(model, clean, chunk, *rest):
        sizes.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("no more")
        return real(model, clean, chunk, *rest)

    monkeypatch.setattr(whole_text, "_one_pass", small_machine)
    again = ss.remove_sinks(bridge, sink_map, seed=3, progress=False)
    torch.testing.assert_close(again.edited_score, removal.edited_score, equal_nan=True)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(whole_text, "_one_pass", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ss.ModelError, match="do not fit"):
        ss.remove_sinks(bridge, sink_map, progress=False)


def test_controls_are_seeded_ordinary_and_nearby(planted, removal):
    *_, bridge, sink_map = planted
    again, other = (ss.remove_sinks(bridge, sink_map, seed=seed) for seed in (3, 4))
    assert again.control_where == removal.control_where
    assert other.control_where != removal.control_where
    assert len(set(removal.control_where)) == len(removal.control_where)
    taken = {p for p, _ in removal.where} | {0}
    for control in removal.control_where:
        positions = [p for p, _ in control]
        assert len(set(positions)) == len(removal.where)
        assert not set(positions) & taken
        for (p, layer), (q, other) in zip(control, removal.where, strict=True):
            assert layer == other
            assert abs(p - q) <= 2 * 16


def test_save_frame_and_figure(planted, removal, tmp_path):
    loaded = SinkRemoval.load(removal.save(tmp_path / "removal.safetensors"))
    for entry in dataclasses.fields(SinkRemoval):
        one, other = getattr(removal, entry.name), getattr(loaded, entry.name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, equal_nan=True)
        else:
            assert one == other, entry.name
    assert repr(loaded) == repr(removal)
    assert repr(removal).startswith("SinkRemoval(3 sinks removed: score 0.1")
    assert repr(removal).endswith("5 controls)")
    assert "control 4" in removal._repr_html_()
    assert list(removal.summary()["run"])[:3] == ["clean", "edited", "control 0"]
    figure = removal.plot()
    panels = {axes.get_label(): axes for axes in figure.axes}
    edited = next(line for line in panels["primary"].lines if line.get_gid() == "edited")
    assert list(edited.get_ydata()) == removal.to_frame()["edited"].tolist()
    assert removal.provenance.seed == 3
    other = planted[-1].save(tmp_path / "map.safetensors")
    with pytest.raises(ss.LoadError, match="not a SinkRemoval"):
        SinkRemoval.load(other)


def test_without_controls(planted):
    *_, bridge, sink_map = planted
    alone = ss.remove_sinks(bridge, sink_map, n_controls=0)
    assert alone.to_frame()["control"].isna().all()
    assert alone.plot().axes
    assert len(alone.summary()) == 2


def test_bad_input(planted, tiny, tokens_of):
    model, _, bridge, sink_map = planted
    at = sink_map.secondary[0].position
    empty = ss.detect_sinks(tiny("llama"), tokens_of(N))
    few = sink_map.provenance.extended(thresholds=sink_map.thresholds | {"min_queries": 95})
    for expected, arguments, message in (
        (empty, {}, "no secondary sinks"),
        (sink_map, {"writers": {at: 12}, "sinks": at}, "writer 12 is out of range"),
        (sink_map, {"writers": {1: 4}}, "the sinks are at"),
        (sink_map, {"writers": {at: []}, "sinks": at}, "the sinks are at"),
        (sink_map, {"sinks": []}, "no selected sinks"),
        (sink_map, {"sinks": [96]}, "from 0 to 95"),
        (sink_map, {"sinks": dataclasses.replace(sink_map.secondary[0], layers=(2,))}, "not a si"),
        (sink_map, {"reverse": True, "edit": ss.Mean()}, "no other edit"),
        (sink_map, {"n_controls": -1}, "n_controls"),
        (dataclasses.replace(sink_map, provenance=few), {}, "too few ordinary tokens"),
    ):
        with pytest.raises(ss.InputError, match=message):
            ss.remove_sinks(tiny("llama") if expected is empty else bridge, expected, **arguments)
    with pytest.raises(ss.InputError, match="sink map was measured in"):
        ss.remove_sinks(tiny("llama"), sink_map)
    with pytest.raises(ss.InputError, match="expected a sink map"):
        ss.remove_sinks(bridge, model.tokens(96))


def test_no_hook_is_left_when_an_edit_raises(planted):
    *_, bridge, sink_map = planted

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        ss.remove_sinks(bridge, sink_map, edit=broken)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_qwen_primary_rises_without_its_secondary_sinks(qwen):
    sink_map = ss.detect_sinks(qwen, "How many rolls of bread are left at noon?", chat=True)
    removed = ss.remove_sinks(qwen, sink_map, n_controls=1, progress=False)
    assert removed.where == tuple((p, 5) for p in (2, 3, 7, 12, 18, 20, 23))
    assert set(removed.tokens_frame().outcome) == {"removed"}
    assert removed.primary_edited > 1.5 * removed.primary_clean
    assert removed.primary_control[0] == pytest.approx(removed.primary_clean, rel=0.05)
