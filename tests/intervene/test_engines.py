"""Rows of the fast engines: against full passes, on every kind of model, with texts longer than any
window; and against the sink map, where nothing is edited."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.intervene import row_attention, run_rows
from secondary_sinks.intervene.interventions import rows_of
from secondary_sinks.planted.planted_model import planted_model, random_planted

N = 24
I = ss.Intervention  # noqa: E741
ROW = [I("mlp_out", 1, 5, ss.Zero())]
FIELDS = ("alignment", "centered_alignment", "norm", "centered_norm", "direct_score")


@pytest.fixture(scope="module")
def text_in(tiny, tokens_of):
    """Family -> its tiny model and the sink map of a text."""

    @functools.cache
    def make(family):
        return tiny(family), ss.detect_sinks(tiny(family), tokens_of(N))

    return make


@pytest.fixture
def changeable(make_tiny, tokens_of):
    """A tiny model that a test may change, and the sink map of a text."""
    model = make_tiny("llama")
    return model, ss.detect_sinks(model, tokens_of(N))


EXPERTS = {"gpt-oss", "mixtral"}  # without neurons


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
        I("mlp_post", 1, 4, ss.Zero(), neuron=None if family in EXPERTS else 3),
        (I("mlp_out", 0, 13, ss.Zero()), I("attn_out", 2, 13, ss.Scale(-1.0))),
        I("mlp_out", 0, N - 1, ss.Zero()),
        I("attn_out", 1, 0, ss.Scale(0.5)),
    ]
    if family != "neox":  # its attention and MLP are parallel: there is no middle
        rows.append(I("resid_mid", 1, 8, ss.Scale(0.5)))
        rows.append(I("resid_mid", 1, 8, ss.Resample(3)))
    return rows


def assert_close(rows, expected_rows, *, tolerance=1e-4):
    for name in FIELDS:
        expected = getattr(expected_rows, name)
        scale = expected.abs().nan_to_num(0).max().clamp_min(1)
        torch.testing.assert_close(
            getattr(rows, name),
            expected,
            rtol=tolerance,
            atol=tolerance * float(scale),
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def full_passes(model, sink_map, rows, **options):
    return ss.counterfactuals(model, sink_map, rows, method="full", progress=False, **options)


def test_rows_equal_full_passes(text_in, family):
    model, sink_map = text_in(family)
    rows = interventions(family)
    full = full_passes(model, sink_map, rows)
    assert ss.counterfactuals(model, sink_map, rows[:1]).engine == "cached"
    for engine in ("cached", "packed"):
        result = ss.counterfactuals(model, sink_map, rows, method=engine)
        assert (result.engine, full.engine) == (engine, "full")
        assert result.self_test < 1e-4
        assert_close(result, full)
        assert torch.equal(result.is_sink, full.is_sink)
        assert torch.isnan(result.direct_score).any(dim=(1, 2)).tolist() == [
            position == N - 1 for position in result.positions.tolist()
        ]


def lives_of(sink_map):
    """After which blocks each token is a sink of the map, [token, layer]."""
    alive = torch.zeros(sink_map.n_tokens, sink_map.n_layers, dtype=torch.bool)
    for sink in sink_map.sinks:
        alive[sink.position, list(sink.layers)] = True
    return alive


def assert_clean_lives(model, sink_map, n_full=3):
    """Rows without an edit live exactly as the map says, at every position (full passes: at a few,
    a sink, an ordinary token and the last one among them)."""
    expected = lives_of(sink_map)
    unedited = [I("resid_pre", 0, p, ss.Scale(1.0)) for p in range(sink_map.n_tokens)]
    for engine in ("cached", "packed"):
        rows = ss.counterfactuals(model, sink_map, unedited, method=engine, progress=False)
        assert torch.equal(rows.is_sink, expected), engine
        assert torch.equal(rows.lifetime, rows.clean_lifetime)
        torch.testing.assert_close(rows.norm, sink_map.norm.T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            rows.direct_score[:-1],
            sink_map.mean_attention.permute(2, 0, 1)[:-1],
            rtol=1e-2,
            atol=1e-4,
        )
    ordinary = expected.any(dim=1).logical_not().nonzero().flatten().tolist()
    sinks = [sink.position for sink in (*sink_map.secondary, *sink_map.primary)]
    few = sorted({*sinks[: n_full - 1], ordinary[len(ordinary) // 2], sink_map.n_tokens - 1})
    rows = full_passes(model, sink_map, [unedited[position] for position in few])
    assert torch.equal(rows.is_sink, expected[few])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5, 6])
def test_rows_without_an_edit_have_the_lives_of_the_map(seed):
    planted = random_planted(seed)
    model = planted.load()
    sink_map = ss.detect_sinks(model, planted.tokens(64, seed=seed))
    assert_clean_lives(model, sink_map)


@pytest.mark.parametrize("name", ["qwen", "smollm"])
def test_rows_without_an_edit_have_the_lives_of_the_map_in_real_models(name, request):
    model = request.getfixturevalue(name)
    text = (
        "The cat sat.\n\nThe dog, however, did not.\n\nSo it ran:\n\n1. over the hill\n2. home\n\n"
    )
    sink_map = ss.detect_sinks(model, text * 2)
    assert sink_map.sinks
    assert_clean_lives(model, sink_map, n_full=2)


def test_an_edit_that_changes_nothing_gives_the_clean_token(text_in, family):
    """A row equals the token itself: its residual, and the sink score of the clean pattern."""
    model, sink_map = text_in(family)
    unedited = [I("mlp_out", 1, p, ss.Scale(1.0)) for p in range(N)]
    rows = ss.counterfactuals(model, sink_map, unedited)
    torch.testing.assert_close(rows.norm, sink_map.norm.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.alignment, sink_map.alignment.T, rtol=1e-3, atol=1e-4)
    shown = ~torch.isnan(sink_map.sink_score[0, 0])
    clean = sink_map.sink_score.permute(2, 0, 1)[shown]
    torch.testing.assert_close(rows.direct_score[shown], clean, rtol=1e-3, atol=1e-5)
    assert torch.equal(rows.lifetime, rows.clean_lifetime)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("engine", ["cached", "packed", "full"])
def test_scores_of_rows_count_the_queries_within_a_window(tiny, tokens_of, kind, engine):
    """Far from the end of the text, whose length must not matter, and at its last tokens."""
    model, tokens = tiny(kind), tokens_of(30)
    sink_map = ss.detect_sinks(model, tokens)
    _, cache = model.run_with_cache(tokens[None])
    positions = [0, 4, 25, 28]
    unedited = [I("mlp_out", 1, position, ss.Scale(1.0)) for position in positions]
    rows = ss.counterfactuals(model, sink_map, unedited, method=engine, progress=False)
    for row, position in enumerate(positions):
        for layer in range(3):
            has_window = kind != "gpt-oss" or layer != 1
            seeing = slice(position + 1, position + 8 if has_window else None)
            weight = cache["pattern", layer][0, :, seeing, position]
            torch.testing.assert_close(
                rows.direct_score[row, layer], weight.mean(dim=1), rtol=1e-3, atol=1e-5
            )
            if rows.totals is not None:
                total = rows.totals.sink_score[row, layer, position]
                torch.testing.assert_close(total, weight.mean(), rtol=1e-3, atol=1e-5)
    clean = sink_map.mean_attention.permute(2, 0, 1)[positions]
    torch.testing.assert_close(rows.direct_score, clean, rtol=1e-3, atol=1e-5)


def test_full_rows_are_what_run_with_hooks_gives(text_in):
    """Full passes against TransformerLens by hand: one edit, one pass over the whole text."""
    model, sink_map = text_in("llama")
    tokens = sink_map.tokens

    def zero(value, hook):
        value[:, 5] = 0
        return value

    hooks = [("blocks.1.hook_mlp_out", zero)]
    with model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens[None])
    clean_logits = model(tokens[None])
    rows = full_passes(model, sink_map, ROW)
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


@pytest.mark.slow
def test_results_do_not_depend_on_the_chunks(text_in):
    model, sink_map = text_in("gemma2")
    rows = [I("mlp_out", layer, p, ss.Zero()) for layer in range(3) for p in range(N)]
    for engine, budget in (("packed", 70_000), ("cached", 25_000)):
        at_once = ss.counterfactuals(model, sink_map, rows, method=engine)
        assert run_rows.rows_per_pass(engine, model, N, budget) < 8
        small = ss.counterfactuals(
            model, sink_map, rows, method=engine, memory_budget=budget, progress=False
        )
        assert_close(small, at_once, tolerance=1e-5)


@pytest.mark.parametrize("engine", ["cached", "packed"])
def test_a_pass_begins_at_the_first_edit(text_in, family, engine):
    """Blocks before it do not run, and the results are the same."""
    model, sink_map = text_in(family)
    rows = [I("mlp_out", layer, p, ss.Zero()) for p in (4, 19) for layer in (1, 2)]
    ss.counterfactuals(model, sink_map, rows, method=engine)  # the self-test, once a model
    length = 5 if engine == "cached" else N + 4  # of the sequence: rows and the last token, or text
    ran = dict.fromkeys(range(3), 0)

    def count(layer):
        def look(module, inputs, output):
            ran[layer] += inputs[0].shape[1] == length if inputs else 0

        return look

    modules = [model.blocks[layer].mlp for layer in range(3)]
    handles = [m.register_forward_hook(count(layer)) for layer, m in enumerate(modules)]
    try:
        late = ss.counterfactuals(model, sink_map, rows, method=engine)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == {0: 0, 1: 1, 2: 1}
    whole = ss.counterfactuals(model, sink_map, [I("attn_out", 0, 3, ss.Zero()), *rows])
    for name in FIELDS:
        expected = getattr(whole, name)[1:]
        torch.testing.assert_close(getattr(late, name), expected, rtol=1e-4, atol=1e-5)
    assert_close(late, full_passes(model, sink_map, rows))


@pytest.mark.parametrize("where", ["fwd_hooks", "on the model"])
def test_a_hook_that_edits_one_position_is_not_run_in_rows(make_tiny, tokens_of, where):
    """It edits the text's token 5 and not the row of token 5, so packed rows would be wrong."""
    model = make_tiny("llama")

    def at_five(value, hook):
        value = value.clone()
        value[:, 5] = 0
        return value

    hooks = [("blocks.0.hook_mlp_out", at_five)]
    if where == "on the model":
        model.add_hook(*hooks[0])
        hooks = []
    sink_map = ss.detect_sinks(model, tokens_of(N), fwd_hooks=hooks)
    result = ss.counterfactuals(model, sink_map, ROW, fwd_hooks=hooks, progress=False)
    assert result.engine == "full"
    full = full_passes(model, sink_map, ROW, fwd_hooks=hooks)
    assert_close(result, full, tolerance=1e-6)
    with pytest.raises(ss.ModelError, match="a hook on it"):
        ss.counterfactuals(model, sink_map, ROW, fwd_hooks=hooks, method="packed")
    elsewhere = [I("mlp_out", 1, 9, ss.Zero())]
    assert ss.counterfactuals(model, sink_map, elsewhere, fwd_hooks=hooks).engine == "packed"


def test_a_hook_that_treats_all_tokens_alike_is_run_in_rows(make_tiny, tokens_of):
    model = make_tiny("llama")
    hooks = [("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)]
    sink_map = ss.detect_sinks(model, tokens_of(N), fwd_hooks=hooks)
    rows = [*ROW, I("mlp_out", 2, 7, ss.Zero())]
    packed = ss.counterfactuals(model, sink_map, rows, fwd_hooks=hooks)
    assert packed.engine == "packed"
    assert_close(packed, full_passes(model, sink_map, rows, fwd_hooks=hooks))


def test_running_out_of_memory_halves_the_chunk(text_in, monkeypatch):
    model, sink_map = text_in("llama")
    rows = [I("mlp_out", 1, p, ss.Zero()) for p in range(N)]
    expected = ss.counterfactuals(model, sink_map, rows)
    real, sizes = run_rows.run_cached, []

    def small_machine(model, clean, chunk, **kwargs):
        sizes.append(len(chunk))
        if len(chunk) > 5:
            raise torch.OutOfMemoryError("no more")
        return real(model, clean, chunk, **kwargs)

    monkeypatch.setattr(run_rows, "run_cached", small_machine)
    assert_close(ss.counterfactuals(model, sink_map, rows, progress=False), expected)
    assert sizes[:4] == [24, 12, 6, 3]
    monkeypatch.setattr(
        run_rows, "run_cached", lambda *a, **k: (_ for _ in ()).throw(MemoryError())
    )
    with pytest.raises(ss.ModelError, match="not even one row"):
        ss.counterfactuals(model, sink_map, rows, progress=False)


def test_a_wrong_engine_is_not_used(changeable, monkeypatch):
    """Whatever the reason for which it is wrong."""
    model, sink_map = changeable

    def wrong(real):
        def run(model, clean, rows, **kwargs):
            states = real(model, clean, rows, **kwargs)
            return dataclasses.replace(states, norm=states.norm * 1.01)

        return run

    for name in ("run_cached", "run_packed"):
        monkeypatch.setattr(run_rows, name, wrong(getattr(run_rows, name)))
    result = ss.counterfactuals(model, sink_map, ROW, progress=False)
    assert result.engine == "full"
    assert 1e-3 < result.self_test < 1e-1
    for engine in ("cached", "packed"):
        with pytest.raises(ss.ModelError, match="method='full'"):
            ss.counterfactuals(model, sink_map, ROW, method=engine)


def test_every_pass_of_cached_rows_checks_itself(changeable, monkeypatch):
    """A model may go wrong where the self-test, on other tokens, could not detect it."""
    model, sink_map = changeable
    assert ss.counterfactuals(model, sink_map, ROW).engine == "cached"
    real = row_attention.RowAttention.__call__
    monkeypatch.setattr(row_attention.RowAttention, "__call__", lambda *args: 2 * real(*args))
    with pytest.raises(ss.ModelError, match="last token, run alone"):
        ss.counterfactuals(model, sink_map, ROW)


def test_cached_rows_are_not_for_hooks(changeable):
    model, sink_map = changeable
    hooks = [("blocks.0.hook_mlp_out", lambda v, hook: v)]
    with pytest.raises(ss.InputError, match="cached rows run without the text"):
        ss.counterfactuals(model, sink_map, ROW, method="cached", fwd_hooks=hooks)
    model.add_hook(*hooks[0])
    sink_map = ss.detect_sinks(model, sink_map.tokens)
    with pytest.raises(ss.ModelError, match="a hook on it"):
        ss.counterfactuals(model, sink_map, ROW, method="cached")
    assert ss.counterfactuals(model, sink_map, ROW).engine == "packed"


@pytest.mark.slow
def test_planted_writers_and_feeders_are_necessary():
    planted = planted_model()
    model, tokens = planted.load(), planted.tokens(64)
    sink_map = ss.detect_sinks(model, tokens)
    depth = planted.plan.n_layers
    for sink in planted.truth(tokens).sinks:
        sweep = [I("mlp_out", layer, sink.position, ss.Zero()) for layer in range(depth)]
        rows = ss.counterfactuals(model, sink_map, sweep)
        removed = {layer for layer in range(depth) if rows.lifetime[layer] == 0}
        assert removed == {sink.writer, *sink.feeders}
        assert set(rows.clean_lifetime.tolist()) == {sink.lifetime}


@pytest.mark.slow
def test_a_transplanted_write_makes_a_sink():
    planted = planted_model()
    model, tokens = planted.load(), planted.tokens(64)
    sink = planted.truth(tokens).sinks[0]
    sink_map = ss.detect_sinks(model, tokens)
    taken = {sink.position for sink in sink_map.sinks}
    ordinary = [p for p in range(sink.position + 1, 50) if p not in taken][:5]
    rows = ss.counterfactuals(
        model,
        sink_map,
        [I("mlp_out", sink.writer, p, ss.Resample(sink.position)) for p in ordinary],
    )
    assert set(rows.lifetime.tolist()) == {sink.lifetime}
    assert rows.is_sink[:, sink.writer].all()
    assert repr(rows).endswith(": no sinks removed, 5 sinks made)")


@pytest.mark.slow
def test_no_hook_is_left_when_an_edit_raises(changeable):
    model, sink_map = changeable

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    for method in ("cached", "packed", "full"):
        with pytest.raises(RuntimeError, match="broken edit"):
            ss.counterfactuals(
                model, sink_map, [I("mlp_out", 1, 5, broken)], method=method, progress=False
            )
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_rows_of_keeps_groups_and_orders_them_by_layer():
    late, early = I("mlp_out", 2, 5, ss.Zero()), I("attn_out", 0, 5, ss.Zero())
    assert rows_of([late, (late, early)]) == [(late,), (early, late)]
