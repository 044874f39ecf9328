"""Path effects: the host by hand, and the planted mechanism, which works through keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.path_effect import PathEffect
from secondary_sinks.planted.planted_model import planted_model, random_planted

N = 20
AT = 6


@pytest.fixture(scope="module")
def planted():
    model = planted_model()
    host, tokens = model.load(), model.tokens(64)
    return model, host, ss.detect_sinks(host, tokens)


def by_hand(model, tokens, names, edits=()):
    """Activations of some hooks, with functions that edit others."""
    seen = {}
    readers = [(n, lambda v, hook, n=n: seen.__setitem__(n, v[0].detach().clone())) for n in names]
    with torch.no_grad():
        model.run_with_hooks(tokens[None], fwd_hooks=[*edits, *readers])
    return seen


def subtract(vector):
    def hook(value, hook):
        value = value.clone()
        value[0, AT] -= vector
        return value

    return hook


def put_back(clean):
    def hook(value, hook):
        value = value.clone()
        value[0, AT] = clean[AT]
        return value

    return hook


def test_values_and_mlps_equal_the_host_by_hand(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(N)
    names = [f"blocks.{x}.{n}" for x in range(3) for n in ("hook_mlp_out", "attn.hook_v")]
    names += ["blocks.1.hook_attn_out", "blocks.2.hook_attn_out", "blocks.1.hook_resid_post"]
    names += ["blocks.2.hook_resid_post"]
    clean = by_hand(model, tokens, names)
    write = clean["blocks.0.hook_mlp_out"][AT]
    sinks = ss.detect_sinks(model, tokens)
    for receiver in ("v", "mlp"):
        path = ss.path_effect(model, sinks, AT, writer=0, receiver=receiver)
        assert path.layers == (1, 2)
        assert path.write_norm == pytest.approx(write.norm().item(), rel=1e-5)
        for row, layer in enumerate(path.layers):
            edits = [(f"blocks.{layer}.hook_resid_pre", subtract(write))]
            name = f"blocks.{layer}.attn.hook_v"
            if receiver == "mlp":
                attention = f"blocks.{layer}.hook_attn_out"
                edits.append((attention, put_back(clean[attention])))
                name = f"blocks.{layer}.hook_mlp_out"
            cut = by_hand(model, tokens, [name], edits)[name][AT]
            whole = by_hand(model, tokens, [name], [("blocks.0.hook_mlp_out", subtract(write))])
            primary = clean[f"blocks.{layer}.hook_resid_post"][sinks.primary_position]

            def measure(value, primary=primary, receiver=receiver):
                if receiver == "v":
                    return value.norm(dim=-1)
                return (value @ primary / primary.norm())[None]

            for mine, theirs in (
                (path.clean, clean[name][AT]),
                (path.without_path, cut),
                (path.without_write, whole[name][AT]),
            ):
                torch.testing.assert_close(mine[row], measure(theirs), rtol=1e-3, atol=1e-4)


def test_keys_equal_the_host_by_hand(tiny, family, tokens_of):
    """The key of the edited residual, put in the clean text's place of it."""
    model, tokens = tiny(family), tokens_of(N)
    write = by_hand(model, tokens, ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"][AT]
    path = ss.path_effect(model, tokens, AT, writer=0, receiver="k")
    for row, layer in enumerate(path.layers):
        key, pattern = f"blocks.{layer}.attn.hook_k", f"blocks.{layer}.attn.hook_pattern"
        cut = by_hand(model, tokens, [key], [(f"blocks.{layer}.hook_resid_pre", subtract(write))])[
            key
        ]
        weights = by_hand(model, tokens, [pattern], [(key, put_back(cut))])[pattern]
        expected = weights[:, AT + 1 :, AT].mean(dim=1)
        torch.testing.assert_close(path.without_path[row], expected, rtol=1e-3, atol=1e-5)
        clean = by_hand(model, tokens, [pattern])[pattern][:, AT + 1 :, AT].mean(dim=1)
        torch.testing.assert_close(path.clean[row], clean, rtol=1e-3, atol=1e-5)


def test_the_next_layer_sees_the_write_by_no_other_path(tiny, family, tokens_of):
    """Between a writer and the keys and values after it lies nothing: path effect is total."""
    model, tokens = tiny(family), tokens_of(N)
    for receiver in ("k", "v"):
        path = ss.path_effect(model, tokens, AT, writer=1, receiver=receiver, receiver_layer=2)
        torch.testing.assert_close(path.without_path, path.without_write, rtol=1e-3, atol=1e-5)


def test_planted_sinks_work_through_the_keys(planted):
    model, host, sinks = planted
    for sink in sinks.secondary:
        path = ss.path_effect(host, sinks, sink)
        assert path.writer == sink.l_start
        assert path.layers == tuple(layer + 1 for layer in sink.layers)
        assert (path.effect.mean(dim=1) > 0.05).all()
        torch.testing.assert_close(path.share, torch.ones(len(path.layers)), atol=0.02, rtol=0)
        heads = path.effect.mean(dim=0)
        assert (heads[model.plan.n_sink_heads :].abs() < 0.02).all()


def test_the_planted_eraser_reads_the_write(planted):
    _, host, sinks = planted
    sink = sinks.secondary[0]
    path = ss.path_effect(host, sinks, sink, receiver="mlp")
    erased = sink.layers[-1] + 1
    assert path.layers[int(path.effect.abs().argmax())] == erased
    effect = path.effect[path.layers.index(erased)].item()
    assert effect == pytest.approx(-path.write_norm, rel=0.05)
    assert path.effect[:-1].abs().max() < 0.05


@pytest.mark.parametrize("seed", [2, 7])
def test_random_planted_models(seed):
    model = random_planted(seed)
    host, tokens = model.load(), model.tokens(72)
    sinks = ss.detect_sinks(host, tokens)
    path = ss.path_effect(host, sinks, sinks.secondary[0])
    torch.testing.assert_close(path.share[0], torch.tensor(1.0), atol=1e-3, rtol=0)
    assert path.effect[0].mean() > 0.02


def test_memory_does_not_change_the_result(planted, monkeypatch):
    from secondary_sinks.analyses import path_effect as module

    _, host, sinks = planted
    path = ss.path_effect(host, sinks, sinks.secondary[0], receiver="v")
    monkeypatch.setattr(module, "MEMORY_BUDGET", 1)
    again = ss.path_effect(host, sinks, sinks.secondary[0], receiver="v")
    torch.testing.assert_close(again.without_path, path.without_path)
    torch.testing.assert_close(again.clean, path.clean)


def test_another_edit_and_the_mean_of_all_tokens(planted):
    _, host, sinks = planted
    sink = sinks.secondary[0]
    nothing = ss.path_effect(host, sinks, sink, edit=ss.Scale(1.0))
    assert nothing.write_norm == 0
    assert nothing.effect.abs().max() < 1e-6
    assert nothing.share.isnan().all() or nothing.total.abs().max() < 1e-6
    mean = ss.path_effect(host, sinks, sink, edit=ss.Mean(), receiver="v")
    assert mean.edit == "Mean()"
    torch.testing.assert_close(mean.without_path[0], mean.without_write[0], rtol=1e-3, atol=1e-5)


def test_save_frame_and_figure(planted, tmp_path):
    _, host, sinks = planted
    for receiver in ("k", "v", "mlp"):
        path = ss.path_effect(host, sinks, sinks.secondary[0], receiver=receiver)
        loaded = PathEffect.load(path.save(tmp_path / "path.safetensors"))
        for entry in dataclasses.fields(PathEffect):
            one, other = getattr(path, entry.name), getattr(loaded, entry.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert repr(loaded) == repr(path)
        frame = path.to_frame()
        assert len(frame) == path.clean.numel()
        assert frame["effect"].tolist() == path.effect.flatten().tolist()
        assert "<table" in path._repr_html_()
        lines = path.plot().axes[0].lines
        assert [list(line.get_xdata()) for line in lines] == [list(path.layers)] * 3


@pytest.mark.parametrize(
    ("sink", "arguments", "message"),
    [
        (AT, {}, "`writer` must be given"),
        (AT, {"writer": 3}, "layer 3 is out of range"),
        (N, {"writer": 0}, f"position {N}"),
        (AT, {"writer": 2}, "do not lie after the writer"),
        (AT, {"writer": 1, "receiver_layer": 1}, "do not lie after the writer 1"),
        (AT, {"writer": 1, "receiver_layer": [2, 3]}, r"\[3\] do not lie"),
        (AT, {"writer": 1, "receiver_layer": []}, "do not lie"),
        (AT, {"writer": 1, "receiver": "q"}, "no receiver 'q'"),
    ],
)
def test_bad_input(tiny, tokens_of, sink, arguments, message):
    with pytest.raises(ss.InputError, match=message):
        ss.path_effect(tiny("llama"), tokens_of(N), sink, **arguments)


def test_bad_maps_and_broken_edits(planted, tiny):
    _, host, sinks = planted
    with pytest.raises(ss.InputError, match="sink map is of"):
        ss.path_effect(tiny("llama"), sinks, 6, writer=0)
    stranger = dataclasses.replace(sinks.secondary[0], layers=(2, 3))
    with pytest.raises(ss.InputError, match="is no sink of this text"):
        ss.path_effect(host, sinks, stranger)

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        ss.path_effect(host, sinks, sinks.secondary[0], edit=broken)
    assert not any(point.fwd_hooks for point in host.hook_dict.values())
