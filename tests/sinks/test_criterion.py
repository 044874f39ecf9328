"""The evidence criterion on planted truth, and on measurements made by hand."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.observe.residual_geometry import Geometry
from secondary_sinks.planted.planted_model import (
    PlantedPhase,
    PlantedSink,
    planted_model,
    random_planted,
)
from secondary_sinks.sinks import attention_baseline as attention
from secondary_sinks.sinks.criterion import DEFAULTS, runs
from secondary_sinks.sinks.primary import detect, primary_runs


def found(sinks):
    return {(sink.position, sink.l_start, sink.lifetime) for sink in sinks.secondary}


def planted(truth):
    return {(sink.position, sink.onset, sink.lifetime) for sink in truth.sinks}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_the_planted_truth_is_recovered_exactly(seed):
    """Depth 8 to 30, one or two phases and primaries, common component, both kinds of decoy."""
    model = random_planted(seed)
    host = model.load()
    for n_tokens in (48, 160):
        tokens = model.tokens(n_tokens, seed=seed)
        truth, sinks = model.truth(tokens), ss.detect_sinks(host, tokens)
        assert sinks.phases == truth.phases
        assert {sink.position for sink in sinks.primary} == set(truth.primary)
        assert found(sinks) == planted(truth)
        for sink in sinks.secondary:
            assert min(sink.evidence.centered_alignment) > 0.95
        nearest = sinks.margins(None)
        assert nearest.closeness.max() < 0.9, "decoys and ordinary tokens are far from passing"
        decoys = nearest[nearest.position.isin(truth.decoys_aligned)]
        assert (decoys.failed == "attention").all()


def one_sink(**kwargs):
    return planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=400),),
        secondary=(PlantedSink(token=20, writer=5, norm=80, lifetime=4),),
        **kwargs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("late", [1, 2, 4, 9])
def test_a_late_sink_that_few_queries_can_see(late):
    model = one_sink()
    tokens = model.tokens(64)
    tokens[tokens == 20] = 21
    tokens[0, -late] = 20
    sinks = ss.detect_sinks(model.load(), tokens)
    assert found(sinks) == {(64 - late, 5, 4)}
    assert sinks.secondary[0].evidence.n_queries == late - 1
    assert torch.isnan(sinks.sink_score[:, :, -8:]).all(), (
        "too few queries for a score to mean much"
    )


@pytest.mark.slow
def test_late_ordinary_tokens_are_no_sinks():
    model = one_sink(aligned_decoys=(30,))
    tokens = model.tokens(64)
    tokens[tokens == 20] = 21
    tokens[tokens == 30] = 31
    tokens[0, -3] = 30  # aligned, seen by two queries, which do not look
    sinks = ss.detect_sinks(model.load(), tokens)
    assert found(sinks) == set()


@pytest.mark.slow
def test_a_secondary_sink_larger_than_the_primary_and_next_to_it():
    model = planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=150),),
        secondary=(PlantedSink(token=20, writer=3, norm=400, lifetime=6),),
    )
    tokens = model.tokens(64)
    tokens[0, 2] = 20
    sinks = ss.detect_sinks(model.load(), tokens)
    assert sinks.primary_position == 0
    assert (2, 3, 6) in found(sinks)


@pytest.mark.slow
def test_a_common_component_that_fools_the_published_rule():
    model = one_sink(common=40.0, common_alignment=0.95)
    tokens = model.tokens(96)
    host = model.load()
    sinks = ss.detect_sinks(host, tokens)
    assert found(sinks) == planted(model.truth(tokens))
    published = ss.detect_sinks(host, tokens, criterion="published")
    assert len(published.sinks) > 48, "nearly every token passes the raw cosine"
    assert (sinks.alignment[6] > 0.9).float().mean() > 0.5
    assert (sinks.centered_alignment[6] > 0.9).sum() == 1 + len(sinks.secondary)


@pytest.mark.slow
def test_no_secondary_sinks_come_with_their_margins():
    model = one_sink()
    tokens = model.tokens(64)
    tokens[tokens == 20] = 21
    sinks = ss.detect_sinks(model.load(), tokens)
    assert sinks.secondary == []
    margins = sinks.margins(5)
    assert len(margins) == 5
    assert margins.closeness.is_monotonic_decreasing
    assert 0 not in set(margins.position), "the primary is no near miss"
    assert (margins[["alignment", "magnitude", "attention"]].min(axis=1)).tolist() == pytest.approx(
        margins.closeness.tolist()
    )


@pytest.mark.slow
def test_thresholds_decide_and_are_recorded():
    model = one_sink()
    tokens, host = model.tokens(64), model.load()
    sinks = ss.detect_sinks(host, tokens)
    assert sinks.thresholds == DEFAULTS
    largest = max(sink.evidence.attention_ratio for sink in sinks.secondary)
    strict = ss.detect_sinks(host, tokens, min_attention_ratio=largest + 1)
    assert strict.thresholds["min_attention_ratio"] == largest + 1
    assert strict.secondary == []
    assert ss.detect_sinks(host, tokens, min_norm_ratio=1e4).sinks == ()
    assert ss.detect_sinks(host, tokens, min_primary_ratio=1e4).phases == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_alignment", 1.2),
        ("min_alignment", 0.0),
        ("min_norm_ratio", -1),
        ("min_primary_ratio", 0.5),
        ("min_queries", 0),
        ("min_attention_ratio", float("nan")),
        ("min_cosine", 0.9),
    ],
)
def test_thresholds_out_of_range_are_refused(tiny, tokens_of, name, value):
    with pytest.raises(ss.InputError, match=name):
        ss.detect_sinks(tiny("llama"), tokens_of(16), **{name: value})


def test_random_models_have_no_sinks(tiny, family, tokens_of):
    sinks = ss.detect_sinks(tiny(family), tokens_of(48))
    assert sinks.sinks == ()
    assert any("no primary sink" in note for note in sinks.notes)
    assert len(sinks.margins()) == 10


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_most_tokens_may_be_sinks(share):
    """What is ordinary is not what most tokens are."""
    model = one_sink()
    tokens = model.tokens(96)
    every = torch.arange(4, 90)
    chosen = every[torch.rand(len(every), generator=torch.Generator().manual_seed(0)) < share]
    tokens[0, chosen] = 20
    sinks = ss.detect_sinks(model.load(), tokens)
    assert found(sinks) == planted(model.truth(tokens))
    assert len(sinks.secondary) > share * 60


def test_a_sink_that_outlives_a_break_of_the_primary_stays_secondary():
    """Two phases, one life of a token through both, by hand."""
    n_layers, n_tokens = 12, 40
    centered = torch.zeros(1, n_layers, n_tokens)
    norm = torch.ones(n_layers, n_tokens)
    score = attention.uniform_score(n_tokens).expand(n_layers, 2, n_tokens).clone()
    for token, layers in ((0, [1, 2, 3, 4, 7, 8, 9, 10]), (20, [3, 4, 7, 8, 9])):
        centered[0, layers, token] = 1
        norm[layers, token] = 50
        score[1:, :, token] *= 20
    persistence = torch.ones(1, n_layers)
    persistence[0, [1, 5, 7]] = 0
    geometry = Geometry(
        candidates=(0,),
        norm=norm,
        centered_norm=norm,
        alignment=centered,
        centered_alignment=centered,
        persistence=persistence,
        residual=torch.ones(1, n_layers, 2),
        common=torch.zeros(n_layers, 2),
        background_norm=torch.ones(n_layers),
        background_centered_norm=torch.ones(n_layers),
    )
    detection = detect(
        geometry,
        score,
        list(range(n_tokens)),
        tuple(map(str, range(n_tokens))),
        thresholds=DEFAULTS,
    )
    assert detection.phases == ((1, 5), (7, 11))
    of_token = [(s.kind, s.l_start, s.lifetime) for s in detection.sinks if s.position == 20]
    assert of_token == [("secondary", 3, 2), ("secondary", 7, 3)]


def test_more_than_nothing_is_not_yet_attention():
    """Ordinary tokens draw nothing; a token that draws ten times that is no sink."""
    n_tokens = 40
    centered = torch.zeros(1, 6, n_tokens)
    norm = torch.ones(6, n_tokens)
    for token in (0, 20):
        centered[0, 1:5, token], norm[1:5, token] = 1, 50
    centered[0, 1, 20] = 0
    geometry = Geometry(
        candidates=(0,),
        norm=norm,
        centered_norm=norm,
        alignment=centered,
        centered_alignment=centered,
        persistence=torch.tensor([[torch.nan, 0, 1, 1, 1, 0]]),
        residual=torch.ones(1, 6, 2),
        common=torch.zeros(6, 2),
        background_norm=torch.ones(6),
        background_centered_norm=torch.ones(6),
    )
    for factor, expected in ((1e-5, 0), (1.0, 1)):
        score = (attention.uniform_score(n_tokens) * 0.1 * factor).expand(6, 2, n_tokens).clone()
        score[:, :, 0] = 0.9
        score[:, :, 20] *= 30
        strings = tuple(map(str, range(n_tokens)))
        detection = detect(geometry, score, list(range(n_tokens)), strings, thresholds=DEFAULTS)
        assert sum(s.position == 20 for s in detection.sinks) == expected


def test_a_primary_of_ones_own_choice(tiny, tokens_of):
    sinks = ss.detect_sinks(tiny("llama"), tokens_of(16), primary=9)
    assert sinks.primary_position == 9
    torch.testing.assert_close(sinks.alignment[:, 9], torch.ones(3))
    with pytest.raises(ss.InputError, match="beyond"):
        ss.detect_sinks(tiny("llama"), tokens_of(16), primary=16)


def test_primary_runs_want_size_persistence_and_more_than_a_layer():
    ratio = torch.tensor([5.0, 5, 5, 1, 5, 1, 5, 5, 5, 5])
    cosine = torch.tensor([torch.nan, 0.1, 0.95, 0.95, 0.95, 0.95, 0.1, 0.95, 0.1, 0.95])
    assert primary_runs(ratio, cosine, DEFAULTS) == [(1, 3), (6, 8), (8, 10)]


def test_a_phase_begins_where_its_vector_begins():
    """Written over several layers, whatever the share of the first."""
    cosine = torch.tensor([torch.nan, 0.3, 0.8, 0.99, 0.99, 0.2])
    for first in (1.6, 2.9, 3.1, 8.0):
        ratio = torch.tensor([1.2, first, 10, 9, 8, 1])
        assert primary_runs(ratio, cosine, DEFAULTS) == [(1, 5)]
    cosine[2] = 0.6  # most of it points elsewhere
    assert primary_runs(ratio, cosine, DEFAULTS) == [(2, 5)]


def test_lives_bridge_one_missing_layer_only():
    alive = torch.tensor([1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    assert runs(alive, offset=4) == [(4, 5, 6, 7), (10,)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 4, 8])
def test_the_criterion_of_a_map_judges_its_tokens_as_detection_did(seed, tmp_path):
    """One object for texts and rows; it comes back from disk with the map."""
    model = random_planted(seed)
    sinks = ss.detect_sinks(model.load(), model.tokens(80, seed=seed))
    sinks = ss.SinkMap.load(sinks.save(tmp_path / "map.safetensors"))
    lives = sinks.judge.lives(sinks.centered_alignment, sinks.centered_norm, sinks.mean_attention)
    expected = {token: [] for token in range(80)}
    for sink in sorted(sinks.sinks, key=lambda sink: sink.l_start):
        expected[sink.position].append(sink.layers)
    assert dict(enumerate(lives)) == expected
    # Some tokens by themselves, in another order.
    order = torch.tensor([s.position for s in sinks.sinks][::-1])
    some = sinks.judge.is_sink(
        sinks.centered_alignment[:, order],
        sinks.centered_norm[:, order],
        sinks.mean_attention[:, :, order],
        order,
    )
    for item, position in enumerate(order.tolist()):
        layers = [layer for life in expected[position] for layer in life]
        assert some[item].nonzero().flatten().tolist() == layers


def test_uniform_attention_has_ratio_one():
    n = 40
    pattern = torch.tril(torch.ones(n, n))
    pattern = pattern / pattern.sum(dim=1, keepdim=True)
    score = torch.tril(pattern, -1).sum(dim=0) / torch.arange(n - 1, -1, -1)
    torch.testing.assert_close(attention.uniform_score(n)[:-1], score[:-1])
    ratio = attention.AttentionBaseline.of(
        score.expand(2, 3, n), 0, examples=torch.ones(n, dtype=torch.bool), min_queries=4
    ).ratio(score.expand(2, 3, n))
    torch.testing.assert_close(ratio[:, :-1], torch.ones(2, n - 1))
    assert torch.isnan(ratio[:, -1]).all()


def test_heads_that_ignore_the_primary_do_not_count():
    n = 40
    score = attention.uniform_score(n).expand(1, 4, n).clone()
    score[0, 0, 0] = 0.5  # head 0 looks at the primary
    score[0, 0, 20] *= 10  # and at token 20;
    score[0, 1:, 30] *= 10  # the others look at token 30
    ordinary = torch.ones(n, dtype=torch.bool)
    ordinary[[0, 20, 30]] = False
    ratio = attention.AttentionBaseline.of(score, 0, examples=ordinary, min_queries=4).ratio(score)
    assert ratio[0, 20].item() == pytest.approx(10, rel=1e-4)
    assert ratio[0, 30].item() == pytest.approx(1, rel=1e-4)
