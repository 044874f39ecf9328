"""What an intervention may say, what an edit may do, and which sink maps are refused."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.planted.planted_model import planted_model

N = 24
I = ss.Intervention  # noqa: E741
ROW = [I("mlp_out", 1, 5, ss.Zero())]
METHODS = ("cached", "packed", "full")


@pytest.fixture(scope="module")
def llama(tiny, tokens_of):
    """A tiny model and the sink map of a text."""
    return tiny("llama"), ss.detect_sinks(tiny("llama"), tokens_of(N))


def test_transformer_lens_names_of_hooks_are_sites():
    for hook, site in (
        ("hook_mlp_out", "mlp_out"),
        ("hook_attn_out", "attn_out"),
        ("hook_resid_post", "resid_post"),
        ("attn.hook_z", "z"),
        ("mlp.hook_post", "mlp_post"),
    ):
        named = I(f"blocks.5.{hook}", position=3, edit=ss.Zero())
        assert named == I(site, layer=5, position=3, edit=ss.Zero())
        assert named == I(f"blocks.5.{hook}", 5, 3, ss.Zero())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "blocks.5.hook_mlp_out", "layer": 4}, "layer 5, but layer=4"),
        ({"site": "blocks.5.hook_mlp_ou"}, "did you mean 'blocks.5.hook_mlp_out'"),
        ({"site": "mlp_outs"}, "did you mean 'mlp_out'"),
        ({"site": "pattern"}, "'pattern' cannot be edited"),
        ({"site": "attn_scores"}, "'attn_scores' cannot be edited"),
        ({"site": "rot_q"}, "'rot_q' cannot be edited"),
        ({"site": "final_norm"}, "'final_norm' cannot be edited"),
        ({"site": "blocks.1.attn.hook_pattern"}, "hook_pattern' cannot be edited"),
        ({"site": "blocks.1.hook_resid_mid"}, 'site="resid_mid", layer=1'),
        ({"head": 1}, "'mlp_out' has no heads"),
        ({"site": "z", "neuron": 1}, "'z' has no neurons"),
        ({"site": "z", "head": -1}, "head must be an integer from 0 on, got -1"),
        ({"site": "mlp_post", "neuron": True}, "neuron must be an integer from 0 on, got True"),
        ({"layer": -1}, "layer must be an integer from 0 on, got -1"),
        ({"layer": True}, "layer must be an integer from 0 on, got True"),
        ({"layer": None}, "layer must be an integer from 0 on, got None"),
        ({"position": -1}, "position must be an integer from 0 on, got -1"),
        ({"position": 1.5}, "position must be an integer from 0 on, got 1.5"),
        ({"edit": ss.Zero}, r"such as Zero\(\)"),
        ({"edit": None}, r"such as Zero\(\)"),
    ],
)
def test_a_wrong_intervention_is_refused_when_it_is_made(arguments, message):
    defaults = {"site": "mlp_out", "position": 3, "edit": ss.Zero()}
    if not str(arguments.get("site", "")).startswith("blocks"):
        defaults["layer"] = 1
    with pytest.raises(ss.InputError, match=message):
        I(**(defaults | arguments))


@pytest.mark.parametrize("position", [-1, True, 2.5, None])
def test_a_wrong_position_to_resample_is_refused_when_the_edit_is_made(position):
    with pytest.raises(ss.InputError, match="Resample's position must be an integer"):
        ss.Resample(position)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (I("mlp_out", 3, 5, ss.Zero()), "layer 3 is out of range"),
        (I("mlp_out", 1, N, ss.Zero()), f"position {N}"),
        (I("z", 1, 5, ss.Zero(), head=4), "head 4"),
        (I("k", 1, 5, ss.Zero(), head=2), "head 2"),
        (I("mlp_post", 1, 5, ss.Zero(), neuron=48), "neuron 48"),
        (I("mlp_out", 1, 5, ss.Resample(N)), f"Resample's position {N}"),
        (I("mlp_out", 1, 5, ss.Replace(torch.zeros(31))), r"shape \[31\]"),
        (I("mlp_out", 1, 5, lambda value, clean, ordinary: value[:3]), r"returned \[3\]"),
        (I("mlp_out", 1, 5, lambda value, clean, ordinary: value * torch.nan), "NaN"),
        ((I("mlp_out", 1, 5, ss.Zero()), I("mlp_out", 1, 6, ss.Zero())), r"\[5, 6\]"),
        ("mlp_out", "must be an Intervention"),
    ],
)
def test_an_intervention_that_does_not_fit_is_refused_when_it_runs(llama, row, message):
    with pytest.raises(ss.InputError, match=message):
        ss.counterfactuals(*llama, [row])


def test_a_site_that_the_model_lacks_is_refused(tiny, tokens_of):
    model = tiny("neox")  # attention and MLP are parallel
    sink_map = ss.detect_sinks(model, tokens_of(N))
    with pytest.raises(ss.InputError, match="has no resid_mid of layer 1"):
        ss.counterfactuals(model, sink_map, [I("resid_mid", 1, 5, ss.Zero())])


def test_resid_mid_is_the_residual_stream_and_not_the_hook_of_a_bridge(llama):
    """In a bridge an edit at `hook_resid_mid` reaches the MLP alone; ours also what follows."""
    model, sink_map = llama
    vector = torch.linspace(-1, 1, model.cfg.d_model)
    rows = ss.counterfactuals(model, sink_map, [I("resid_mid", 1, 5, ss.Replace(vector))])

    def replace(value, hook):
        value = value.clone()
        value[:, 5] = vector
        return value

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", replace)]):
        _, cache = model.run_with_cache(sink_map.tokens[None])
    mlp_out, by_hook = cache["mlp_out", 1][0, 5], cache["resid_post", 1][0, 5]
    assert rows.norm[0, 1].item() == pytest.approx((vector + mlp_out).norm().item(), rel=1e-4)
    assert (by_hook - vector - mlp_out).norm() > 0.1 * by_hook.norm()


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_that_writes_in_place_changes_nothing_else(llama, method):
    model, sink_map = llama
    others = [
        I("mlp_out", 1, 5, ss.Resample(3)),
        I("mlp_out", 1, 5, ss.Mean()),
        I("mlp_out", 1, 7, ss.Scale(0.5)),
        I("z", 1, 5, ss.Mean(), head=1),
    ]

    def vandal(value, clean, ordinary):
        value.zero_()
        clean.fill_(1e3)
        ordinary.zero_()
        return value

    spoilt = [
        I("mlp_out", 1, 5, vandal),
        I("z", 1, 5, vandal, head=1),
        I("resid_mid", 1, 5, vandal),
    ]
    proper = [I(edit.site, 1, 5, ss.Zero(), head=edit.head) for edit in spoilt]
    options = {"method": method, "progress": False}
    expected = ss.counterfactuals(model, sink_map, [*proper, *others], **options)
    for _ in range(2):
        rows = ss.counterfactuals(model, sink_map, [*spoilt, *others], **options)
        torch.testing.assert_close(rows.norm, expected.norm)
        torch.testing.assert_close(rows.direct_score, expected.direct_score)


def test_a_function_is_an_edit(llama):
    flip = ss.counterfactuals(*llama, [I("mlp_out", 1, 5, lambda value, clean, ordinary: -value)])
    scale = ss.counterfactuals(*llama, [I("mlp_out", 1, 5, ss.Scale(-1.0))])
    assert torch.equal(flip.norm, scale.norm)


@pytest.mark.slow
def test_a_map_of_another_model_is_refused_with_both_names(make_tiny, tokens_of):
    model = make_tiny("llama")
    sink_map = ss.detect_sinks(model, tokens_of(N))

    def refused(other):
        with pytest.raises(ss.InputError, match="the sink map was measured in") as error:
            ss.counterfactuals(other, sink_map, ROW)
        for provenance in (sink_map.provenance, Provenance.of(other)):
            assert f"{provenance.model.name!r} (weights {provenance.weights})" in str(error.value)

    refused(make_tiny("llama", seed=1))  # another checkpoint of the same shape
    wide = planted_model().load()
    assert wide.cfg.d_model != model.cfg.d_model
    refused(wide)
    before = sink_map.provenance.weights
    with torch.no_grad():  # the model of the map, changed afterwards
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.zero_()
    assert Provenance.of(model).weights != before
    refused(model)


def test_other_hooks_than_those_of_the_map_are_refused(make_tiny, tokens_of):
    model = make_tiny("llama")
    hooks = [("blocks.0.hook_mlp_out", lambda value, hook: value * 0.5)]
    plain = ss.detect_sinks(model, tokens_of(N))
    hooked = ss.detect_sinks(model, tokens_of(N), fwd_hooks=hooks)
    with pytest.raises(ss.InputError, match=r"no hook point.*blocks\.0\.mlp\.hook_out"):
        ss.counterfactuals(model, plain, ROW, fwd_hooks=hooks)
    with pytest.raises(ss.InputError, match=r"blocks\.0\.mlp\.hook_out.*no hook point"):
        ss.counterfactuals(model, hooked, ROW)
    elsewhere = [("blocks.1.hook_mlp_out", hooks[0][1])]
    with pytest.raises(ss.InputError, match="pass the same fwd_hooks"):
        ss.counterfactuals(model, hooked, ROW, fwd_hooks=elsewhere)
    model.add_hook(*elsewhere[0])
    with pytest.raises(ss.InputError, match=r"blocks\.1"):
        ss.counterfactuals(model, plain, ROW)


def test_what_is_no_sink_map_is_refused(llama, tokens_of):
    model, sink_map = llama
    with pytest.raises(ss.InputError, match="expected a sink map, got Tensor"):
        ss.counterfactuals(model, tokens_of(N), ROW)
    with pytest.raises(ss.InputError, match="expected a sink map, got list"):
        ss.counterfactuals(model, [sink_map, sink_map], ROW)
    published = ss.detect_sinks(model, tokens_of(N), criterion="published")
    with pytest.raises(ss.InputError, match="criterion='evidence'"):
        ss.counterfactuals(model, published, ROW)
    with pytest.raises(ss.InputError, match="no interventions"):
        ss.counterfactuals(model, sink_map, [])
    with pytest.raises(ss.InputError, match="method"):
        ss.counterfactuals(model, sink_map, ROW, method="fast")


def test_a_mixture_of_experts_has_no_neurons(tiny, tokens_of):
    """There `mlp_post` has residual dimensions, so `neuron` would edit one of those."""
    model = tiny("mixtral")
    sink_map = ss.detect_sinks(model, tokens_of(12))
    edit = ss.Intervention("mlp_post", 1, 3, ss.Zero(), neuron=5)
    with pytest.raises(ss.InputError, match=r"layer 1 .* mixture of experts"):
        ss.counterfactuals(model, sink_map, [edit])
