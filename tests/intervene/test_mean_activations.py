"""Means over a reference corpus, against the host's cache, and as an edit."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model

N = 24


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_means_are_those_of_the_hosts_cache(tiny, tokens_of, family):
    model = tiny(family)
    texts = [tokens_of(N, seed=1), tokens_of(N + 9, seed=2)]
    means = ss.mean_activations(model, texts, ["mlp_out", "z"], progress=False)
    total, heads, count = torch.zeros(3, 32), torch.zeros(3, 4, 8), 0
    for text in texts:
        _, cache = model.run_with_cache(text[None])
        sinks = ss.detect_sinks(model, text)
        out = {0, sinks.primary_position, *(sink.position for sink in sinks.sinks)}
        kept = [p for p in range(len(text)) if p not in out]
        count += len(kept)
        for layer in range(3):
            total[layer] += cache["mlp_out", layer][0, kept].sum(0)
            heads[layer] += cache["z", layer][0, kept].reshape(len(kept), 4, 8).sum(0)
    assert (means.n_tokens, means.n_texts) == (count, 2)
    torch.testing.assert_close(means.mean["mlp_out"], total / count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means.mean["z"], heads / count, rtol=1e-4, atol=1e-5)


def test_the_mean_is_put_in_the_place_of_an_activation(tiny, tokens_of, tmp_path):
    model, text = tiny("llama"), tokens_of(N)
    means = ss.mean_activations(model, [tokens_of(N, seed=1)], ["mlp_out", "z"], progress=False)
    means = ss.MeanActivations.load(means.save(tmp_path / "means.safetensors"))
    rows = ss.counterfactuals(
        model,
        text,
        [
            ss.Intervention("mlp_out", 1, 5, means.edit("mlp_out", 1)),
            ss.Intervention("mlp_out", 1, 5, ss.Replace(means.mean["mlp_out"][1])),
            ss.Intervention("z", 1, 5, means.edit("z", 1, head=2), head=2),
        ],
    )
    torch.testing.assert_close(rows.norm[0], rows.norm[1])
    assert (rows.norm[0] - rows.norm[2]).abs().max() > 0.1


def test_attribution_with_a_reference_corpus():
    """Ordinary tokens get nothing from a planted writer, so its mean removes the sink as well."""
    planted = planted_model()
    model, tokens = planted.load(), planted.tokens(64)
    truth = planted.truth(tokens)
    means = ss.mean_activations(model, [planted.tokens(64, seed=5)], progress=False)
    sinks = ss.detect_sinks(model, tokens)
    found = ss.attribute_to_mlps(model, sinks, reference=means, n_controls=2, progress=False)
    own = ss.attribute_to_mlps(model, sinks, n_controls=2, progress=False)
    for index, (sink, expected) in enumerate(
        zip(
            sorted(found.sinks, key=lambda s: s.position),
            sorted(truth.sinks, key=lambda s: s.position),
            strict=True,
        )
    ):
        assert sink.writer == expected.writer
        assert found.mlp_mean.lifetime[index].min() == 0
    assert torch.equal(found.mlp_zero.norm, own.mlp_zero.norm)
    assert not torch.equal(found.mlp_mean.norm, own.mlp_mean.norm)


def test_bad_input(tiny, tokens_of):
    model = tiny("llama")
    with pytest.raises(ss.InputError, match="no site 'pattern'"):
        ss.mean_activations(model, [tokens_of(N)], ["pattern"])
    with pytest.raises(ss.InputError, match="a list of texts"):
        ss.mean_activations(model, tokens_of(N))
    means = ss.mean_activations(model, [tokens_of(N)], ["mlp_out"], progress=False)
    with pytest.raises(ss.InputError, match="no mean of 'attn_out'"):
        means.edit("attn_out", 0)
    with pytest.raises(ss.InputError, match="layer 3"):
        means.edit("mlp_out", 3)
    with pytest.raises(ss.InputError, match="no head 0"):
        means.edit("mlp_out", 0, head=0)
