"""An MLP along the components of its inputs: zero input, planted truth, every family, Qwen."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.mlp import run_mlp
from secondary_sinks.planted.planted_model import planted_model

BIASED = ("gpt2", "neox", "gpt-oss")


@functools.cache
def default():
    """A planted model, and its maps of three texts."""
    model = planted_model()
    host = model.load()
    return host, [ss.detect_sinks(host, model.tokens(64, seed=seed)) for seed in range(3)]


def test_an_input_of_zeros_gives_what_the_biases_write(make_tiny, family, tokens_of):
    model, tokens = make_tiny(family), tokens_of(40)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "mlp" in name:
                parameter.fill_(0.2)
    some = (ss.Sink(9, "", int(tokens[9]), "secondary", (1, 2)),)
    sinks = dataclasses.replace(ss.detect_sinks(model, tokens), sinks=some, phases=((0, 3),))
    found = ss.mlp_response(model, sinks, layer=1, n_components=3, alphas=[-2.0, 0.0, 3.0])
    assert found.alphas.tolist() == [[-2, 0, 3]] * 3
    torch.testing.assert_close(found.norm[:, 1], torch.full((3,), found.zero_norm))
    assert (found.zero_norm > 0) == (family in BIASED)
    assert math.isnan(found.zero_cosine) == (family not in BIASED)
    again = run_mlp(model, 1, 3 * found.components)["written"]
    torch.testing.assert_close(found.norm[:, 2], again.norm(dim=1), rtol=1e-4, atol=1e-5)
    along = torch.cosine_similarity(again, found.direction[None], dim=1)
    torch.testing.assert_close(found.cosine[:, 2], along, rtol=1e-3, atol=1e-4)


def test_one_component_makes_the_planted_writer_write():
    host, maps = default()
    found = ss.mlp_response(host, maps)
    assert found.layer == 4
    assert int(found.is_sink.sum()) == sum(len(one.secondary) for one in maps)
    assert found.text.unique().tolist() == [0, 1, 2]
    assert found.agreement > 0.999
    assert found.zero_norm == 0
    frame = found.components_frame()
    best = frame.separation.argmax()
    assert frame.separation[best] == 1
    assert frame.largest_norm.argmax() == best
    assert frame.cosine_at_sinks[best] > 0.95
    assert (found.token_norm[found.is_sink] > 50).all()
    assert (found.token_cosine[found.is_sink] > 0.95).all()
    assert (found.token_norm[~found.is_sink] < 2).all()
    torch.testing.assert_close(found.alphas[:, 20], torch.zeros(len(found.alphas)))
    spans = found.projection.abs().amax(dim=0)
    torch.testing.assert_close(found.alphas[:, -1], spans)


def test_layer_none_is_the_layer_that_wrote_most():
    host, maps = default()
    one = ss.mlp_response(host, maps[:1], n_components=2)
    named = ss.mlp_response(host, maps[0], layer=4, n_components=2)
    assert torch.equal(one.norm, named.norm)
    by_text = ss.mlp_response(host, maps[0].tokens, n_components=2)
    assert torch.equal(one.norm, by_text.norm)


def test_table_and_file(tmp_path):
    host, maps = default()
    found = ss.mlp_response(host, maps[0], n_components=50)
    n = len(found.components)
    assert n == len(found.is_sink) - 1, "there are no more directions than tokens"
    assert len(found.to_frame()) == n * 41
    assert repr(found).startswith("MlpResponse('planted', MLP 4, 2 sinks and ")
    back = ss.MlpResponse.load(found.save(tmp_path / "response.safetensors"))
    assert back.components_frame().equals(found.components_frame())
    assert torch.equal(back.projection, found.projection)


def test_bad_input():
    host, maps = default()
    with pytest.raises(ss.InputError, match="n_components is 0"):
        ss.mlp_response(host, maps, n_components=0)
    with pytest.raises(ss.InputError, match="alphas"):
        ss.mlp_response(host, maps, alphas=[float("nan")])
    with pytest.raises(ss.InputError, match="alphas"):
        ss.mlp_response(host, maps, alphas=[])
    with pytest.raises(ss.InputError, match="layer 12"):
        ss.mlp_response(host, maps, layer=12)
    with pytest.raises(ss.InputError, match="their onsets are"):
        ss.mlp_response(host, maps, layer=11)
    bare = planted_model(secondary=())
    with pytest.raises(ss.InputError, match="no secondary sinks in any"):
        ss.mlp_response(bare.load(), bare.tokens(48))


def test_qwen(qwen):
    """The first component alone makes MLP 5 write along the sink direction, in one sense."""
    from secondary_sinks.cli.app import demo_messages

    sinks = ss.detect_sinks(qwen, demo_messages(), max_tokens=48)
    found = ss.mlp_response(qwen, sinks)
    assert found.layer == 5
    frame = found.components_frame()
    assert frame.separation[0] == 1
    assert frame.cosine_at_sinks[0] > 0.95
    assert frame.norm_at_sinks[0] > 20 * frame.norm_at_sinks[2:].max()
    assert found.norm[0, -1] > 10 * found.norm[0, 0], "the other sign writes next to nothing"
