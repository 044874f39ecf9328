"""Means over many texts, against TransformerLens' cache, and as an edit."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model

N = 24


@pytest.fixture(scope="module")
def llama(tiny, tokens_of):
    """A tiny model and the sink map of a text."""
    return tiny("llama"), ss.detect_sinks(tiny("llama"), tokens_of(N))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_means_are_those_of_the_cache(tiny, tokens_of, family):
    model = tiny(family)
    texts = [tokens_of(N, seed=1), tokens_of(N + 9, seed=2)]
    sink_maps = ss.detect_sinks(model, texts, progress=False)
    means = ss.mean_activations(model, sink_maps, ["mlp_out", "z"], progress=False)
    total, heads, count = torch.zeros(3, 32), torch.zeros(3, 4, 8), 0
    for text, sink_map in zip(texts, sink_maps, strict=True):
        _, cache = model.run_with_cache(text[None])
        left_out = {0, sink_map.primary_position, *(sink.position for sink in sink_map.sinks)}
        ordinary = [p for p in range(len(text)) if p not in left_out]
        count += len(ordinary)
        for layer in range(3):
            total[layer] += cache["mlp_out", layer][0, ordinary].sum(0)
            heads[layer] += cache["z", layer][0, ordinary].reshape(len(ordinary), 4, 8).sum(0)
    assert (means.n_tokens, means.n_texts) == (count, 2)
    assert means.provenance == sink_maps[0].provenance
    torch.testing.assert_close(means.mean["mlp_out"], total / count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means.mean["z"], heads / count, rtol=1e-4, atol=1e-5)


def test_the_mean_replaces_an_activation(llama, tokens_of, tmp_path):
    model, sink_map = llama
    other = ss.detect_sinks(model, tokens_of(N, seed=1))
    means = ss.mean_activations(model, other, ["mlp_out", "z"], progress=False)
    means = ss.MeanActivations.load(means.save(tmp_path / "means.safetensors"))
    rows = ss.counterfactuals(
        model,
        sink_map,
        [
            ss.Intervention("mlp_out", 1, 5, means.edit("mlp_out", 1)),
            ss.Intervention("mlp_out", 1, 5, ss.Replace(means.mean["mlp_out"][1])),
            ss.Intervention("z", 1, 5, means.edit("z", 1, head=2), head=2),
        ],
    )
    torch.testing.assert_close(rows.norm[0], rows.norm[1])
    assert (rows.norm[0] - rows.norm[2]).abs().max() > 0.1


@pytest.mark.slow
def test_attribution_with_the_means_of_another_text():
    """Ordinary tokens get nothing from a planted writer, so its mean removes the sink as well."""
    planted = planted_model()
    model, tokens = planted.load(), planted.tokens(64)
    truth = planted.truth(tokens)
    other = ss.detect_sinks(model, planted.tokens(64, seed=5))
    means = ss.mean_activations(model, other, progress=False)
    sink_map = ss.detect_sinks(model, tokens)
    options = {"n_controls": 2, "progress": False}
    with_means = ss.attribute_to_mlps(model, sink_map, means=means, **options)
    without = ss.attribute_to_mlps(model, sink_map, **options)
    for index, (sink, expected) in enumerate(
        zip(
            sorted(with_means.sinks, key=lambda s: s.position),
            sorted(truth.sinks, key=lambda s: s.position),
            strict=True,
        )
    ):
        assert sink.writer == expected.writer
        assert with_means.mlp_mean.lifetime[index].min() == 0
    assert torch.equal(with_means.mlp_zero.norm, without.mlp_zero.norm)
    assert not torch.equal(with_means.mlp_mean.norm, without.mlp_mean.norm)


def test_bad_input(llama, tiny):
    model, sink_map = llama
    with pytest.raises(ss.InputError, match="no site 'pattern'"):
        ss.mean_activations(model, sink_map, ["pattern"])
    with pytest.raises(ss.InputError, match="expected sink maps, got Tensor"):
        ss.mean_activations(model, sink_map.tokens)
    with pytest.raises(ss.InputError, match="expected sink maps, got none"):
        ss.mean_activations(model, [])
    with pytest.raises(ss.InputError, match="measured in"):
        ss.mean_activations(tiny("gpt2"), sink_map)
    means = ss.mean_activations(model, sink_map, ["mlp_out"], progress=False)
    with pytest.raises(ss.InputError, match="no mean of 'attn_out'"):
        means.edit("attn_out", 0)
    with pytest.raises(ss.InputError, match="layer 3"):
        means.edit("mlp_out", 3)
    with pytest.raises(ss.InputError, match="no head 0"):
        means.edit("mlp_out", 0, head=0)
