"""Sites are named as this library names them, or as TransformerLens names one layer's hook."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.sites import FINAL_NORM, SITE_HOOKS, Site, layer_sites, site_named

N = 24


@pytest.mark.parametrize("name", SITE_HOOKS)
def test_both_names_of_every_site(name):
    assert site_named(name) == Site(name)
    assert site_named(SITE_HOOKS[name].format(layer=12)) == Site(name, 12)


def test_a_name_stands_for_every_layer_a_hook_for_one():
    assert layer_sites(["mlp_out"], 3) == [Site("mlp_out", layer) for layer in range(3)]
    assert layer_sites(["blocks.1.hook_mlp_out", FINAL_NORM], 3) == [
        Site("mlp_out", 1),
        Site(FINAL_NORM),
    ]
    twice = layer_sites(["blocks.1.hook_mlp_out", "mlp_out", "mlp_out"], 3)
    assert sorted(twice) == layer_sites(["mlp_out"], 3), "every site is read once"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp_outt", "no site 'mlp_outt'; did you mean 'mlp_out'"),
        ("hook_mlp_out", "did you mean 'mlp_out'"),
        ("blocks.5.hook_mlp_outt", "did you mean 'blocks.5.hook_mlp_out'"),
        ("blocks.5.attn.pattern", "'blocks.5.attn.hook_pattern'"),
        ("nowhere", "no site 'nowhere'; the sites are resid_pre, "),
        ("blocks.x.hook_mlp_out", "no site 'blocks.x.hook_mlp_out'"),
        ("blocks.9.hook_mlp_out", "the model's layers are 0 to 2"),
    ],
)
def test_an_unknown_name_offers_the_nearest(tiny, tokens_of, name, message):
    with pytest.raises(ss.InputError, match=message):
        ss.trace(tiny("llama"), tokens_of(N), [ss.Norms(name)])


class Calls(ss.Collector):
    def __init__(self, *sites):
        self.sites = sites

    def start(self, run):
        self.calls = []

    def update(self, site, layer, activation):
        self.calls.append((site, layer))

    def result(self):
        return self.calls


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "eager"), ("llama", "streaming"), ("gemma2", "streaming"), ("gpt2", "eager")],
)
def test_a_hook_of_one_layer_is_that_layer_of_the_site(tiny, kind, tokens_of, attention):
    hooks = ["blocks.2.hook_resid_post", "blocks.1.attn.hook_k"]
    collectors = [*map(ss.Norms, ("resid_post", "k", *hooks)), Calls(hooks[1], hooks[0])]
    trace_result = ss.trace(tiny(kind), tokens_of(N), collectors, attention=attention)
    assert trace_result["Calls"] == [("k", 1), ("resid_post", 2)]
    for name, hook, layer in (("resid_post", hooks[0], 2), ("k", hooks[1], 1)):
        one_layer = trace_result[f"{hook}_norm"]
        assert torch.equal(one_layer, trace_result[f"{name}_norm"][layer : layer + 1])


def test_chosen_vectors_of_one_layer(tiny, tokens_of):
    collectors = [
        ss.ChosenVectors([3, 1], ["blocks.1.hook_mlp_out"], name="one"),
        ss.ChosenVectors([3, 1], ["mlp_out"], name="all"),
    ]
    trace_result = ss.trace(tiny("llama"), tokens_of(N), collectors)
    assert torch.equal(trace_result["one"]["mlp_out"], trace_result["all"]["mlp_out"][1:2])


def test_a_hook_that_does_not_fire_in_streamed_attention_raises(tiny, tokens_of):
    collector = Calls("blocks.1.attn.hook_pattern")
    with pytest.raises(ss.ModelError, match="'pattern' is requested, whose hook does not fire"):
        ss.trace(tiny("llama"), tokens_of(N), [collector], attention="streaming")
    assert ss.trace(tiny("llama"), tokens_of(N), [collector])["Calls"] == [("pattern", 1)]


def test_sites_that_are_a_string_are_refused(tiny, tokens_of):
    class Careless(ss.Collector):
        sites = "mlp_out"

    with pytest.raises(ss.InputError, match=r"must be a tuple of names, as in \('mlp_out',\)"):
        ss.trace(tiny("llama"), tokens_of(N), [Careless()])
