"""Patching: TransformerLens by hand, identities of the normalization, estimates that are exact."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.patch_activations import PatchResult
from secondary_sinks.planted.planted_model import planted_model

N = 20


def pair_of(tokens_of, n=N, at=6):
    """Two texts that differ in one token."""
    clean = tokens_of(n)
    corrupted = clean.clone()
    corrupted[at] = (int(clean[at]) + 20 - 3) % 60 + 3
    return clean, corrupted


@pytest.fixture(scope="module")
def maps_of(tokens_of):
    """Tiny model -> the maps of two texts that differ in one token, made once."""
    return functools.cache(
        lambda model: tuple(ss.detect_sinks(model, tokens) for tokens in pair_of(tokens_of))
    )


@pytest.fixture(scope="module")
def planted():
    """A planted model, the maps of a text and of the text with its first sink's token made
    ordinary, and the truth about that sink."""
    model = planted_model()
    bridge, tokens = model.load(), model.tokens(48)[0]
    sink = model.truth(tokens).sinks[0]
    corrupted = tokens.clone()
    corrupted[sink.position] = 30
    return bridge, ss.detect_sinks(bridge, tokens), ss.detect_sinks(bridge, corrupted), sink


def test_exact_cells_equal_transformer_lens_by_hand(tiny, family, maps_of, visible_keys):
    model = tiny(family)
    compare_with_hand(model, *maps_of(model), "denoising", visible_keys(family, N))


def test_noising_equals_transformer_lens_by_hand(tiny, maps_of, visible_keys):
    model = tiny("gemma3")
    compare_with_hand(model, *maps_of(model), "noising", visible_keys("gemma3", N))


def compare_with_hand(model, clean, corrupted, direction, sees):
    """Every cell against a run with plain hooks."""
    result = ss.patch_activations(
        model,
        clean,
        corrupted,
        sink=5,
        layers=[0, 2],
        token_positions=[4, 6, 11],
        metric_layers=[1, 2],
        direction=direction,
        progress=False,
    )
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)

    def score(name, layer, at):
        taken, patterns = {}, {}

        def keep(value, hook):
            taken[0] = value[0, at].clone()

        def patch(value, hook):
            value = value.clone()
            value[0, at] = taken[0]
            return value

        hook_name = f"blocks.{layer}.hook_{name}"
        model.run_with_hooks(source.tokens[None], fwd_hooks=[(hook_name, keep)])
        readers = [
            (f"blocks.{x}.attn.hook_pattern", lambda v, hook, x=x: patterns.update({x: v[0]}))
            for x in (1, 2)
        ]
        with torch.no_grad():
            model.run_with_hooks(base.tokens[None], fwd_hooks=[(hook_name, patch), *readers])
        weights = [patterns[x][:, 6:][:, sees[x, 6:, 5], 5] for x in (1, 2)]
        return torch.stack([weight.mean() for weight in weights]).mean().item()

    for i, name in enumerate(("resid_pre", "attn_out", "mlp_out")):
        for j, layer in enumerate((0, 2)):
            for k, at in enumerate((4, 6, 11)):
                expected = score(name, layer, at)
                assert result.value[i, j, k].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_everything_is_one_and_nothing_is_zero(tiny, family, maps_of):
    """Texts that differ in one token: its first residual is all the difference there is."""
    model, (clean, corrupted) = tiny(family), maps_of(tiny(family))
    for direction in ("denoising", "noising"):
        result = ss.patch_activations(
            model,
            clean,
            corrupted,
            sites=["resid_pre"],
            layers=[0],
            sink=6,
            direction=direction,
            progress=False,
        )
        assert result.normalized[0, 0, 6].item() == pytest.approx(1, abs=1e-3)
        others = [p for p in range(N) if p != 6]
        assert result.normalized[0, 0, others].abs().max() < 1e-3
    same = ss.patch_activations(model, clean, clean, layers=[1], sink=6, progress=False)
    assert same.base == same.source
    assert (same.effect == 0).all()
    assert same.normalized.isnan().all()


def test_the_planted_writer_is_what_restores_the_sink(planted):
    bridge, clean, corrupted, sink = planted
    at = [sink.position - 1, sink.position, sink.position + 1]
    patched = ss.patch_activations(
        bridge, clean, corrupted, sink=sink.position, token_positions=at, progress=False
    )
    assert patched.metric_layers == tuple(range(sink.onset + 1, sink.onset + sink.lifetime + 1))
    assert patched.source > 5 * patched.base
    resid, attention, mlp = patched.normalized[:, :, 1]
    assert mlp.argmax().item() == sink.writer
    assert mlp[sink.writer].item() == pytest.approx(1, abs=0.02)
    rest = [x for x in range(12) if x != sink.writer]
    assert mlp[rest].abs().max() < 0.02
    assert attention.abs().max() < 0.02
    torch.testing.assert_close(
        resid[: sink.writer + 2], torch.ones(sink.writer + 2), atol=0.02, rtol=0
    )
    assert patched.normalized[:, :, [0, 2]].abs().max() < 0.02
    noised = ss.patch_activations(
        bridge,
        clean,
        corrupted,
        sites=["mlp_out"],
        sink=sink.position,
        token_positions=[sink.position],
        direction="noising",
        progress=False,
    )
    needed = {layer for layer in range(12) if noised.normalized[0, layer, 0] > 0.9}
    assert needed == {sink.writer, *sink.feeders}


def test_a_token_that_is_not_a_sink(planted):
    """It is measured over the layers of the map's sinks, and the sink does not change it."""
    bridge, clean, corrupted, sink = planted
    patched = ss.patch_activations(
        bridge,
        clean,
        corrupted,
        30,
        sites=["mlp_out"],
        token_positions=[sink.position, 30],
        progress=False,
    )
    assert patched.metric_layers == tuple(range(sink.onset + 1, sink.onset + sink.lifetime + 1))
    assert patched.position == (30, 30)
    assert patched.effect[..., 0].abs().max() < 0.005


@pytest.mark.parametrize("metric", ["norm", "alignment"])
def test_other_metrics(planted, metric):
    bridge, clean, corrupted, sink = planted
    patched = ss.patch_activations(
        bridge,
        clean,
        corrupted,
        sites=["mlp_out"],
        metric=metric,
        sink=sink.position,
        token_positions=[sink.position],
        progress=False,
    )
    assert patched.metric_layers == tuple(range(sink.onset, sink.onset + sink.lifetime))
    assert patched.normalized[0, sink.writer, 0].item() == pytest.approx(1, abs=0.03)
    expected = getattr(clean, metric)[list(patched.metric_layers), sink.position].mean()
    assert patched.source == pytest.approx(expected.item(), rel=1e-4)


def residual_sum(state):
    """The mean squared residual norm after the last block."""
    return state.norm[2].square().sum()


def test_estimates_are_exact_where_the_metric_is_linear(tiny, maps_of):
    """A metric that is linear in what the last block writes: nothing is missed there."""
    model, (clean, corrupted) = tiny("llama"), maps_of(tiny("llama"))
    scale = torch.linspace(-1, 1, N)

    def weighted(state):
        # Alignment times norm is the projection on the primary, which is linear.
        return (scale * state.alignment[2] * state.norm[2]).sum()

    patched = ss.patch_activations(
        model,
        clean,
        corrupted,
        sites=["mlp_out", "attn_out", "resid_post"],
        metric=weighted,
        layers=[2],
        scan="attribution",
        n_checked=1000,
        sink=6,
        progress=False,
    )
    linear = patched.checked[:, 0] != 1  # the attention's output goes through the MLP as well
    checked = patched.checked[linear]
    exact = patched.checked_value[linear] - patched.base
    estimated = patched.effect[tuple(checked.T)]
    assert len(checked) == 2 * N
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(estimated, exact, rtol=1e-3, atol=1e-4)


def test_a_small_step_is_estimated_well(make_tiny, tokens_of):
    """The closer the two runs, the better the first order: the error falls with the distance."""
    model, tokens = make_tiny("llama"), tokens_of(N)
    other = tokens.clone()
    other[6] = 63
    errors = []
    for size in (0.3, 0.03, 0.003):
        weight = model.embed.W_E
        with torch.no_grad():
            step = torch.randn(32, generator=torch.Generator().manual_seed(0))
            weight[63] = weight[int(tokens[6])] + size * step
        patched = ss.patch_activations(
            model,
            ss.detect_sinks(model, tokens),
            ss.detect_sinks(model, other),
            sink=6,
            metric_layers=[1, 2],
            scan="attribution",
            progress=False,
        )
        assert len(patched.checked) == 16
        errors.append(patched.error)
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 4
    assert errors[2] < 0.05


def test_estimates_agree_with_finite_differences(tiny, family, maps_of):
    model, (clean, corrupted) = tiny(family), maps_of(tiny(family))
    patched = ss.patch_activations(
        model,
        clean,
        corrupted,
        metric=residual_sum,
        scan="attribution",
        n_checked=4,
        sink=6,
        layers=[2],
        progress=False,
    )
    # A layer's last write enters the residual by itself, so the metric is a parabola in it: the
    # estimate misses exactly the square of the step.
    value = {}

    def keep(name):
        return lambda v, hook: value.__setitem__(name, v[0].detach().clone())

    for name, text in (("clean", clean), ("corrupted", corrupted)):
        model.run_with_hooks(text.tokens[None], fwd_hooks=[("blocks.2.hook_mlp_out", keep(name))])
    step = (value["clean"] - value["corrupted"]).square().sum(dim=-1)
    exact = ss.patch_activations(
        model,
        clean,
        corrupted,
        sites=["mlp_out"],
        metric=residual_sum,
        layers=[2],
        sink=6,
        progress=False,
    )
    missed = exact.value[0, 0] - patched.value[2, 0]
    scale = float(exact.value.abs().max())
    torch.testing.assert_close(missed, step, rtol=1e-2, atol=2e-5 * scale)


def test_unequal_lengths_need_a_pairing(planted):
    bridge, clean, _, sink = planted
    tokens = torch.cat([clean.tokens[:3], clean.tokens[5:]])
    tokens[sink.position - 2] = 30
    shorter = ss.detect_sinks(bridge, tokens)
    with pytest.raises(ss.InputError, match=r"48 tokens, the corrupted one 46.*positions="):
        ss.patch_activations(bridge, clean, shorter)
    pairs = [(p, p) for p in range(3)] + [(p, p - 2) for p in range(5, 48)]
    patched = ss.patch_activations(
        bridge,
        clean,
        shorter,
        sites=["mlp_out"],
        positions=pairs,
        sink=sink.position,
        token_positions=[sink.position, 7],
        progress=False,
    )
    assert patched.position == (sink.position, sink.position - 2)
    assert patched.pairs == ((sink.position, sink.position - 2), (7, 5))
    assert patched.normalized[0, sink.writer, 0].item() == pytest.approx(1, abs=0.1)
    assert patched.tokens[0] == "t30"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["pattern"]}, "sites="),
        ({"sites": ["resid_mid"]}, "sites="),
        ({"sites": []}, "sites="),
        ({"metric": "loss"}, "metric='loss'"),
        ({"direction": "both"}, "direction='both'"),
        ({"scan": "fast"}, "scan='fast'"),
        ({"n_checked": -1}, "n_checked"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "layers is empty"),
        ({"token_positions": [N]}, "not paired"),
        ({"token_positions": []}, "not paired"),
        ({"positions": []}, "positions is empty"),
        ({"positions": [(0, N)]}, f"corrupted position {N}"),
        ({"positions": [(-1, 0)]}, "clean position -1"),
        ({"positions": [(0, 0), (1, 0)]}, "corrupted position twice"),
        ({"positions": [(1, 1)], "sink": 6}, "not paired"),
        ({"sink": N - 1}, "no later token"),
        ({"metric_layers": [7]}, "metric_layers"),
        ({"metric": lambda state: state.norm}, "must return one number"),
    ],
)
def test_bad_input(tiny, maps_of, arguments, message):
    model = tiny("llama")
    with pytest.raises(ss.InputError, match=message):
        ss.patch_activations(model, *maps_of(model), **arguments)


def test_bad_maps_and_metrics(planted, tiny, maps_of):
    bridge, clean, corrupted, _ = planted
    with pytest.raises(ss.InputError, match="sink map was measured in"):
        ss.patch_activations(bridge, clean, maps_of(tiny("llama"))[1])
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.patch_activations(
            bridge, clean, corrupted, dataclasses.replace(clean.secondary[0], layers=(2,))
        )
    with pytest.raises(ss.ModelError, match="no gradient"):
        ss.patch_activations(
            bridge, clean, corrupted, scan="attribution", metric=lambda state: torch.tensor(1.0)
        )

    def broken(state):
        raise RuntimeError("broken metric")

    for scan in ("exact", "attribution"):
        with pytest.raises(RuntimeError, match="broken metric"):
            ss.patch_activations(bridge, clean, corrupted, metric=broken, scan=scan)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
    assert all(parameter.grad is None for parameter in bridge.parameters())


def test_save_frame_and_figure(tiny, maps_of, tmp_path):
    model = tiny("qwen2")
    for scan in ("exact", "attribution"):
        patched = ss.patch_activations(model, *maps_of(model), 5, scan=scan, progress=False)
        loaded = PatchResult.load(patched.save(tmp_path / "patch.safetensors"))
        for entry in dataclasses.fields(PatchResult):
            one, other = getattr(patched, entry.name), getattr(loaded, entry.name)
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other)
            else:
                assert one == other, entry.name
        assert repr(loaded) == repr(patched)
        frame = patched.to_frame()
        assert len(frame) == 3 * 3 * N
        assert frame["exact"].notna().sum() == (len(frame) if scan == "exact" else 16)
        assert "<table" in patched._repr_html_()
        panels = {axes.get_label(): axes for axes in patched.plot().axes}
        shown = panels["mlp_out"].images[0].get_array()
        torch.testing.assert_close(torch.tensor(shown.data), patched.normalized[2])
        marked = sum(p.get_gid() == "checked" for a in panels.values() for p in a.patches)
        assert marked == len(patched.checked)
