"""An MLP along the components of its inputs: zero input, planted truth, every family, Qwen."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.mlp_response import input_components, norm_and_cosine
from secondary_sinks.cli.detect import demo_messages
from secondary_sinks.host.mlp import run_mlp
from secondary_sinks.planted.planted_model import planted_model

BIASED = ("gpt2", "neox", "gpt-oss")


@functools.cache
def default():
    """A planted model, and its maps of three texts."""
    planted = planted_model()
    model = planted.load()
    return model, [ss.detect_sinks(model, planted.tokens(64, seed=seed)) for seed in range(3)]


def test_an_input_of_zeros_gives_what_the_biases_write(make_tiny, family, tokens_of):
    model, tokens = make_tiny(family), tokens_of(40)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "mlp" in name:
                parameter.fill_(0.2)
    sinks = (ss.Sink(9, "", int(tokens[9]), "secondary", (1, 2)),)
    sink_map = dataclasses.replace(ss.detect_sinks(model, tokens), sinks=sinks, phases=((0, 3),))
    result = ss.mlp_response(model, sink_map, writer=1, n_components=3, alphas=[-2.0, 0.0, 3.0])
    assert result.writer_rule == "given"
    assert result.alphas.tolist() == [[-2, 0, 3]] * 3
    torch.testing.assert_close(result.norm[:, 1], torch.full((3,), result.zero_norm))
    assert (result.zero_norm > 0) == (family in BIASED)
    assert math.isnan(result.zero_cosine) == (family not in BIASED)
    again = run_mlp(model, 1, 3 * result.components)["written"]
    torch.testing.assert_close(result.norm[:, 2], again.norm(dim=1), rtol=1e-4, atol=1e-5)
    along = torch.cosine_similarity(again, result.direction[None], dim=1)
    torch.testing.assert_close(result.cosine[:, 2], along, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_component_makes_the_planted_writer_write():
    model, sink_maps = default()
    result = ss.mlp_response(model, sink_maps)
    assert (result.writer, result.writer_rule) == (4, "largest_write")
    assert result.kinds.count("secondary") == sum(len(m.secondary) for m in sink_maps)
    assert result.text.unique().tolist() == [0, 1, 2]
    assert result.agreement > 0.999
    assert result.zero_norm == 0
    frame = result.components_frame()
    best = frame.separation.argmax()
    assert frame.separation[best] == 1
    assert frame.largest_norm.argmax() == best
    assert frame.cosine_at_selected[best] > 0.95
    assert (result.token_norm[result.selected] > 50).all()
    assert (result.token_cosine[result.selected] > 0.95).all()
    assert (result.token_norm[~result.selected] < 2).all()
    torch.testing.assert_close(result.alphas[:, 20], torch.zeros(len(result.alphas)))
    spans = result.projection.abs().amax(dim=0)
    torch.testing.assert_close(result.alphas[:, -1], spans)


def test_without_a_writer_it_is_the_layer_that_wrote_most():
    model, sink_maps = default()
    result = ss.mlp_response(model, sink_maps[:1], n_components=2)
    named = ss.mlp_response(model, sink_maps[0], writer=4, n_components=2)
    assert torch.equal(result.norm, named.norm)


def test_a_token_that_is_not_a_sink_is_not_counted_as_one():
    model, sink_maps = default()
    taken = {sink.position for sink in sink_maps[0].sinks}
    position = next(p for p in range(20, 40) if p not in taken)
    result = ss.mlp_response(model, sink_maps[0], sinks=position)
    assert result.kinds.count("chosen") == int(result.selected.sum()) == 1
    assert result.position[result.selected].tolist() == [position]
    assert (result.token_norm < 2).all()
    assert "1 chosen token and 8 ordinary tokens" in repr(result)
    assert result.plot().axes


def test_texts_without_sinks_are_passed_over():
    model, sink_maps = default()
    bare = dataclasses.replace(sink_maps[1], sinks=())
    result = ss.mlp_response(model, [bare, sink_maps[0]], n_components=2)
    assert result.text.unique().tolist() == [1]
    assert torch.equal(result.norm, ss.mlp_response(model, sink_maps[0], n_components=2).norm)


def test_table_and_file(tmp_path):
    model, sink_maps = default()
    result = ss.mlp_response(model, sink_maps[0], n_components=50)
    n = len(result.components)
    assert n == len(result.kinds) - 1, "there are no more directions than tokens"
    assert len(result.to_frame()) == n * 41
    assert repr(result).startswith("MlpResponse('planted', MLP 4, 2 sinks and ")
    loaded = ss.MlpResponse.load(result.save(tmp_path / "response.safetensors"))
    assert loaded.components_frame().equals(result.components_frame())
    assert torch.equal(loaded.projection, result.projection)
    assert (loaded.kinds, loaded.provenance) == (result.kinds, result.provenance)


def test_bad_input():
    model, sink_maps = default()
    with pytest.raises(ss.InputError, match="n_components is 0"):
        ss.mlp_response(model, sink_maps, n_components=0)
    with pytest.raises(ss.InputError, match="alphas"):
        ss.mlp_response(model, sink_maps, alphas=[float("nan")])
    with pytest.raises(ss.InputError, match="alphas"):
        ss.mlp_response(model, sink_maps, alphas=[])
    with pytest.raises(ss.InputError, match="writer 12 is out of range"):
        ss.mlp_response(model, sink_maps, writer=12)
    with pytest.raises(ss.InputError, match=r"onsets: \[4\]"):
        ss.mlp_response(model, sink_maps, writer=11)
    with pytest.raises(ss.InputError, match="a position is another token in each"):
        ss.mlp_response(model, sink_maps, sinks=[20])
    with pytest.raises(ss.InputError, match="use 'secondary', 'primary'"):
        ss.mlp_response(model, sink_maps, sinks="tertiary")
    bare = [dataclasses.replace(sink_map, sinks=()) for sink_map in sink_maps]
    for several in (bare, bare[0]):
        with pytest.raises(ss.InputError, match="no secondary sinks in this text"):
            ss.mlp_response(model, several)


def test_a_direction_that_sinks_have_is_the_first_component():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    is_sink = torch.arange(40) < 10
    inputs = 0.1 * torch.randn(40, 16, generator=generator)
    inputs[is_sink] -= 3 * direction
    pca = input_components(inputs, is_sink, 4)
    assert pca.components[0] @ direction < -0.99, "sinks lie on the positive side"
    assert pca.separation[0] == 1
    assert (pca.separation[1:] < 0.9).all()
    assert pca.variance_ratio[0] > 0.8
    assert (pca.variance_ratio.diff() <= 0).all()
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(4))
    torch.testing.assert_close(pca.projection, inputs @ pca.components.T)


def test_zeros_have_a_norm_and_no_cosine():
    norm, cosine = norm_and_cosine(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([3.0, 0]))
    assert norm.tolist() == [0, 2]
    assert math.isnan(cosine[0])
    assert cosine[1] == 0


def test_qwen(qwen):
    """The first component alone makes MLP 5 write along the sink direction, in one sense."""
    result = ss.mlp_response(qwen, ss.detect_sinks(qwen, demo_messages(), max_tokens=48))
    assert result.writer == 5
    frame = result.components_frame()
    assert frame.separation[0] == 1
    assert frame.cosine_at_selected[0] > 0.95
    assert frame.norm_at_selected[0] > 20 * frame.norm_at_selected[2:].max()
    assert result.norm[0, -1] > 10 * result.norm[0, 0], "the other sign writes next to nothing"
