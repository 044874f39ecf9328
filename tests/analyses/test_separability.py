"""The probe is at chance before the feeder's feature is there, and perfect after it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.separability import ORDINARY, SAME_TOKEN, SINK

TOKEN, FEEDER, ONSET = 17, 1, 4


def silence_odd(activation, hook=None):
    """Without the feeder's output no sink: the same token is one at even positions alone."""
    edited = activation.clone()
    edited[:, 1::2] = 0
    return edited


HOOKS = [(f"blocks.{FEEDER}.hook_mlp_out", silence_odd)]


@functools.cache
def default():
    """A planted model, and maps of texts in which token 17 is a sink at even positions."""
    host = ss.planted_model().load()
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(6):
        ids = torch.randint(20, 60, (44,), generator=generator)
        ids[0] = 0
        ids[torch.randperm(30, generator=generator)[:8] + 3] = TOKEN
        texts.append(ids)
    return host, ss.detect_sinks(host, texts, fwd_hooks=HOOKS, progress=False)


@functools.cache
def separated():
    host, maps = default()
    return ss.separability(host, maps, n_permutations=9, n_splits=3, fwd_hooks=HOOKS)


def test_the_planted_tokens_are_the_ones_compared():
    found = separated()
    assert found.onset == ONSET
    assert {found.tokens[i] for i in (found.kind != ORDINARY).nonzero()} == {"t17"}
    assert (found.position[found.kind == SINK] % 2 == 0).all()
    assert (found.position[found.kind == SAME_TOKEN] % 2 == 1).all()
    assert "t17" not in {found.tokens[i] for i in (found.kind == ORDINARY).nonzero()}
    assert found.same_token.n_texts == 6


def test_at_chance_before_the_feeder_and_perfect_after_it():
    found = separated()
    auc = found.same_token.auc
    site = {name: row for row, name in enumerate(found.sites)}
    before = [auc[site[name], layer] for name in ("resid_pre", "attn_out") for layer in (0, 1)]
    before += [auc[site["resid_mid"], 1], auc[site["mlp_out"], 0]]
    assert 0.25 < float(torch.stack(before).mean()) < 0.75
    assert all(value < 0.9 for value in before)
    for layer in range(FEEDER + 1, ONSET + 1):
        assert auc[site["resid_pre"], layer] > 0.99
    assert auc[site["mlp_out"], FEEDER] > 0.99
    assert auc[site["mlp_out"], ONSET] > 0.99
    assert auc[site["resid_pre"], 0] == 0.5, "one embedding for one token"
    assert found.same_token.rand[site["mlp_out"], ONSET] > 0.99


def test_the_first_layer_is_the_one_from_which_on_all_are_told():
    found = separated()
    p_value = torch.tensor([0.5, 0.05, 0.5, 0.05, 0.01]).expand(len(found.sites), -1)
    said = dataclasses.replace(found.same_token, p_value=p_value)
    told = dataclasses.replace(found, same_token=said)
    assert told.first_layer("resid_pre") == 3
    assert told.first_layer("resid_pre", level=0.6) == 0
    assert told.first_layer("resid_pre", level=0.02) == 4
    assert told.first_layer("resid_pre", level=0.001) is None


def test_shuffled_labels_are_at_chance():
    found = separated()
    for contrast in (found.same_token, found.ordinary):
        assert float(contrast.chance_auc.mean()) == pytest.approx(0.5, abs=0.05)
    # Another token id is told from the embedding on.
    assert found.ordinary.auc[0, 0] > 0.99


def test_seed_table_figure_and_file(tmp_path):
    found = separated()
    frame = found.to_frame()
    assert len(frame) == 2 * len(found.sites) * (ONSET + 1)
    assert repr(found).startswith("Separability('planted'")
    figure = found.plot()
    assert [axes.get_label() for axes in figure.axes][:2] == ["resid_pre", "resid_pre 1"]
    points = figure.axes[1].lines[2].get_xdata()
    assert len(points) == int((found.kind == SINK).sum())
    back = ss.Separability.load(found.save(tmp_path / "found.safetensors"))
    assert torch.equal(back.embedding, found.embedding)
    assert back.to_frame().equals(frame)
    host, maps = default()
    few = {"n_permutations": 1, "n_splits": 2, "fwd_hooks": HOOKS, "onset": ONSET}
    once, again = (ss.separability(host, maps[:3], seed=5, **few) for _ in range(2))
    assert once.to_frame().equals(again.to_frame())


def test_texts_that_begin_alike_give_no_second_look():
    """All sinks stand in the part that both texts share: there is no other text to test on."""
    host, maps = default()
    tokens = maps[0].tokens
    other = torch.cat([tokens, torch.tensor([30, 31, 32, 33])])
    same = ss.detect_sinks(host, [tokens, other], fwd_hooks=HOOKS, progress=False)
    found = ss.separability(host, same, n_permutations=1, fwd_hooks=HOOKS)
    assert set(found.text[found.kind == SINK].tolist()) == {0}
    assert torch.isnan(found.same_token.auc).all()
    assert any("no probe" in note for note in found.notes)
    assert any("same sinks" in note for note in found.notes)


def test_a_position_that_tells_is_told():
    """Sinks at the beginning, the same token at the end: that is no feature of a sink."""
    host, maps = default()

    def early(activation, hook=None):
        edited = activation.clone()
        edited[:, 20:] = 0
        return edited

    hooks = [(HOOKS[0][0], early)]
    texts = [one.tokens for one in maps]
    found = ss.separability(
        host,
        ss.detect_sinks(host, texts, fwd_hooks=hooks, progress=False),
        n_permutations=1,
        n_splits=2,
        fwd_hooks=hooks,
    )
    assert found.same_token.position_auc == 1
    assert any("position alone" in note and "the same token" in note for note in found.notes)
    assert not any("position alone" in note for note in separated().notes)


def test_bad_input():
    host, maps = default()
    with pytest.raises(ss.InputError, match="no secondary sinks of onset 3"):
        ss.separability(host, maps, onset=3)
    with pytest.raises(ss.InputError, match="no embedding"):
        ss.separability(host, maps, embedding="umap")
    with pytest.raises(ss.InputError, match="n_splits"):
        ss.separability(host, maps, n_splits=1)
    empty = ss.detect_sinks(host, torch.arange(20, 60), primary=0)
    with pytest.raises(ss.InputError, match="no secondary sinks"):
        ss.separability(host, empty)
