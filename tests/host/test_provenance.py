"""A result says where it comes from, and is refused by every other model."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.fingerprint import template_hash
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.provenance import PACKAGES, Provenance, check_same_model, hook_labels

N = 24
MLP_OUT = "blocks.1.hook_mlp_out"


def look(value, hook):
    return None


def test_a_trace_says_what_it_was_measured_with(make_tiny, tokens_of):
    model = make_tiny("llama")
    model.original_model.config._commit_hash = "0123abcd"
    streamed, eager = (
        ss.trace(model, tokens_of(N), [ss.ResidualNorms()], attention=path).provenance
        for path in ("streaming", "eager")
    )
    assert (streamed.attention, eager.attention) == ("streaming", "eager")
    info = eager.model
    assert (info.generation, info.n_layers, info.n_heads, info.d_model) == ("bridge", 3, 4, 32)
    assert (info.device, info.dtype, info.revision) == ("cpu", "float32", "0123abcd")
    assert eager.versions == {package: version(package) for package in PACKAGES}
    assert eager.hooks == ()
    changed = eager.extended(seed=3, engine="cached")
    assert (changed.seed, changed.engine, changed.weights) == (3, "cached", eager.weights)


def test_a_trace_says_how_its_text_became_tokens(make_tiny, tokens_of):
    model = make_tiny("llama")
    template = "{{ messages[0]['content'] }}"

    def provenance(text, **options):
        return ss.trace(model, text, [ss.ResidualNorms()], **options).provenance

    assert provenance("w3 w4").starts_with_bos is False
    assert provenance("w3 w4", prepend_bos=True).starts_with_bos is True
    model.tokenizer.chat_template = template
    assert provenance("w3 w4").chat_template is None
    assert provenance("w3 w4", chat=True).chat_template == template_hash(model.tokenizer)
    assert provenance([{"role": "user", "content": "w3 w4"}]).chat_template is not None
    model.tokenizer = None
    without = provenance(tokens_of(N))
    assert without.tokenizer is without.starts_with_bos is without.chat_template is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_is_that_of_the_weights(make_tiny, dtype):
    """The configuration still says float32."""
    model = make_tiny("llama")
    model.to(dtype)
    assert describe(model).dtype == str(dtype).removeprefix("torch.")
    model.unembed.float()
    assert describe(model).dtype == str(dtype).removeprefix("torch."), "the coarsest counts"


def test_hooks_are_labelled_however_they_are_put_there(make_tiny):
    model = make_tiny("gemma2")
    assert hook_labels(model, ()) == ()
    in_the_call = hook_labels(model, [(MLP_OUT, look)])
    model.add_hook(MLP_OUT, look)
    assert hook_labels(model, ()) == in_the_call == (model.hook_dict[MLP_OUT].name,)
    filtered = hook_labels(model, [(lambda name: "resid" in name, look)])
    assert filtered == ("a filter of names", *in_the_call)


def test_a_result_is_accepted_by_its_own_model(tiny, make_tiny):
    model = tiny("llama")
    check_same_model(Provenance.of(model), model, what="the map")
    check_same_model(Provenance.of(model), make_tiny("llama"), what="the map")
    hooks = [(MLP_OUT, look)]
    check_same_model(Provenance.of(model, fwd_hooks=hooks), model, hooks, what="the map")


def test_other_weights_are_refused_and_both_models_named(make_tiny, tiny):
    provenance = Provenance.of(tiny("llama"))
    for model in (tiny("qwen3"), make_tiny("llama", 1)):
        other = Provenance.of(model)
        with pytest.raises(ss.InputError, match=r"^the map was measured in") as caught:
            check_same_model(provenance, model, what="the map")
        for part in (provenance, other):
            assert f"{part.model.name!r} (weights {part.weights})" in str(caught.value)


def test_another_tokenizer_is_refused(make_tiny):
    model = make_tiny("llama")
    provenance = Provenance.of(model)
    model.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ss.InputError, match=r"in 'Llama\w*' with tokenizer .*, but 'Llama\w*' now"):
        check_same_model(provenance, model, what="the map")


@pytest.mark.slow
def test_other_hooks_are_refused(make_tiny):
    model = make_tiny("llama")
    provenance = Provenance.of(model)
    name = model.hook_dict[MLP_OUT].name
    with pytest.raises(ss.InputError, match=rf"hooks at no hook point, but .* hooks at {name}:"):
        check_same_model(provenance, model, [(MLP_OUT, look)], what="the map")
    model.add_hook(MLP_OUT, look)
    with pytest.raises(ss.InputError, match="pass the same fwd_hooks"):
        check_same_model(provenance, model, what="the map")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_nothing_of_the_model_changes(make_tiny, kind):
    model = make_tiny(kind)
    model.train()
    model.add_hook(MLP_OUT, look)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = copy.deepcopy(model.original_model.config.to_dict())
    tokenizer = copy.deepcopy(model.tokenizer.init_kwargs)
    state = torch.random.get_rng_state()
    check_same_model(Provenance.of(model), model, what="the map")
    assert model.training
    assert hook_labels(model, ()) == (model.hook_dict[MLP_OUT].name,)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.original_model.config.to_dict() == settings
    assert model.tokenizer.init_kwargs == tokenizer
    assert torch.equal(torch.random.get_rng_state(), state)
