"""Silencing writers: the planted truth, the host by hand, and what is refused."""

from __future__ import annotations

import dataclasses

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
    model = planted_model()
    return model, model.load(), model.tokens(96)


@pytest.fixture(scope="module")
def removal(planted):
    _, host, tokens = planted
    return ss.remove_sinks(host, tokens, seed=3)


def test_the_planted_primary_rises_where_the_sinks_lived(planted, removal):
    model, _, tokens = planted
    truth = model.truth(tokens)
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
    model, _, _ = planted
    heads = removal.heads()
    assert {*heads["head"][heads.change.abs() > 0.05]} == set(range(model.plan.n_sink_heads))


def test_the_reverse_lowers_the_primary(planted):
    model, host, tokens = planted
    added = ss.remove_sinks(host, tokens, reverse=True)
    assert added.reverse
    assert added.donors == tuple(s.position for s in model.truth(tokens).sinks)
    assert added.is_sink.any(dim=1).all()
    assert not {p for p, _ in added.where} & set(added.donors)
    frame = added.to_frame()
    assert (frame.change[frame.live] < -0.005).all()
    assert (added.primary_control - added.primary_clean).abs().max() < 0.002


@pytest.mark.parametrize("seed", [1, 5, 8])
def test_random_planted_models(seed):
    model = random_planted(seed)
    host, tokens = model.load(), model.tokens(72)
    sinks = ss.detect_sinks(host, tokens)
    removed = ss.remove_sinks(host, sinks, n_controls=2, progress=False)
    added = ss.remove_sinks(host, sinks, reverse=True, n_controls=1, progress=False)
    assert not removed.is_sink.any()
    assert removed.primary_edited > removed.primary_clean + 0.01
    assert added.primary_edited < added.primary_clean - 0.005
    for one in (removed, added):
        assert (one.primary_control - one.primary_clean).abs().max() < 0.004


def test_a_feeder_named_as_writer_removes_its_sink_as_well(planted):
    model, host, tokens = planted
    sinks = ss.detect_sinks(host, tokens)
    fed = [s for s in model.truth(tokens).sinks if s.feeders]
    chosen = [s for s in sinks.secondary if s.position in {f.position for f in fed}]
    writers = {s.position: s.feeders[0] for s in fed}
    one = ss.remove_sinks(host, sinks, chosen, writers=writers, n_controls=0)
    assert one.where == tuple(sorted(writers.items()))
    assert not one.is_sink.any()
    assert one.primary_edited > one.primary_clean
    assert one.p_value == 1
    both = {s.position: [s.feeders[0], s.writer] for s in fed}
    two = ss.remove_sinks(host, sinks, chosen, writers=both, n_controls=0)
    assert len(two.where) == 2 * len(fed)


def test_many_edits_equal_the_host_by_hand(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(N)
    clean = CleanRun.of(model, ss.detect_sinks(model, tokens))
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
        expected = torch.stack([pattern[:, t + 1 :, t].mean(1) for t in range(N - 1)], dim=1)
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
    _, host, tokens = planted
    assert texts_per_pass(host, 96, 1, logits=True) == 1
    small = ss.remove_sinks(host, tokens, seed=3, memory_budget=1, progress=False)
    assert small.control_where == removal.control_where
    torch.testing.assert_close(small.control_score, removal.control_score, equal_nan=True)
    real, sizes = whole_text._one_pass, []

    def small_machine(model, clean, chunk, *rest):
        sizes.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("no more")
        return real(model, clean, chunk, *rest)

    monkeypatch.setattr(whole_text, "_one_pass", small_machine)
    again = ss.remove_sinks(host, tokens, seed=3, progress=False)
    torch.testing.assert_close(again.edited_score, removal.edited_score, equal_nan=True)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(whole_text, "_one_pass", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ss.ModelError, match="do not fit"):
        ss.remove_sinks(host, tokens, progress=False)


def test_controls_are_seeded_ordinary_and_nearby(planted, removal):
    _, host, tokens = planted
    again = ss.remove_sinks(host, tokens, seed=3)
    assert again.control_where == removal.control_where
    assert ss.remove_sinks(host, tokens, seed=4).control_where != removal.control_where
    taken = {p for p, _ in removal.where} | {0}
    for control in removal.control_where:
        positions = [p for p, _ in control]
        assert len(set(positions)) == len(removal.where)
        assert not set(positions) & taken
        for (p, layer), (q, other) in zip(control, removal.where, strict=True):
            assert layer == other
            assert abs(p - q) <= 2 * 16


def test_save_frame_and_figure(removal, tmp_path):
    loaded = SinkRemoval.load(removal.save(tmp_path / "removal.safetensors"))
    for entry in dataclasses.fields(SinkRemoval):
        one, other = getattr(removal, entry.name), getattr(loaded, entry.name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, equal_nan=True)
        else:
            assert one == other, entry.name
    assert repr(loaded) == repr(removal)
    assert "3 of 3 sinks removed" in repr(removal)
    assert "control 4" in removal._repr_html_()
    assert list(removal.summary()["run"])[:3] == ["clean", "edited", "control 0"]
    figure = removal.plot()
    panels = {axes.get_label(): axes for axes in figure.axes}
    edited = next(line for line in panels["primary"].lines if line.get_gid() == "edited")
    assert list(edited.get_ydata()) == removal.to_frame()["edited"].tolist()
    assert removal.seed == 3
    sinks = ss.detect_sinks(planted_model().load(), planted_model().tokens(64))
    other = sinks.save(tmp_path / "map.safetensors")
    with pytest.raises(ss.LoadError, match="not a SinkRemoval"):
        SinkRemoval.load(other)


def test_without_controls(planted):
    _, host, tokens = planted
    alone = ss.remove_sinks(host, tokens, n_controls=0)
    assert alone.to_frame()["control"].isna().all()
    assert alone.plot().axes
    assert len(alone.summary()) == 2


def test_bad_input(planted, tiny, tokens_of):
    model, host, tokens = planted
    sinks = ss.detect_sinks(host, tokens)
    with pytest.raises(ss.InputError, match="no secondary sinks"):
        ss.remove_sinks(tiny("llama"), tokens_of(N))
    with pytest.raises(ss.InputError, match="layer 12 is out of range"):
        ss.remove_sinks(host, sinks, writers={sinks.secondary[0].position: 12})
    with pytest.raises(ss.InputError, match="which are no sinks"):
        ss.remove_sinks(host, sinks, writers={1: 4})
    with pytest.raises(ss.InputError, match="no secondary sink of this text"):
        ss.remove_sinks(host, sinks, sinks.primary)
    with pytest.raises(ss.InputError, match="no sinks to remove"):
        ss.remove_sinks(host, sinks, [])
    with pytest.raises(ss.InputError, match="no other edit"):
        ss.remove_sinks(host, sinks, reverse=True, edit=ss.Mean())
    with pytest.raises(ss.InputError, match="n_controls"):
        ss.remove_sinks(host, sinks, n_controls=-1)
    with pytest.raises(ss.InputError, match="sink map is of"):
        ss.remove_sinks(tiny("llama"), sinks)
    with pytest.raises(ss.InputError, match="other tokens"):
        ss.remove_sinks(host, model.tokens(96, seed=9), sinks)
    everything = dataclasses.replace(sinks, thresholds=sinks.thresholds | {"min_queries": 95})
    with pytest.raises(ss.InputError, match="too few ordinary tokens"):
        ss.remove_sinks(host, everything)


def test_no_hook_is_left_when_an_edit_raises(planted):
    _, host, tokens = planted

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        ss.remove_sinks(host, tokens, edit=broken)
    assert not any(point.fwd_hooks for point in host.hook_dict.values())
