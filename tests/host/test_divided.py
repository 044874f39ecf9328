"""Models that accelerate divides over devices: the numbers of the undivided model."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

import secondary_sinks as ss
from secondary_sinks.host.model_info import describe

N = 40


def divided(hf, on_disk, folder):
    """`hf` with every layer or embedding whose name ends so on disk, the rest on the CPU."""
    leaves = [
        name
        for name, module in hf.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    places = {name: "disk" if on_disk(name) else "cpu" for name in leaves}
    assert "disk" in places.values()
    return dispatch_model(
        hf, places, main_device="cpu", offload_dir=str(folder), offload_buffers=False
    )


PLACES = {
    "two layers": lambda name: ".1." in name or ".2." in name,
    "everything": lambda name: True,
}


def numbers(model, tokens):
    """The numbers of trace, detection and rows, and the engine of the rows."""
    collectors = [ss.SinkScores(min_queries=1), ss.ResidualGeometry(), ss.Norms("k")]
    collectors += [ss.ReceivedAttention((0.3,)), ss.MassiveActivations()]
    sinks = ss.detect_sinks(model, tokens, primary=0)
    rows = ss.counterfactuals(
        model,
        sinks,
        [
            *(ss.Intervention("mlp_out", layer, 5, ss.Zero()) for layer in range(3)),
            ss.Intervention("resid_post", 1, 9, ss.Add(torch.ones(32))),
            ss.Intervention("z", 2, 9, ss.Mean()),
        ],
        progress=False,
    )
    values = {"score": sinks.sink_score, "norm": rows.norm, "direct": rows.direct_score}
    for path in ("streaming", "eager"):
        result = ss.trace(model, tokens, collectors, attention=path)
        values |= {f"{path} {name}": result[name] for name in ("SinkScores", "k_norm")}
        values[f"{path} maximum"] = result["ReceivedAttention"].maximum
        values[f"{path} alignment"] = result["ResidualGeometry"].alignment
        values[f"{path} massive"] = result["MassiveActivations"].value
    return rows.engine, values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", "two layers"),
        *((family, "everything") for family in ("llama", "gpt2", "phi3", "gemma2", "gpt-oss")),
    ],
)
def test_a_divided_model_gives_the_same_numbers(hf_model, tiny, tokens_of, tmp_path, family, where):
    tokens = tokens_of(N)
    engine, expected = numbers(tiny(family), tokens)
    hf = divided(hf_model(family), PLACES[where], tmp_path)
    assert any(parameter.is_meta for parameter in hf.parameters())
    model = ss.load_model(hf, tokenizer=tiny("llama").tokenizer, progress=False)
    assert describe(model) == describe(tiny(family))
    found_engine, found = numbers(model, tokens)
    assert found_engine == engine
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name
    assert any(parameter.is_meta for parameter in hf.parameters()), "the weights have stayed"


@pytest.mark.parametrize("wanted", [{"device": "cpu"}, {"dtype": torch.bfloat16}])
def test_a_divided_model_is_not_moved(hf_model, tiny, tmp_path, wanted):
    hf = divided(hf_model("llama"), PLACES["two layers"], tmp_path)
    with pytest.raises(ss.ModelError, match=r"divided over cpu, disk.*Leave out device and dtype"):
        ss.load_model(hf, tokenizer=tiny("llama").tokenizer, progress=False, **wanted)
