"""The probe finds what is there, is at chance where nothing is, and never sees a test text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from secondary_sinks.analyses.separability import SAME_TOKEN, SINK, contrast_of, embed, probe

N_TEXTS, PER_TEXT = 8, 8


def points(seed, d_model=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N_TEXTS * PER_TEXT, d_model))
    groups = np.arange(N_TEXTS).repeat(PER_TEXT)
    label = np.tile(np.arange(PER_TEXT) < 3, N_TEXTS)
    return x, label, groups


def test_at_chance_without_a_difference():
    found = [probe(*points(seed), n_permutations=4, n_splits=4, seed=seed) for seed in range(8)]
    assert np.mean([one["auc"] for one in found]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([one["chance_auc"] for one in found]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([one["balanced_accuracy"] for one in found]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([one["p_value"] for one in found]) > 0.3


def test_a_difference_is_found_and_shuffled_labels_stay_at_chance():
    x, label, groups = points(0)
    x[label, :3] += 8
    found = probe(x, label, groups, n_permutations=19)
    assert found["auc"] > 0.95
    assert found["balanced_accuracy"] > 0.9
    assert found["p_value"] == pytest.approx(1 / 20)
    assert found["chance_auc"] == pytest.approx(0.5, abs=0.1)
    assert found["chance_high"] < found["auc"]


def test_what_only_marks_the_text_is_of_no_use():
    """Each text has its own axis and its own share of sinks: a probe that saw it would know."""
    groups = np.arange(N_TEXTS).repeat(PER_TEXT)
    label = np.arange(PER_TEXT)[None] < (np.arange(N_TEXTS) % 2 * 5 + 1)[:, None]
    x = np.eye(N_TEXTS)[groups]
    assert probe(x, label.ravel(), groups, n_permutations=5)["auc"] == pytest.approx(0.5)


def test_too_few_texts_are_nan():
    x, label, _ = points(0)
    found = probe(x, label, np.zeros(len(x), dtype=int), n_permutations=5)
    assert all(math.isnan(value) for value in found.values())


def test_clusters_and_embedding():
    x, label, groups = points(1)
    x[label, 0] += 40
    vectors = {"resid_pre": torch.from_numpy(np.stack([points(1)[0], x])).float()}
    kind = torch.where(torch.from_numpy(label), SINK, SAME_TOKEN)
    text = torch.from_numpy(groups)
    position = torch.arange(len(kind))
    found = contrast_of(
        vectors, kind, text, position, SAME_TOKEN, n_permutations=0, n_splits=4, seed=0
    )
    assert found.rand[0].tolist() == pytest.approx([0.0, 1.0], abs=0.1)
    assert found.silhouette[0, 1] > 0.6 > 0.2 > found.silhouette[0, 0]
    assert torch.isnan(found.p_value).all(), "without shuffles there is no chance level"
    assert 0.5 <= found.position_auc <= 1
    flat = embed(vectors, "pca", seed=0)
    assert flat.shape == (1, 2, len(kind), 2)
    first = flat[0, 1, :, 0]
    assert (first[kind == SINK].mean() - first[kind == SAME_TOKEN].mean()).abs() > 30
    assert embed({"x": vectors["resid_pre"][:1]}, "tsne", seed=0).shape == (1, 1, len(kind), 2)
