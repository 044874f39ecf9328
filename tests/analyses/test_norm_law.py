"""The law of planted sinks: writers, norms, more norm, more attention; and the fit on its own."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.norm_law import power_law
from secondary_sinks.planted.planted_model import PlantedSink, random_planted

pytestmark = pytest.mark.slow

NORMS = {9: 40.0, 12: 60.0, 17: 100.0, 21: 200.0}


@functools.cache
def law(common=30.0):
    """Sinks of four norms; keys are read after a norm, in which a common component competes with
    what was written. Without one, every sink's key is the same, and norms decide nothing."""
    sinks = tuple(PlantedSink(token=t, writer=4, norm=n, lifetime=4) for t, n in NORMS.items())
    planted = ss.planted_model(secondary=sinks, common=common)
    model = planted.load()
    tokens = [planted.tokens(60, seed=seed)[0] for seed in range(5)]
    sink_maps = ss.detect_sinks(model, tokens, progress=False)
    return model, sink_maps, ss.norm_law(model, sink_maps)


def test_planted_writers_and_norms():
    _, _, result = law()
    assert set(result.writer.tolist()) == {4}
    planted = torch.tensor([NORMS[int(token[1:])] for token in result.tokens])
    torch.testing.assert_close(result.written_norm, planted, rtol=0.1, atol=1.0)
    # What is written lies along the sink direction.
    torch.testing.assert_close(result.written_length, result.written_norm, rtol=0.1, atol=1.0)


@pytest.mark.parametrize("seed", [0, 4, 6])
def test_random_planted_writers_are_named(seed):
    planted = random_planted(seed)
    model, tokens = planted.load(), planted.tokens(64)
    result = ss.norm_law(model, ss.detect_sinks(model, tokens))
    assert result.writer_rule == "largest_write"
    expected = {s.position: (s.writer, s.lifetime) for s in planted.truth(tokens).sinks}
    pairs = zip(result.writer.tolist(), result.lifetime.tolist(), strict=True)
    assert dict(zip(result.position.tolist(), pairs, strict=True)) == expected


def test_more_norm_more_attention():
    _, _, result = law()
    relation = result.relation("score")
    assert relation.given_position.low > 0.5
    assert relation.law.exponent > 0
    assert relation.law.low > 0


def test_no_law_where_norms_decide_nothing():
    """Without a common component the position alone decides what a planted sink draws."""
    _, _, result = law(0.0)
    relation = result.relation("score")
    assert relation.within_texts.low < 0 < relation.within_texts.high
    assert relation.law.low < 0 < relation.law.high
    assert relation.law.explained < 0.1
    # Nothing of the score is left to relate once position is taken off.
    assert torch.isnan(torch.tensor(relation.given_position.rho))


def test_lifetimes_that_do_not_vary_are_nan_with_a_note():
    _, _, result = law()
    assert torch.isnan(torch.tensor(result.relation("lifetime").within_texts.rho))
    assert torch.isnan(torch.tensor(result.relation("lifetime").law.exponent))
    assert any("lifetime" in note for note in result.notes)
    result.plot()


def test_repeated_texts_add_nothing():
    model, sink_maps, result = law()
    twice = ss.norm_law(model, [*sink_maps, *sink_maps])
    assert torch.equal(twice.score, result.score)
    assert twice.relations[0].pooled == result.relations[0].pooled
    assert any("same sinks" in note for note in twice.notes)


def test_given_writers():
    model, sink_maps, result = law()
    named = ss.norm_law(model, sink_maps[:1], writers=4)
    assert torch.equal(named.written_norm, result.written_norm[result.text == 0])
    by_onset = ss.norm_law(model, sink_maps[:1], writers={4: 3})
    assert (by_onset.written_norm < 5).all(), "MLP 3 writes no sink"
    assert named.writer_rule == by_onset.writer_rule == "given"
    for writers, message in ((5, "writer 5"), (-1, "writer -1"), ({3: 3}, "for onsets")):
        with pytest.raises(ss.InputError, match=message):
            ss.norm_law(model, sink_maps[0], writers=writers)
    with pytest.raises(ss.InputError, match="no secondary sinks"):
        ss.norm_law(model, ss.detect_sinks(model, torch.arange(22, 60), primary=0))


def test_primary_sinks_and_all_sinks():
    """All texts begin with one token, so their primary sink is one and the same."""
    model, sink_maps, result = law()
    primary = ss.norm_law(model, sink_maps, sinks="primary")
    assert primary.kinds == ("primary",)
    assert primary.position.tolist() == [sink_maps[0].primary_position]
    everything = ss.norm_law(model, sink_maps, sinks="all")
    assert len(everything.tokens) == len(result.tokens) + 1
    assert set(everything.to_frame().kind) == {"primary", "secondary"}
    with pytest.raises(ss.InputError, match="sinks=3; over texts use"):
        ss.norm_law(model, sink_maps, sinks=3)


def test_table_figure_and_file(tmp_path):
    _, _, result = law()
    frame = result.to_frame()
    assert len(frame) == len(result.tokens)
    assert len(result.summary()) == 4
    assert repr(result).startswith("NormLaw('planted'")
    figure = result.plot()
    assert [axes.get_label() for axes in figure.axes] == ["score", "within", "lifetime"]
    back = ss.NormLaw.load(result.save(tmp_path / "law.safetensors"))
    assert back.to_frame().equals(frame)
    assert back.relations[0].law.exponent == result.relations[0].law.exponent
    with pytest.raises(ss.InputError, match="no measure"):
        result.plot(written="size")


def test_the_exponent_that_was_put_in_comes_out_whatever_the_texts_factors():
    generator = torch.Generator().manual_seed(0)
    text = torch.arange(40) // 5
    x = torch.rand(40, generator=generator) * 300 + 20
    factor = torch.rand(8, generator=generator) + 0.1
    law = power_law(x, factor[text] * x**0.6, text.tolist())
    assert law.exponent == pytest.approx(0.6, abs=1e-4)
    assert (law.low, law.high) == pytest.approx((0.6, 0.6), abs=1e-4)
    assert law.factor == pytest.approx(float(factor.log().mean().exp()), rel=1e-3)
    assert law.explained == pytest.approx(1)
    assert law.residual.abs().max() < 1e-4


def test_noise_is_left_over():
    generator = torch.Generator().manual_seed(1)
    text = torch.arange(200) // 10
    x = torch.rand(200, generator=generator) * 300 + 20
    noise = 0.3 * torch.randn(200, generator=generator)
    law = power_law(x, x**0.6 * noise.exp(), text.tolist())
    assert law.low < 0.6 < law.high
    assert 0.3 < law.explained < 0.9
    assert law.residual.std() == pytest.approx(0.3, abs=0.05)


def test_degenerate_outcomes_are_nan():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for y, text in (
        (torch.full((4,), 7.0), [0, 0, 1, 1]),  # nothing varies
        (x, [0, 1, 2, 3]),  # every sink alone in its text
        (torch.zeros(4), [0, 0, 1, 1]),  # no logarithms
    ):
        law = power_law(x, y, text)
        assert math.isnan(law.exponent)
        assert math.isnan(law.explained)
        assert torch.isnan(law.residual).all()
    one = power_law(x, x**2, [0, 0, 0, 0])
    assert one.exponent == pytest.approx(2)
    assert math.isnan(one.low), "one text has no interval"


def test_qwen_the_score_follows_the_norm_within_a_text(qwen):
    """What is written explains the order of a text's own sinks: the system prompt's seven."""
    from secondary_sinks.cli.detect import demo_messages

    result = ss.norm_law(qwen, ss.detect_sinks(qwen, demo_messages()))
    assert set(result.writer.tolist()) == {5}
    assert result.relation("score").within_texts.rho > 0.75
    assert result.relation("score").law.exponent == pytest.approx(0.58, abs=0.1)
    assert any("one text" in note for note in result.notes)
