"""The MLP of a `HookedTransformer`'s layer, which has no hook at its own input and output."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import secondary_sinks as ss
from secondary_sinks.host.forward import forward
from secondary_sinks.host.mlp import mlp_of, run_mlp
from secondary_sinks.host.sites import Site, missing_sites
from secondary_sinks.planted.planted_model import planted_model

SETTINGS = {
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 64,
    "n_ctx": 32,
    "d_vocab": 50,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "seed": 3,
    "initializer_range": 0.4,
}
GATED = {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"}
KINDS = {
    "plain": {},
    "parallel": {"parallel_attn_mlp": True},
    "gated": GATED,
    "norm after": GATED | {"use_normalization_before_and_after": True},
    "no norm": {"normalization_type": None},
    "folded norm": {"normalization_type": "LNPre"},
}
TOKENS = torch.arange(3, 23)


def hooked(kind):
    model = HookedTransformer(HookedTransformerConfig(**(SETTINGS | KINDS[kind]))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.shape[0] in (32, 64):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if "gated_mlp" in KINDS[kind]:
            for block in model.blocks:
                block.mlp.b_in.zero_()  # TransformerLens 3 adds it to the product
    return model


@pytest.mark.parametrize("kind", list(KINDS))
def test_run_alone_it_gives_what_it_gave_in_the_model(kind):
    model, recorded = hooked(kind), {}
    names = ("resid_pre", "mlp_in", "mlp_raw", "mlp_pre", "mlp_post", "mlp_out")
    assert not missing_sites(model, [Site(name, 1) for name in names])
    keep = [
        (Site(name, 1), lambda value, name=name: recorded.__setitem__(name, value[0].clone()))
        for name in names
    ]
    forward(model, TOKENS[None], keep)
    mlp, stages = mlp_of(model, 1), run_mlp(model, 1, recorded["mlp_in"])
    first = "gate" if mlp.kind == "gated" else "pre"
    expected = {first: "mlp_pre", mlp.hidden: "mlp_post", "output": "mlp_raw", "written": "mlp_out"}
    for stage, site in expected.items():
        torch.testing.assert_close(stages[stage], recorded[site], rtol=1e-4, atol=1e-5)
    assert mlp.has_norm_after == (kind == "norm after")
    assert (mlp.reads == "resid_pre") == (kind == "parallel")


def test_an_edit_of_the_input_is_seen_by_the_mlp():
    model, recorded = hooked("gated"), {}
    edits = [
        (Site("mlp_in", 1), lambda value: torch.zeros_like(value)),
        (Site("mlp_out", 1), lambda value: recorded.__setitem__("out", value)),
    ]
    forward(model, TOKENS[None], edits)
    bias = model.blocks[1].mlp.b_out.detach()
    torch.testing.assert_close(recorded["out"][0], bias.expand(20, -1))


def test_planted_neurons():
    planted, results = planted_model(), {}
    for kind in ("bridge", "hooked"):
        model = planted.load(kind)
        sink_map = ss.detect_sinks(model, planted.tokens(64))
        results[kind] = ss.neuron_contributions(model, sink_map, n_controls=2)
    for result in results.values():
        assert [sink.neurons for sink in result.sinks] == [(16, 17), (18, 19)]
        assert (result.to_frame()["ablate_top.lifetime"] == 0).all()
    torch.testing.assert_close(
        results["bridge"].contribution, results["hooked"].contribution, rtol=1e-3, atol=1e-2
    )
