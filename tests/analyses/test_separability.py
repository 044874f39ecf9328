"""The probe is at chance before the feeder writes its feature, and perfect after it; it never sees
a test text."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.separability import (
    ORDINARY,
    SAME_TOKEN,
    SINK,
    contrast_of,
    embed,
    probe,
)

pytestmark = pytest.mark.slow

TOKEN, FEEDER, ONSET = 17, 1, 4


def silence_odd(activation, hook=None):
    """Without the feeder's output there is no sink: the token is one at even positions only."""
    edited = activation.clone()
    edited[:, 1::2] = 0
    return edited


HOOKS = [(f"blocks.{FEEDER}.hook_mlp_out", silence_odd)]


@functools.cache
def default():
    """A planted model, and sink_maps of texts in which token 17 is a sink at even positions."""
    model = ss.planted_model().load()
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(6):
        ids = torch.randint(20, 60, (44,), generator=generator)
        ids[0] = 0
        ids[torch.randperm(30, generator=generator)[:8] + 3] = TOKEN
        texts.append(ids)
    return model, ss.detect_sinks(model, texts, fwd_hooks=HOOKS, progress=False)


@functools.cache
def separated():
    model, sink_maps = default()
    return ss.separability(model, sink_maps, n_permutations=9, n_splits=3, fwd_hooks=HOOKS)


def test_the_planted_tokens_are_the_ones_compared():
    result = separated()
    assert result.onset == ONSET
    assert {result.tokens[i] for i in (result.kind != ORDINARY).nonzero()} == {"t17"}
    assert (result.position[result.kind == SINK] % 2 == 0).all()
    assert (result.position[result.kind == SAME_TOKEN] % 2 == 1).all()
    assert "t17" not in {result.tokens[i] for i in (result.kind == ORDINARY).nonzero()}
    assert result.same_token.n_texts == 6


def test_at_chance_before_the_feeder_and_perfect_after_it():
    result = separated()
    auc = result.same_token.auc
    site = {name: row for row, name in enumerate(result.sites)}
    before = [auc[site[name], layer] for name in ("resid_pre", "attn_out") for layer in (0, 1)]
    before += [auc[site["resid_mid"], 1], auc[site["mlp_out"], 0]]
    assert 0.25 < float(torch.stack(before).mean()) < 0.75
    assert all(value < 0.9 for value in before)
    for layer in range(FEEDER + 1, ONSET + 1):
        assert auc[site["resid_pre"], layer] > 0.99
    assert auc[site["mlp_out"], FEEDER] > 0.99
    assert auc[site["mlp_out"], ONSET] > 0.99
    assert auc[site["resid_pre"], 0] == 0.5, "one embedding for one token"
    assert result.same_token.rand[site["mlp_out"], ONSET] > 0.99


def test_the_first_layer_is_the_one_from_which_on_all_are_told():
    result = separated()
    p_value = torch.tensor([0.5, 0.05, 0.5, 0.05, 0.01]).expand(len(result.sites), -1)
    said = dataclasses.replace(result.same_token, p_value=p_value)
    told = dataclasses.replace(result, same_token=said)
    assert told.first_layer("resid_pre") == 3
    assert told.first_layer("resid_pre", level=0.6) == 0
    assert told.first_layer("resid_pre", level=0.02) == 4
    assert told.first_layer("resid_pre", level=0.001) is None


def test_shuffled_labels_are_at_chance():
    result = separated()
    for contrast in (result.same_token, result.ordinary):
        assert float(contrast.chance_auc.mean()) == pytest.approx(0.5, abs=0.05)
    # Another token id is told from the embedding on.
    assert result.ordinary.auc[0, 0] > 0.99


def test_seed_table_figure_and_file(tmp_path):
    result = separated()
    frame = result.to_frame()
    assert len(frame) == 2 * len(result.sites) * (ONSET + 1)
    assert repr(result).startswith("Separability('planted'")
    figure = result.plot()
    assert [axes.get_label() for axes in figure.axes][:2] == ["resid_pre", "resid_pre 1"]
    points = figure.axes[1].lines[2].get_xdata()
    assert len(points) == int((result.kind == SINK).sum())
    back = ss.Separability.load(result.save(tmp_path / "result.safetensors"))
    assert torch.equal(back.embedding, result.embedding)
    assert back.to_frame().equals(frame)
    model, sink_maps = default()
    few = {"n_permutations": 1, "n_splits": 2, "fwd_hooks": HOOKS, "onset": ONSET}
    once, again = (ss.separability(model, sink_maps[:3], seed=5, **few) for _ in range(2))
    assert once.to_frame().equals(again.to_frame())


def test_texts_that_begin_alike_give_no_second_look():
    """All sinks stand in the part that both texts share: there is no other text to test on."""
    model, sink_maps = default()
    tokens = sink_maps[0].tokens
    other = torch.cat([tokens, torch.tensor([30, 31, 32, 33])])
    same = ss.detect_sinks(model, [tokens, other], fwd_hooks=HOOKS, progress=False)
    result = ss.separability(model, same, n_permutations=1, fwd_hooks=HOOKS)
    assert set(result.text[result.kind == SINK].tolist()) == {0}
    assert torch.isnan(result.same_token.auc).all()
    assert any("no probe" in note for note in result.notes)
    assert any("same sinks" in note for note in result.notes)


def test_a_position_that_tells_is_told():
    """Sinks at the beginning, the same token at the end: that is no feature of a sink."""
    model, sink_maps = default()

    def early(activation, hook=None):
        edited = activation.clone()
        edited[:, 20:] = 0
        return edited

    hooks = [(HOOKS[0][0], early)]
    texts = [sink_map.tokens for sink_map in sink_maps]
    result = ss.separability(
        model,
        ss.detect_sinks(model, texts, fwd_hooks=hooks, progress=False),
        n_permutations=1,
        n_splits=2,
        fwd_hooks=hooks,
    )
    assert result.same_token.position_auc == 1
    assert any("position alone" in note and "the same token" in note for note in result.notes)
    assert not any("position alone" in note for note in separated().notes)


def test_bad_input():
    model, sink_maps = default()
    with pytest.raises(ss.InputError, match="no secondary sinks of onset 3"):
        ss.separability(model, sink_maps, onset=3, fwd_hooks=HOOKS)
    with pytest.raises(ss.InputError, match="no embedding"):
        ss.separability(model, sink_maps, embedding="umap", fwd_hooks=HOOKS)
    with pytest.raises(ss.InputError, match="n_splits"):
        ss.separability(model, sink_maps, n_splits=1, fwd_hooks=HOOKS)
    empty = ss.detect_sinks(model, torch.arange(20, 60), primary=0)
    with pytest.raises(ss.InputError, match="no secondary sinks"):
        ss.separability(model, empty)


N_TEXTS, PER_TEXT = 8, 8


def points(seed, d_model=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N_TEXTS * PER_TEXT, d_model))
    groups = np.arange(N_TEXTS).repeat(PER_TEXT)
    label = np.tile(np.arange(PER_TEXT) < 3, N_TEXTS)
    return x, label, groups


def test_at_chance_without_a_difference():
    results = [probe(*points(seed), n_permutations=4, n_splits=4, seed=seed) for seed in range(8)]
    assert np.mean([one["auc"] for one in results]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([one["chance_auc"] for one in results]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([one["balanced_accuracy"] for one in results]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([one["p_value"] for one in results]) > 0.3


def test_a_difference_is_found_and_shuffled_labels_stay_at_chance():
    x, label, groups = points(0)
    x[label, :3] += 8
    result = probe(x, label, groups, n_permutations=19)
    assert result["auc"] > 0.95
    assert result["balanced_accuracy"] > 0.9
    assert result["p_value"] == pytest.approx(1 / 20)
    assert result["chance_auc"] == pytest.approx(0.5, abs=0.1)
    assert result["chance_high"] < result["auc"]


def test_what_only_marks_the_text_is_of_no_use():
    """Each text has its own axis and its own share of sinks: a probe that saw it would know."""
    groups = np.arange(N_TEXTS).repeat(PER_TEXT)
    label = np.arange(PER_TEXT)[None] < (np.arange(N_TEXTS) % 2 * 5 + 1)[:, None]
    x = np.eye(N_TEXTS)[groups]
    assert probe(x, label.ravel(), groups, n_permutations=5)["auc"] == pytest.approx(0.5)


def test_too_few_texts_are_nan():
    x, label, _ = points(0)
    result = probe(x, label, np.zeros(len(x), dtype=int), n_permutations=5)
    assert all(math.isnan(value) for value in result.values())


def test_clusters_and_embedding():
    x, label, groups = points(1)
    x[label, 0] += 40
    vectors = {"resid_pre": torch.from_numpy(np.stack([points(1)[0], x])).float()}
    kind = torch.where(torch.from_numpy(label), SINK, SAME_TOKEN)
    text = torch.from_numpy(groups)
    position = torch.arange(len(kind))
    result = contrast_of(
        vectors, kind, text, position, SAME_TOKEN, n_permutations=0, n_splits=4, seed=0
    )
    assert result.rand[0].tolist() == pytest.approx([0.0, 1.0], abs=0.1)
    assert result.silhouette[0, 1] > 0.6 > 0.2 > result.silhouette[0, 0]
    assert torch.isnan(result.p_value).all(), "without shuffles there is no chance level"
    assert 0.5 <= result.position_auc <= 1
    flat = embed(vectors, "pca", seed=0)
    assert flat.shape == (1, 2, len(kind), 2)
    first = flat[0, 1, :, 0]
    assert (first[kind == SINK].mean() - first[kind == SAME_TOKEN].mean()).abs() > 30
    assert embed({"x": vectors["resid_pre"][:1]}, "tsne", seed=0).shape == (1, 1, len(kind), 2)
