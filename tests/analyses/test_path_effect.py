"""Path effects: TransformerLens by hand, and the planted mechanism, which acts through keys."""

from __future__ import annotations

import dataclasses
import functools

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
    bridge = model.load()
    return model, bridge, ss.detect_sinks(bridge, model.tokens(64))


@pytest.fixture(scope="module")
def map_of(tokens_of):
    """Tiny model -> the map of a random text in it, made once."""
    return functools.cache(lambda model: ss.detect_sinks(model, tokens_of(N)))


@pytest.fixture(scope="module")
def path_of(planted):
    """Receiver -> the path effect of the first planted sink, made once."""
    _, bridge, sink_map = planted
    run = functools.partial(ss.path_effect, bridge, sink_map, sink_map.secondary[0])
    return functools.cache(lambda receiver: run(receiver=receiver))


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


def test_values_and_mlps_equal_transformer_lens_by_hand(tiny, family, tokens_of, map_of):
    model, tokens = tiny(family), tokens_of(N)
    names = [f"blocks.{x}.{n}" for x in range(3) for n in ("hook_mlp_out", "attn.hook_v")]
    names += ["blocks.1.hook_attn_out", "blocks.2.hook_attn_out", "blocks.1.hook_resid_post"]
    names += ["blocks.2.hook_resid_post"]
    clean = by_hand(model, tokens, names)
    write = clean["blocks.0.hook_mlp_out"][AT]
    sink_map = map_of(model)
    for receiver in ("v", "mlp"):
        path = ss.path_effect(model, sink_map, AT, writer=0, receiver=receiver)
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
            primary = clean[f"blocks.{layer}.hook_resid_post"][sink_map.primary_position]

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


@pytest.mark.slow
def test_keys_equal_transformer_lens_by_hand(tiny, family, tokens_of, map_of, visible_keys):
    """The key of the edited residual, put into the clean text."""
    model, tokens = tiny(family), tokens_of(N)
    write = by_hand(model, tokens, ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"][AT]
    path = ss.path_effect(model, map_of(model), AT, writer=0, receiver="k")
    for row, layer in enumerate(path.layers):
        key, pattern = f"blocks.{layer}.attn.hook_k", f"blocks.{layer}.attn.hook_pattern"
        cut = by_hand(model, tokens, [key], [(f"blocks.{layer}.hook_resid_pre", subtract(write))])[
            key
        ]
        weights = by_hand(model, tokens, [pattern], [(key, put_back(cut))])[pattern]
        seeing = visible_keys(family, N)[layer].tril(-1)[:, AT]
        expected = weights[:, seeing, AT].mean(dim=1)
        torch.testing.assert_close(path.without_path[row], expected, rtol=1e-3, atol=1e-5)
        clean = by_hand(model, tokens, [pattern])[pattern][:, seeing, AT].mean(dim=1)
        torch.testing.assert_close(path.clean[row], clean, rtol=1e-3, atol=1e-5)


def test_the_next_layer_sees_the_write_by_no_other_path(tiny, family, map_of):
    """No block stands between a writer and the next keys and values: path effect is total."""
    sink_map = map_of(tiny(family))
    for receiver in ("k", "v"):
        path = ss.path_effect(
            tiny(family), sink_map, AT, writer=1, receiver=receiver, receiver_layer=2
        )
        torch.testing.assert_close(path.without_path, path.without_write, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_planted_sinks_act_through_the_keys(planted):
    model, bridge, sink_map = planted
    for sink in sink_map.secondary:
        path = ss.path_effect(bridge, sink_map, sink)
        assert path.writer == sink.l_start
        assert path.writer_rule == "largest_write"
        assert path.layers == tuple(layer + 1 for layer in sink.layers)
        assert (path.effect.mean(dim=1) > 0.05).all()
        torch.testing.assert_close(path.share, torch.ones(len(path.layers)), atol=0.02, rtol=0)
        heads = path.effect.mean(dim=0)
        assert (heads[model.plan.n_sink_heads :].abs() < 0.02).all()


def test_the_planted_eraser_reads_the_write(planted, path_of):
    sink, path = planted[-1].secondary[0], path_of("mlp")
    erased = sink.layers[-1] + 1
    assert path.layers[int(path.effect.abs().argmax())] == erased
    effect = path.effect[path.layers.index(erased)].item()
    assert effect == pytest.approx(-path.write_norm, rel=0.05)
    assert path.effect[:-1].abs().max() < 0.05


@pytest.mark.slow
def test_a_random_planted_model():
    model = random_planted(2)
    bridge = model.load()
    sink_map = ss.detect_sinks(bridge, model.tokens(72))
    path = ss.path_effect(bridge, sink_map, sink_map.secondary[0])
    torch.testing.assert_close(path.share[0], torch.tensor(1.0), atol=1e-3, rtol=0)
    assert path.effect[0].mean() > 0.02


def test_memory_does_not_change_the_result(planted, path_of, monkeypatch):
    from secondary_sinks.analyses import path_effect as module

    _, bridge, sink_map = planted
    path = path_of("v")
    monkeypatch.setattr(module, "MEMORY_BUDGET", 1)
    again = ss.path_effect(bridge, sink_map, sink_map.secondary[0], receiver="v")
    torch.testing.assert_close(again.without_path, path.without_path)
    torch.testing.assert_close(again.clean, path.clean)


def test_another_edit_and_the_mean_of_all_tokens(planted):
    _, bridge, sink_map = planted
    sink = sink_map.secondary[0]
    nothing = ss.path_effect(bridge, sink_map, sink, edit=ss.Scale(1.0))
    assert nothing.write_norm == 0
    assert nothing.effect.abs().max() < 1e-6
    assert nothing.share.isnan().all() or nothing.total.abs().max() < 1e-6
    mean = ss.path_effect(bridge, sink_map, sink, edit=ss.Mean(), receiver="v")
    assert mean.edit == "Mean()"
    torch.testing.assert_close(mean.without_path[0], mean.without_write[0], rtol=1e-3, atol=1e-5)


def test_save_frame_and_figure(path_of, tmp_path):
    for receiver in ("k", "v", "mlp"):
        path = path_of(receiver)
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


def test_an_edit_may_change_its_argument_in_place(planted, path_of):
    _, bridge, sink_map = planted
    sink, zero = sink_map.secondary[0], path_of("v")
    in_place = ss.path_effect(
        bridge, sink_map, sink, receiver="v", edit=lambda value, clean, ordinary: value.zero_()
    )
    assert in_place.write_norm == zero.write_norm > 1
    torch.testing.assert_close(in_place.effect, zero.effect)


@pytest.mark.parametrize("receiver", ["k", "v", "mlp"])
def test_a_token_that_is_not_a_sink(planted, path_of, receiver):
    """All layers after the writer are looked at, and the small write has a small effect."""
    _, bridge, sink_map = planted
    ordinary = ss.path_effect(bridge, sink_map, 7, receiver=receiver)
    assert ordinary.layers == tuple(range(ordinary.writer + 1, 12))
    assert ordinary.writer <= sink_map.select(7)[0].l_start
    sink = path_of(receiver)
    assert ordinary.write_norm < sink.write_norm / 10
    assert ordinary.effect.abs().max() < sink.effect.abs().max() / 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "position 6 is not a sink, and the text has no primary"),
        ({"writer": 3}, "layer 3 is out of range"),
        ({"writer": 0, "sink": N}, f"position {N}"),
        ({"writer": 2}, "do not lie after the writer"),
        ({"writer": 1, "receiver_layer": 1}, "do not lie after the writer 1"),
        ({"writer": 1, "receiver_layer": [2, 3]}, r"\[3\] do not lie"),
        ({"writer": 1, "receiver_layer": []}, "do not lie"),
        ({"writer": 1, "receiver": "q"}, "receiver must be .* got 'q'"),
    ],
)
def test_bad_input(tiny, map_of, arguments, message):
    model = tiny("llama")
    with pytest.raises(ss.InputError, match=message):
        ss.path_effect(model, map_of(model), **({"sink": AT} | arguments))


def test_bad_maps_and_broken_edits(planted, tiny):
    _, bridge, sink_map = planted
    with pytest.raises(ss.InputError, match="sink map was measured in"):
        ss.path_effect(tiny("llama"), sink_map, 6, writer=0)
    other = dataclasses.replace(sink_map.secondary[0], layers=(2, 3))
    with pytest.raises(ss.InputError, match="is not a sink of this map"):
        ss.path_effect(bridge, sink_map, other)

    def broken(value, clean, ordinary):
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        ss.path_effect(bridge, sink_map, sink_map.secondary[0], edit=broken)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
