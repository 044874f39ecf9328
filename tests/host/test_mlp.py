"""The MLP of a layer, run alone: in every family it gives what it gives in the model."""

from __future__ import annotations

import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host import mlp as module
from secondary_sinks.host.forward import observe
from secondary_sinks.host.mlp import affine, mlp_of, need_neurons, run_mlp
from secondary_sinks.host.sites import Site

EXPERTS = ("gpt-oss", "mixtral")
PLAIN = ("gpt2", "neox")
NORM_AFTER = ("gemma2", "gemma3", "olmo2")
SITES = {"input": "mlp_in", "output": "mlp_raw", "written": "mlp_out"}
HOOKED = {"gate": "mlp_pre", "pre": "mlp_pre", "up": "mlp_pre_linear", "product": "mlp_post"}


@pytest.fixture(scope="module")
def uneven(make_tiny):
    """Family -> a model with random weights and biases in its norms and layers."""

    @functools.cache
    def make(family):
        model = make_tiny(family)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def model(uneven, family):
    """Each of them in turn."""
    return uneven(family)


def recorded(model, layer, tokens, names):
    values = {}

    def keep(name):
        return lambda value: values.__setitem__(name, value[0].float().clone())

    observers = {Site(name, layer): keep(name) for name in names}
    observe(model, tokens[None], torch.ones_like(tokens[None]), observers)
    return values


def test_run_alone_it_gives_what_it_gave_in_the_model(model, family, tokens_of):
    tokens = tokens_of(20)
    for layer in range(3):
        mlp = mlp_of(model, layer)
        names = SITES | {stage: site for stage, site in HOOKED.items() if stage in mlp.stages}
        values = recorded(model, layer, tokens, names.values())
        stages = run_mlp(model, layer, values["mlp_in"])
        for stage, site in names.items():
            torch.testing.assert_close(stages[stage], values[site], rtol=1e-4, atol=1e-5)
        assert [stage for stage in stages if stage in mlp.stages] == list(mlp.stages)


def test_each_stage_follows_from_the_one_before(model, family, tokens_of):
    values = recorded(
        model, 1, tokens_of(20), ["resid_pre", "attn_out", "mlp_in", "mlp_raw", "mlp_out"]
    )
    mlp, stages = mlp_of(model, 1), run_mlp(model, 1, values["mlp_in"])
    assert mlp.has_norm_after == ("written" in mlp.stages) == (family in NORM_AFTER)
    assert (mlp.reads == "resid_pre") == (family == "neox")
    read = values["resid_pre"] + (values["attn_out"] if mlp.reads == "resid_mid" else 0)
    assert mlp.norm_before.error(read, stages["input"]) < 1e-4
    assert mlp.norm_before.centers == (family in PLAIN)
    scale = mlp.norm_after.scale(stages["output"], stages["written"])
    after = mlp.norm_after.linear(stages["output"], scale) + mlp.norm_after.bias
    torch.testing.assert_close(after, values["mlp_out"], rtol=1e-4, atol=1e-5)
    if family in EXPERTS:
        assert (mlp.stages, mlp.hidden, mlp.d_mlp) == (("input", "output"), None, 0)
        return
    for stage, (weight, bias) in mlp.readers.items():
        torch.testing.assert_close(
            affine(stages["input"], weight, bias), stages[stage], rtol=1e-4, atol=1e-5
        )
    hidden = stages[mlp.hidden]
    assert hidden.shape[1] == mlp.d_mlp
    torch.testing.assert_close(
        affine(hidden, mlp.w_out, mlp.b_out), stages["output"], rtol=1e-4, atol=1e-4
    )
    if family not in PLAIN:
        product = stages["activation"] * stages["up"]
        torch.testing.assert_close(product, stages["product"], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_behind_and_no_hook_of_the_user_fires(make_tiny):
    model, fired = make_tiny("llama"), []
    model.add_hook("blocks.1.mlp.hook_pre", lambda value, hook: fired.append(value.shape))
    before = [len(point._forward_hooks) for point in model.hook_dict.values()]
    model.train()
    first = run_mlp(model, 1, torch.ones(3, 32))
    assert model.training
    assert fired == []
    assert [len(point._forward_hooks) for point in model.hook_dict.values()] == before
    assert torch.equal(first["output"], run_mlp(model, 1, torch.ones(3, 32))["output"])
    assert not first["output"].requires_grad


def test_weights_that_are_not_what_the_module_does_are_refused(make_tiny, monkeypatch):
    model = make_tiny("llama")
    inner = model.blocks[1].mlp.original_component
    run_mlp(model, 0, torch.ones(1, 32))
    real = inner.act_fn.forward
    monkeypatch.setattr(inner.act_fn, "forward", lambda value: real(value) + 0.5 * torch.rand(()))
    with pytest.raises(ss.ModelError, match=r"MLP of layer 1.*off by"):
        mlp_of(model, 1)


def test_the_check_costs_one_pass_a_layer(make_tiny, monkeypatch):
    model, passes = make_tiny("gemma2"), []
    real = module._record
    monkeypatch.setattr(module, "_record", lambda *a: passes.append(a[2]) or real(*a))
    for layer in (0, 1, 0, 1):
        mlp_of(model, layer)
    assert passes == [0, 1]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_have_no_neurons_and_say_so(tiny, family):
    with pytest.raises(ss.ModelError, match="mixture of experts"):
        need_neurons(tiny(family), 1)


def test_bad_input(tiny):
    with pytest.raises(ss.InputError, match="layer 3 is out of range"):
        mlp_of(tiny("llama"), 3)
    with pytest.raises(ss.InputError, match=r"shape \[4, 31\]"):
        run_mlp(tiny("llama"), 1, torch.zeros(4, 31))


def test_half_precision(hf_model, tiny):
    model = ss.load_model(
        hf_model("llama").to(torch.bfloat16), tokenizer=tiny("llama").tokenizer, progress=False
    )
    assert run_mlp(model, 1, torch.ones(2, 32))["product"].dtype == torch.float32


def test_an_activation_that_is_no_attribute_is_found(tiny):
    """LFM2 calls a function; that it is this one is checked by the stages of a pass."""
    assert mlp_of(tiny("lfm2"), 1).activation is torch.nn.functional.silu
