"""Packed rows against full passes, on every kind of model, with texts longer than any window."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.intervene import cached
from secondary_sinks.intervene import chunks as module
from secondary_sinks.intervene.interventions import rows_of
from secondary_sinks.planted.planted_model import planted_model

N = 24
I = ss.Intervention  # noqa: E741


def interventions(family):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    rows = [
        I("mlp_out", 1, 5, ss.Zero()),
        I("attn_out", 0, 7, ss.Mean()),
        I("mlp_out", 0, 20, ss.Scale(2.0)),
        I("resid_pre", 2, 9, ss.Resample(3)),
        I("resid_post", 1, 11, ss.Add(direction)),
        I("resid_post", 0, 14, ss.ProjectOut(direction)),
        I("mlp_out", 1, 15, ss.KeepOnly(direction)),
        I("mlp_out", 2, 16, ss.Replace(direction)),
        I("z", 1, 6, ss.Zero(), head=2),
        I("k", 1, 6, ss.Zero()),
        I("v", 1, 12, ss.Scale(3.0), head=1),
        I("mlp_post", 1, 4, ss.Zero(), neuron=3),
        (I("mlp_out", 0, 13, ss.Zero()), I("attn_out", 2, 13, ss.Scale(-1.0))),
        I("mlp_out", 0, N - 1, ss.Zero()),
        I("attn_out", 1, 0, ss.Scale(0.5)),
    ]
    if family != "neox":  # its attention and MLP are parallel: there is no middle
        rows.append(I("resid_mid", 1, 8, ss.Scale(0.5)))
    return rows


def assert_close(one, other, *, tolerance=1e-4):
    for name in ("alignment", "centered_alignment", "norm", "centered_norm", "direct_score"):
        expected = getattr(other, name)
        scale = expected.abs().nan_to_num(0).max().clamp_min(1)
        torch.testing.assert_close(
            getattr(one, name),
            expected,
            rtol=tolerance,
            atol=tolerance * float(scale),
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def test_rows_equal_full_passes(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(N)
    rows = interventions(family)
    full = ss.counterfactuals(model, tokens, rows, method="full", progress=False)
    assert ss.counterfactuals(model, tokens, rows[:1]).engine == "cached"
    for engine in ("cached", "packed"):
        found = ss.counterfactuals(model, tokens, rows, method=engine)
        assert (found.engine, full.engine) == (engine, "full")
        assert found.self_test < 1e-4
        assert_close(found, full)
        assert torch.equal(found.is_sink, full.is_sink)
        assert torch.isnan(found.direct_score).any(dim=(1, 2)).tolist() == [
            position == N - 1 for position in found.positions.tolist()
        ]


def test_an_edit_that_changes_nothing_gives_the_clean_token(tiny, family, tokens_of):
    """A row is the token itself then: its residual, and the sink score of the clean pattern."""
    model, tokens = tiny(family), tokens_of(N)
    sinks = ss.detect_sinks(model, tokens)
    rows = ss.counterfactuals(model, sinks, [I("mlp_out", 1, p, ss.Scale(1.0)) for p in range(N)])
    torch.testing.assert_close(rows.norm, sinks.norm.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.alignment, sinks.alignment.T, rtol=1e-3, atol=1e-4)
    seen = ~torch.isnan(sinks.sink_score[0, 0])
    clean = sinks.sink_score.permute(2, 0, 1)[seen]
    torch.testing.assert_close(rows.direct_score[seen], clean, rtol=1e-3, atol=1e-5)
    assert torch.equal(rows.lifetime, rows.clean_lifetime)


def test_full_rows_are_what_run_with_hooks_gives(tiny, tokens_of):
    """The oracle against the host by hand: one edit, one pass over the whole text."""
    model, tokens = tiny("llama"), tokens_of(N)

    def zero(value, hook):
        value[:, 5] = 0
        return value

    hooks = [("blocks.1.hook_mlp_out", zero)]
    with model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens[None])
    clean_logits = model(tokens[None])
    rows = ss.counterfactuals(
        model, tokens, [I("mlp_out", 1, 5, ss.Zero())], method="full", progress=False
    )
    for layer in range(3):
        residual = cache["resid_post", layer][0, 5]
        assert rows.norm[0, layer].item() == pytest.approx(residual.norm().item(), rel=1e-5)
        pattern = cache["pattern", layer][0]
        expected = torch.stack([pattern[:, t + 1 :, t].mean() for t in range(N - 1)])
        torch.testing.assert_close(rows.totals.sink_score[0, layer, :-1], expected)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:])
    assert rows.totals.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    clean, edited = clean_logits[0].log_softmax(-1), logits[0].log_softmax(-1)
    kl = (clean.exp() * (clean - edited)).sum(-1).mean()
    assert rows.totals.kl.item() == pytest.approx(kl.item(), rel=1e-4)
    assert rows.totals.kl.item() > 1e-6


def test_results_do_not_depend_on_the_chunks(tiny, tokens_of):
    model, tokens = tiny("gemma2"), tokens_of(N)
    rows = [I("mlp_out", layer, p, ss.Zero()) for layer in range(3) for p in range(N)]
    for engine, budget in (("packed", 70_000), ("cached", 25_000)):
        at_once = ss.counterfactuals(model, tokens, rows, method=engine)
        assert module.chunk_size(engine, model, N, budget) < 8
        small = ss.counterfactuals(
            model, tokens, rows, method=engine, memory_budget=budget, progress=False
        )
        assert_close(small, at_once, tolerance=1e-5)


@pytest.mark.parametrize("engine", ["cached", "packed"])
def test_a_pass_begins_at_the_first_edit(tiny, family, tokens_of, engine):
    """Blocks before it do not run, and what comes out is the same."""
    model, tokens = tiny(family), tokens_of(N)
    rows = [
        I("mlp_out", layer, p, edit) for p in (4, 19) for layer in (1, 2) for edit in (ss.Zero(),)
    ]
    ss.counterfactuals(model, tokens, rows, method=engine)  # the self-test, once a model
    length = 5 if engine == "cached" else N + 4  # of the sequence: rows and the last token, or text
    ran = dict.fromkeys(range(3), 0)

    def count(layer):
        def look(module, inputs, output):
            ran[layer] += inputs[0].shape[1] == length if inputs else 0

        return look

    modules = [model.blocks[layer].mlp for layer in range(3)]
    handles = [m.register_forward_hook(count(layer)) for layer, m in enumerate(modules)]
    try:
        late = ss.counterfactuals(model, tokens, rows, method=engine)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == {0: 0, 1: 1, 2: 1}
    whole = ss.counterfactuals(model, tokens, [I("attn_out", 0, 3, ss.Zero()), *rows])
    for name in ("alignment", "centered_alignment", "norm", "centered_norm", "direct_score"):
        expected = getattr(whole, name)[1:]
        torch.testing.assert_close(getattr(late, name), expected, rtol=1e-4, atol=1e-5)
    assert_close(late, ss.counterfactuals(model, tokens, rows, method="full", progress=False))


@pytest.mark.parametrize("where", ["fwd_hooks", "on the model"])
def test_a_hook_that_looks_at_positions_is_not_run_in_rows(make_tiny, tokens_of, where):
    """It edits the text's token 5 and not the row of token 5, so packed rows would be wrong."""
    model, tokens = make_tiny("llama"), tokens_of(N)

    def at_five(value, hook):
        value = value.clone()
        value[:, 5] = 0
        return value

    hooks = [("blocks.0.hook_mlp_out", at_five)]
    if where == "on the model":
        model.add_hook(*hooks[0])
        hooks = []
    row = [I("mlp_out", 1, 5, ss.Zero())]
    result = ss.counterfactuals(model, tokens, row, fwd_hooks=hooks, progress=False)
    assert result.engine == "full"
    full = ss.counterfactuals(model, tokens, row, fwd_hooks=hooks, method="full", progress=False)
    assert_close(result, full, tolerance=1e-6)
    with pytest.raises(ss.ModelError, match="a hook on it"):
        ss.counterfactuals(model, tokens, row, fwd_hooks=hooks, method="packed")
    other = ss.counterfactuals(model, tokens, [I("mlp_out", 1, 9, ss.Zero())], fwd_hooks=hooks)
    assert other.engine == "packed"


def test_a_hook_that_treats_all_tokens_alike_is_run_in_rows(make_tiny, tokens_of):
    model, tokens = make_tiny("llama"), tokens_of(N)
    hooks = [("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)]
    rows = [I("mlp_out", 1, 5, ss.Zero()), I("mlp_out", 2, 7, ss.Zero())]
    packed = ss.counterfactuals(model, tokens, rows, fwd_hooks=hooks)
    assert packed.engine == "packed"
    full = ss.counterfactuals(model, tokens, rows, fwd_hooks=hooks, method="full", progress=False)
    assert_close(packed, full)


def test_running_out_of_memory_halves_the_chunk(tiny, tokens_of, monkeypatch):
    model, tokens = tiny("llama"), tokens_of(N)
    rows = [I("mlp_out", 1, p, ss.Zero()) for p in range(N)]
    expected = ss.counterfactuals(model, tokens, rows)
    real, sizes = module.run_cached, []

    def small_machine(model, clean, chunk, **kwargs):
        sizes.append(len(chunk))
        if len(chunk) > 5:
            raise torch.OutOfMemoryError("no more")
        return real(model, clean, chunk, **kwargs)

    monkeypatch.setattr(module, "run_cached", small_machine)
    assert_close(ss.counterfactuals(model, tokens, rows, progress=False), expected)
    assert sizes[:4] == [24, 12, 6, 3]
    monkeypatch.setattr(module, "run_cached", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ss.ModelError, match="not even one row"):
        ss.counterfactuals(model, tokens, rows, progress=False)


def test_a_model_that_ignores_the_mask_falls_back(make_tiny, tokens_of, monkeypatch):
    """The fast engine is not believed, whatever the reason for which it is wrong."""
    model, tokens = make_tiny("llama"), tokens_of(N)

    def blind(real):
        def run(model, clean, rows, **kwargs):
            states = real(model, clean, rows, **kwargs)
            return dataclasses.replace(states, norm=states.norm * 1.01)

        return run

    for name in ("run_cached", "run_packed"):
        monkeypatch.setattr(module, name, blind(getattr(module, name)))
    row = [I("mlp_out", 1, 5, ss.Zero())]
    result = ss.counterfactuals(model, tokens, row, progress=False)
    assert result.engine == "full"
    assert result.self_test < 1e-4
    for engine in ("cached", "packed"):
        with pytest.raises(ss.ModelError, match="method='full'"):
            ss.counterfactuals(model, tokens, row, method=engine)


def test_every_pass_of_cached_rows_checks_itself(make_tiny, tokens_of, monkeypatch):
    """A host may go wrong where the test, on other tokens, could not see it."""
    model, tokens = make_tiny("llama"), tokens_of(N)
    row = [I("mlp_out", 1, 5, ss.Zero())]
    assert ss.counterfactuals(model, tokens, row).engine == "cached"
    real = cached.RowAttention.__call__
    monkeypatch.setattr(cached.RowAttention, "__call__", lambda *args: 2 * real(*args))
    with pytest.raises(ss.ModelError, match="last token, run alone"):
        ss.counterfactuals(model, tokens, row)


def test_cached_rows_are_not_for_hooks(make_tiny, tokens_of):
    model, tokens = make_tiny("llama"), tokens_of(N)
    row, hooks = [I("mlp_out", 1, 5, ss.Zero())], [("blocks.0.hook_mlp_out", lambda v, hook: v)]
    with pytest.raises(ss.InputError, match="cached rows run without the text"):
        ss.counterfactuals(model, tokens, row, method="cached", fwd_hooks=hooks)
    model.add_hook(*hooks[0])
    with pytest.raises(ss.ModelError, match="a hook on it"):
        ss.counterfactuals(model, tokens, row, method="cached")
    assert ss.counterfactuals(model, tokens, row).engine == "packed"


def test_planted_writers_and_feeders_are_necessary():
    model = planted_model()
    host, tokens = model.load(), model.tokens(64)
    truth = model.truth(tokens)
    sinks = ss.detect_sinks(host, tokens)
    depth = model.plan.n_layers
    for planted in truth.sinks:
        sweep = [I("mlp_out", layer, planted.position, ss.Zero()) for layer in range(depth)]
        rows = ss.counterfactuals(host, sinks, sweep)
        removed = {layer for layer in range(depth) if rows.lifetime[layer] == 0}
        assert removed == {planted.writer, *planted.feeders}
        assert set(rows.clean_lifetime.tolist()) == {planted.lifetime}


def test_a_transplanted_write_makes_a_sink():
    model = planted_model()
    host, tokens = model.load(), model.tokens(64)
    planted = model.truth(tokens).sinks[0]
    sinks = ss.detect_sinks(host, tokens)
    taken = {sink.position for sink in sinks.sinks}
    ordinary = [p for p in range(planted.position + 1, 50) if p not in taken][:5]
    rows = ss.counterfactuals(
        host,
        sinks,
        [I("mlp_out", planted.writer, p, ss.Resample(planted.position)) for p in ordinary],
    )
    assert set(rows.lifetime.tolist()) == {planted.lifetime}
    assert rows.is_sink[:, planted.writer].all()


def test_no_hook_is_left_when_an_edit_raises(make_tiny, tokens_of):
    model = make_tiny("llama")

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    for method in ("cached", "packed", "full"):
        with pytest.raises(RuntimeError, match="broken edit"):
            ss.counterfactuals(
                model, tokens_of(N), [I("mlp_out", 1, 5, broken)], method=method, progress=False
            )
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_edit_of_ones_own(tiny, tokens_of):
    model, tokens = tiny("llama"), tokens_of(N)
    flip = ss.counterfactuals(
        model, tokens, [I("mlp_out", 1, 5, lambda value, clean, ordinary: -value)]
    )
    scale = ss.counterfactuals(model, tokens, [I("mlp_out", 1, 5, ss.Scale(-1.0))])
    assert torch.equal(flip.norm, scale.norm)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (I("mlp_out", 3, 5, ss.Zero()), "layer 3 is out of range"),
        (I("mlp_out", -1, 5, ss.Zero()), "layer -1"),
        (I("mlp_out", 1, N, ss.Zero()), f"position {N}"),
        (I("z", 1, 5, ss.Zero(), head=4), "head 4"),
        (I("k", 1, 5, ss.Zero(), head=2), "head 2"),
        (I("mlp_post", 1, 5, ss.Zero(), neuron=48), "neuron 48"),
        (I("mlp_out", 1, 5, ss.Zero(), head=1), "has no heads"),
        (I("z", 1, 5, ss.Zero(), neuron=1), "has no neurons"),
        (I("pattern", 1, 5, ss.Zero()), "no site 'pattern'"),
        (I("mlp_out", 1, 5, ss.Replace(torch.zeros(31))), r"shape \[31\]"),
        (I("mlp_out", 1, 5, lambda value, clean, ordinary: value[:3]), r"returned \[3\]"),
        (I("mlp_out", 1, 5, lambda value, clean, ordinary: value * torch.nan), "NaN"),
        ((I("mlp_out", 1, 5, ss.Zero()), I("mlp_out", 1, 6, ss.Zero())), r"\[5, 6\]"),
        ("mlp_out", "not an Intervention"),
    ],
)
def test_bad_interventions(tiny, tokens_of, row, message):
    with pytest.raises(ss.InputError, match=message):
        ss.counterfactuals(tiny("llama"), tokens_of(N), [row])


def test_bad_maps_and_texts(tiny, tokens_of):
    model, row = tiny("llama"), [I("mlp_out", 1, 5, ss.Zero())]
    other = ss.detect_sinks(tiny("gpt2"), tokens_of(N))
    with pytest.raises(ss.InputError, match="sink map is of"):
        ss.counterfactuals(model, other, row)
    own = ss.detect_sinks(model, tokens_of(N))
    with pytest.raises(ss.InputError, match="other tokens"):
        ss.counterfactuals(model, tokens_of(N, seed=5), row, sinks=own)
    reference = ss.detect_sinks(model, tokens_of(N), criterion="published")
    with pytest.raises(ss.InputError, match="criterion='evidence'"):
        ss.counterfactuals(model, reference, row)
    with pytest.raises(ss.InputError, match="no interventions"):
        ss.counterfactuals(model, own, [])
    with pytest.raises(ss.InputError, match="one at a time"):
        ss.counterfactuals(model, tokens_of(N, rows=2), row)
    with pytest.raises(ss.InputError, match="method"):
        ss.counterfactuals(model, own, row, method="fast")


def test_rows_of_keeps_groups_and_orders_them_by_layer():
    late, early = I("mlp_out", 2, 5, ss.Zero()), I("attn_out", 0, 5, ss.Zero())
    assert rows_of([late, (late, early)]) == [(late,), (early, late)]
