"""Decomposition by head: sums in every family, and the planted erasers without a hint."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.attention_weights import output_weights
from secondary_sinks.observe.residual_geometry import background_tokens
from secondary_sinks.planted.planted_model import (
    PlantedPhase,
    PlantedSink,
    planted_model,
    random_planted,
)

# Sinks that live to the last layer, that end alone, that end with the primary, and two phases.
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 13))]


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    model = planted_model()
    host = model.load()
    return host, ss.detect_sinks(host, model.tokens(64))


@functools.cache
def decomposition_of_default():
    return ss.sink_decomposition(*default(), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_erasers_are_the_planted_ones(seed):
    model = random_planted(seed)
    host, tokens = model.load(), model.tokens(64)
    truth = model.truth(tokens)
    result = ss.sink_decomposition(host, ss.detect_sinks(host, tokens), progress=False)
    by_position = {sink.position: sink for sink in result.sinks}
    depth = model.plan.n_layers
    assert len(result.sinks) == len(truth.sinks)
    for expected in truth.sinks:
        sink = by_position[expected.position]
        end = expected.onset + expected.lifetime
        if end == depth:
            assert (sink.eraser, sink.verdict.candidate) == (None, "")
            assert "lives to the last layer" in sink.verdict.reason
            continue
        assert sink.verdict.reason == ""
        assert sink.eraser == f"mlp {end}"
        assert sink.verdict.share == pytest.approx(1, abs=0.25)
        assert sink.verdict.lifetime == expected.lifetime < sink.verdict.lifetime_without
        assert sink.verdict.left < 0.25 < 0.7 < sink.verdict.left_without
        assert sink.verdict.percentile == 100
        ends_with_the_primary = end in {phase.end for phase in model.plan.phases}
        if not ends_with_the_primary:
            assert abs(sink.verdict.primary_share) < 0.1


@pytest.mark.slow
def test_an_eraser_of_the_primary_too():
    """A sink that ends with its primary phase, erased by the same MLP."""
    model = planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=9, norm=400),),
        secondary=(
            PlantedSink(token=9, writer=4, norm=80, lifetime=5),
            PlantedSink(token=12, writer=4, norm=80, lifetime=3),
        ),
    )
    host, tokens = model.load(), model.tokens(64)
    sinks = ss.detect_sinks(host, tokens)
    result = ss.sink_decomposition(host, sinks, sinks=[*sinks.secondary, *sinks.primary])
    shares = {(s.token, s.eraser): s.verdict.primary_share for s in result.sinks}
    assert shares.pop(("t9", "mlp 9")) == pytest.approx(1, abs=0.05)
    assert shares.pop(("<bos>", "mlp 9")) == pytest.approx(1, abs=0.05)
    assert {eraser for _, eraser in shares} == {"mlp 7"}
    assert max(shares.values()) < 0.05


def check_sums(result, tokens):
    write, heads = result.write, result.head_write
    scale = float(write.projection.abs().max().clamp_min(1))
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5 * scale)
    close(heads.heads.sum(dim=-1) + heads.bias, write.attention)
    parts = write.mlp + heads.heads.sum(dim=-1) + heads.bias
    close(write.embedding[:, None] + parts.cumsum(dim=1), write.projection)
    frame = result.parts_frame()
    for sink, projection in zip(result.sinks, write.projection, strict=True):
        own = frame[frame.position == sink.position]
        assert own.along.sum() == pytest.approx(float(projection[-1]), rel=1e-3, abs=1e-4 * scale)
    # Heads of ordinary tokens: their excess is that of the attention but for its bias.
    close(
        heads.ordinary_heads.sum(dim=-1) + heads.bias,
        write.ordinary_attention,
        atol=scale if heads.bias.abs().max() > 0 else 2e-5 * scale,
    )
    assert max(write.error, heads.error) < 1e-5
    assert len(tokens) == 24


def test_parts_add_up_in_every_family(make_tiny, family, tokens_of):
    """With biases and the weights of norms drawn at random, so that none of them is ignored."""
    model, tokens = make_tiny(family), tokens_of(24)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    sinks = ss.detect_sinks(model, tokens)
    some = [ss.Sink(p, "", int(tokens[p]), "secondary", (layer,)) for p, layer in ((5, 1), (23, 0))]
    sinks = dataclasses.replace(sinks, sinks=tuple(some))
    result = ss.sink_decomposition(model, sinks, verify=False)
    check_sums(result, tokens)
    # One head by hand: the attention's output less what it is with that head's z at zero, where
    # no norm stands behind.
    _, cache = model.run_with_cache(tokens[None])
    residual = cache["resid_post", 1][0]
    common = residual[background_tokens(residual)].mean(dim=0)
    direction = torch.nn.functional.normalize(residual[sinks.primary_position] - common, dim=0)
    weights = output_weights(model, 2)
    if torch.equal(weights.gain, torch.ones_like(weights.gain)):

        def silence(z, hook):
            z = z.clone()
            z[:, :, 3] = 0
            return z

        with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", silence)]):
            _, without = model.run_with_cache(tokens[None])
        change = cache["attn_out", 2][0, 5] - without["attn_out", 2][0, 5]
        assert result.head_write.heads[0, 2, 3].item() == pytest.approx(
            float(change @ direction), rel=1e-3, abs=1e-4
        )


@pytest.mark.slow
def test_directions():
    host, sinks = default()
    ask = functools.partial(ss.sink_decomposition, host, sinks, verify=False)
    onset, last, fifth = ask(), ask(direction="last"), ask(direction=5)
    assert [s.direction_layer for s in onset.sinks] == [s.onset for s in onset.sinks]
    assert [s.direction_layer for s in last.sinks] == [s.last_layer for s in last.sinks]
    assert {s.direction_layer for s in fifth.sinks} == {5}
    for index, sink in enumerate(last.sinks):
        assert last.rotation[index, sink.last_layer] == pytest.approx(1)
        assert onset.rotation[index, sink.onset] == pytest.approx(1)
    for bad in ("first", 99, -1):
        with pytest.raises(ss.InputError, match="direction="):
            ask(direction=bad)


@pytest.mark.slow
def test_a_token_that_is_not_a_sink_has_parts_and_no_verdict(tmp_path):
    host, sinks = default()
    position = next(p for p in range(20, 64) if p not in {sink.position for sink in sinks.sinks})
    result = ss.sink_decomposition(host, sinks, sinks=[*sinks.secondary, position], progress=False)
    alone = decomposition_of_default()
    *others, token = result.sinks
    assert tuple(others) == alone.sinks
    assert (token.position, token.kind, token.eraser) == (position, "chosen", None)
    assert token.verdict.reason == f"the token at position {position} is not a sink"
    assert result.ablations == alone.ablations
    write = result.write
    parts = write.embedding[-1] + (write.mlp[-1] + write.attention[-1]).cumsum(dim=0)
    torch.testing.assert_close(parts, write.projection[-1], rtol=1e-4, atol=1e-2)
    whole = alone.write.excess_projection[0, alone.sinks[0].last_layer]
    assert write.excess_projection[-1, token.last_layer].abs() < 0.1 * whole
    shares = result.shares(write.excess)
    assert shares[-1].isnan().all()
    assert shares[:-1].isfinite().all()
    assert "1 other token" in repr(result)
    assert result.to_frame().reason.tolist() == ["", "", token.verdict.reason]
    only = ss.sink_decomposition(host, sinks, sinks=position)
    assert only.provenance.engine is None
    back = ss.SinkDecomposition.load(only.save(tmp_path / "only.safetensors"))
    assert repr(back) == repr(only) == "SinkDecomposition('planted', 1 other token)"


def test_without_verification_nobody_is_an_eraser():
    host, sinks = default()
    result = ss.sink_decomposition(host, sinks, verify=False)
    assert {sink.eraser for sink in result.sinks} == {None}
    assert all(s.verdict.candidate == f"mlp {s.last_layer + 1}" for s in result.sinks)
    assert all("not tested" in s.verdict.reason for s in result.sinks)
    assert result.ablations == ()
    assert result.provenance.engine is None


def test_heads_that_are_no_sum_are_refused():
    host, sinks = default()
    tokens = sinks.tokens
    double = [("blocks.5.attn.hook_out", lambda value, hook: 2 * value)]
    sinks = ss.detect_sinks(host, tokens, fwd_hooks=double)
    result = ss.sink_decomposition(host, sinks, verify=False, fwd_hooks=double)
    assert result.head_write.error < 1e-5, "a factor of the whole output is a scale, as of a norm"
    shift = [("blocks.5.attn.hook_out", lambda value, hook: value + value.norm())]
    sinks = ss.detect_sinks(host, tokens, fwd_hooks=shift)
    with pytest.raises(ss.ModelError, match="do not add up to the attention's"):
        ss.sink_decomposition(host, sinks, verify=False, fwd_hooks=shift)


@pytest.mark.slow
def test_a_head_that_ends_sinks_is_named():
    """An eraser made of a head: the MLP's erasure is moved into one head's `z` by a hook."""
    model = planted_model(
        n_layers=8,
        phases=(PlantedPhase(start=1, end=8, norm=400),),
        secondary=(PlantedSink(token=9, writer=3, norm=100, lifetime=2),),
    )
    host, tokens = model.load(), model.tokens(48)
    where = [s.position for s in model.truth(tokens).sinks]
    with torch.no_grad():  # dimension 0 of head 1 writes against the sink direction
        width = output_weights(host, 5).weight.shape[1]
        host.blocks[5].attn.o.original_component.weight[:, width] = -model.sink_direction
    pushed = 100 * torch.nn.functional.one_hot(torch.tensor(0), width).float()

    def erase(z, hook):
        # Rows of the intervention engine repeat the sink's token behind the text.
        z = z.clone()
        ids = torch.cat([tokens[0], tokens[0].new_full((z.shape[1] - len(tokens[0]),), 9)])
        z[0, ids == 9, 1] = pushed
        return z

    hooks = [
        ("blocks.5.attn.hook_z", erase),
        ("blocks.5.hook_mlp_out", lambda value, hook: torch.zeros_like(value)),
    ]
    sinks = ss.detect_sinks(host, tokens, fwd_hooks=hooks)
    assert {(s.position, s.level) for s in sinks.secondary} == {(p, (3, 2)) for p in where}
    result = ss.sink_decomposition(host, sinks, fwd_hooks=hooks, progress=False)
    assert {sink.eraser for sink in result.sinks} == {"head 5.1"}
    assert {sink.verdict.percentile for sink in result.sinks} == {100.0}


def test_save_load_tables_and_repr(tmp_path):
    result = decomposition_of_default()
    back = ss.SinkDecomposition.load(result.save(tmp_path / "result.safetensors"))
    assert (back.sinks, back.ablations) == (result.sinks, result.ablations)
    assert back.provenance == result.provenance
    assert torch.equal(back.head_write.heads, result.head_write.heads)
    assert repr(back) == repr(result)
    assert "eraser of 2 sinks: mlp" in repr(result)
    assert list(result.to_frame().eraser) == [s.eraser for s in result.sinks]
    roles = result.ablations_frame().groupby("sink").role.value_counts().unstack()
    assert (roles.candidate == roles.unedited).all()
    assert (roles.candidate == 1).all()
    # Every other MLP and attention block from the onset to the end of the erasure.
    spans = [2 * (s.verdict.candidate_layer - s.onset) - 1 for s in result.sinks]
    assert roles.control.tolist() == spans
    assert "mlp" in result._repr_html_()


@pytest.mark.slow
def test_bad_input():
    host, sinks = default()
    bare = planted_model(secondary=())
    host_of_bare = bare.load()
    with pytest.raises(ss.InputError, match="no secondary sinks"):
        ss.sink_decomposition(host_of_bare, ss.detect_sinks(host_of_bare, bare.tokens(48)))
    elsewhere = dataclasses.replace(sinks.secondary[0], position=50)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.sink_decomposition(host, sinks, sinks=[elsewhere])


def test_smollm_erases_its_phases_one_after_the_other(smollm):
    """MLP 9 ends the first phase of the primary; MLP 10 what is left of the sinks of that phase."""
    text = (
        "In the north of the island there is a village where the road ends. The people of the "
        "village say that the road was never meant to end there; the engineer died, the money was "
        "spent, and the sea took the last bridge in the winter of the great storm."
    )
    sinks = ss.detect_sinks(smollm, text)
    strongest = max(sinks.secondary, key=lambda sink: sink.sink_score)
    which = [sinks.primary[0], strongest]
    result = ss.sink_decomposition(smollm, sinks, sinks=which, progress=False)
    primary, secondary = result.sinks
    assert primary.eraser == "mlp 9"
    assert primary.verdict.share == pytest.approx(1, abs=0.1)
    assert secondary.eraser == "mlp 10"
    assert secondary.verdict.runner_up == "mlp 9"
    assert secondary.verdict.share + secondary.verdict.runner_up_share > 0.9


def test_qwen(qwen):
    """MLP 22 ends every sink, and takes a good part of the primary with it."""
    text = "You are a helpful assistant.\n\n" * 2 + "The sea took the bridge in the storm."
    sinks = ss.detect_sinks(qwen, text, chat=True, max_tokens=64)
    which = [s for s in sinks.secondary if s.layers[-1] == 21][:2]
    assert len(which) == 2
    result = ss.sink_decomposition(qwen, sinks, sinks=which, progress=False)
    assert {sink.eraser for sink in result.sinks} == {"mlp 22"}
    for sink in result.sinks:
        assert sink.verdict.left_without > 0.95
        assert 0.3 < sink.verdict.primary_share < 0.5
