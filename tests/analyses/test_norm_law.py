"""The law of planted sinks: their writers, their norms, and more norm, more attention."""

from __future__ import annotations

import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import PlantedSink, random_planted

NORMS = {9: 40.0, 12: 60.0, 17: 100.0, 21: 200.0}


@functools.cache
def law(common=30.0):
    """Sinks of four norms; keys are read after a norm, in which a common component competes with
    what was written. Without one, every sink's key is the same, and norms decide nothing."""
    sinks = tuple(PlantedSink(token=t, writer=4, norm=n, lifetime=4) for t, n in NORMS.items())
    planted = ss.planted_model(secondary=sinks, common=common)
    host = planted.load()
    maps = ss.detect_sinks(host, [planted.tokens(60, seed=s)[0] for s in range(5)], progress=False)
    return host, maps, ss.norm_law(host, maps)


def test_planted_writers_and_norms():
    _, _, found = law()
    assert set(found.writer.tolist()) == {4}
    planted = torch.tensor([NORMS[int(token[1:])] for token in found.tokens])
    torch.testing.assert_close(found.written_norm, planted, rtol=0.1, atol=1.0)
    # What is written lies along the sink direction.
    torch.testing.assert_close(found.written_length, found.written_norm, rtol=0.1, atol=1.0)


@pytest.mark.parametrize("seed", [0, 4, 6])
def test_random_planted_writers_are_named(seed):
    model = random_planted(seed)
    tokens = model.tokens(64)
    found = ss.norm_law(model.load(), tokens)
    expected = {s.position: (s.writer, s.lifetime) for s in model.truth(tokens).sinks}
    pairs = zip(found.writer.tolist(), found.lifetime.tolist(), strict=True)
    assert dict(zip(found.position.tolist(), pairs, strict=True)) == expected


def test_more_norm_more_attention():
    _, _, found = law()
    relation = found.relation("score")
    assert relation.given_position.low > 0.5
    assert relation.law.exponent > 0
    assert relation.law.low > 0


def test_no_law_where_norms_decide_nothing():
    """Without a common component the position alone decides what a planted sink draws."""
    _, _, found = law(0.0)
    relation = found.relation("score")
    assert relation.within_texts.low < 0 < relation.within_texts.high
    assert relation.law.low < 0 < relation.law.high
    assert relation.law.explained < 0.1
    # Nothing of the score is left to relate once position is taken off.
    assert torch.isnan(torch.tensor(relation.given_position.rho))


def test_lifetimes_that_do_not_vary_are_nan_with_a_note():
    _, _, found = law()
    assert torch.isnan(torch.tensor(found.relation("lifetime").within_texts.rho))
    assert torch.isnan(torch.tensor(found.relation("lifetime").law.exponent))
    assert any("lifetime" in note for note in found.notes)
    found.plot()


def test_repeated_texts_add_nothing():
    host, maps, found = law()
    twice = ss.norm_law(host, [*maps, *maps])
    assert torch.equal(twice.score, found.score)
    assert twice.relations[0].pooled == found.relations[0].pooled
    assert any("same sinks" in note for note in twice.notes)


def test_given_writers():
    host, maps, found = law()
    named = ss.norm_law(host, maps[:1], writers=4)
    assert torch.equal(named.written_norm, found.written_norm[found.text == 0])
    by_onset = ss.norm_law(host, maps[:1], writers={4: 3})
    assert (by_onset.written_norm < 5).all(), "MLP 3 writes no sink"
    for writers, message in ((5, "writer 5"), (-1, "writer -1"), ({3: 3}, "no layer for onset 4")):
        with pytest.raises(ss.InputError, match=message):
            ss.norm_law(host, maps[0], writers=writers)
    with pytest.raises(ss.InputError, match="no secondary sinks"):
        ss.norm_law(host, torch.arange(22, 60))


def test_table_figure_and_file(tmp_path):
    _, _, found = law()
    frame = found.to_frame()
    assert len(frame) == len(found.tokens)
    assert len(found.summary()) == 4
    assert repr(found).startswith("NormLaw('planted'")
    figure = found.plot()
    assert [axes.get_label() for axes in figure.axes] == ["score", "within", "lifetime"]
    back = ss.NormLaw.load(found.save(tmp_path / "law.safetensors"))
    assert back.to_frame().equals(frame)
    assert back.relations[0].law.exponent == found.relations[0].law.exponent
    with pytest.raises(ss.InputError, match="no measure"):
        found.plot(written="size")


def test_qwen_the_score_follows_the_norm_within_a_text(qwen):
    """What is written explains the order of a text's own sinks: the system prompt's seven."""
    from secondary_sinks.cli.app import demo_messages

    found = ss.norm_law(qwen, demo_messages())
    assert set(found.writer.tolist()) == {5}
    assert found.relation("score").within_texts.rho > 0.75
    assert found.relation("score").law.exponent == pytest.approx(0.58, abs=0.1)
    assert any("one text" in note for note in found.notes)
