"""The evidence criterion on planted truth, and on measurements made by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.observe.attention_collectors import Visible
from secondary_sinks.observe.collectors import Run
from secondary_sinks.observe.residual_geometry import Geometry, ResidualGeometry
from secondary_sinks.planted.planted_model import (
    PlantedPhase,
    PlantedSink,
    planted_model,
    random_planted,
)
from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.criterion import DEFAULTS, runs
from secondary_sinks.sinks.measurements import Measurements
from secondary_sinks.sinks.primary import detect, primary_runs


def uniform_score(n_tokens):
    """Mean attention from later queries under uniform attention; NaN for the last token."""
    weight = 1 / torch.arange(1.0, n_tokens + 1)
    later = weight.flip(0).cumsum(0).flip(0) - weight
    later[-1] = torch.nan
    return later / torch.arange(n_tokens - 1, -1, -1).clamp_min(1)


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
        assert decoys.failed.isin(["attention", "strength"]).all()


def one_sink(**kwargs):
    return planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=400),),
        secondary=(PlantedSink(token=20, writer=5, norm=80, lifetime=4),),
        **kwargs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("late", [2, 4, 9])
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
def test_the_last_token_is_undecided():
    """It has the residual of a sink, and nobody can look at it."""
    model = one_sink()
    tokens = model.tokens(64)
    tokens[tokens == 20] = 21
    tokens[0, -1] = 20
    host = model.load()
    sinks = ss.detect_sinks(host, tokens)
    assert sinks.secondary == []
    assert [(s.position, s.layers, s.kind) for s in sinks.undecided] == [
        (63, (5, 6, 7, 8), "undecided")
    ]
    assert "no secondary sinks, 1 undecided" in repr(sinks)
    longer = torch.cat([tokens, torch.full((1, 2), 21)], dim=1)
    assert found(ss.detect_sinks(host, longer)) == {(63, 5, 4)}


@pytest.mark.slow
def test_twelve_tokens_eight_thousand_and_every_place_at_the_beginning():
    model = one_sink()
    host = model.load()
    tokens = torch.tensor([[0, 5, 20, 6, 7, 8, 9, 20, 10, 11, 20, 13]])
    assert found(ss.detect_sinks(host, tokens)) == {(2, 5, 4), (7, 5, 4), (10, 5, 4)}
    for position in (1, 2, 3):
        tokens = model.tokens(64)
        tokens[tokens == 20] = 21
        tokens[0, position] = 20
        assert found(ss.detect_sinks(host, tokens)) == {(position, 5, 4)}
    tokens = model.tokens(8000)
    assert found(ss.detect_sinks(host, tokens)) == planted(model.truth(tokens)) != set()


@pytest.mark.slow
def test_a_window_shorter_than_the_text():
    """Most queries cannot see the primary, nor an early sink; what can see them decides."""
    model = one_sink(architecture="qwen2")
    config = copy.deepcopy(model.hf.config)
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 24, 0
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    windowed = type(model.hf)(config).eval()
    windowed.load_state_dict(model.hf.state_dict())
    tokens = model.tokens(200)
    tokens[0, [50, 120, 191]] = 20
    host = ss.load_model(windowed, tokenizer=model.tokenizer, progress=False)
    sinks = ss.detect_sinks(host, tokens)
    assert sinks.n_seeing[3, :3].tolist() == [23.0] * 3
    assert found(sinks) == planted(model.truth(tokens))


@pytest.mark.slow
def test_a_document_in_the_middle_has_a_primary_of_its_own():
    """The token with which texts begin, in a packed text: a primary sink wherever it stands."""
    model = one_sink()
    tokens = model.tokens(100)
    expected = planted(model.truth(tokens))
    tokens[0, 60] = 0
    sinks = ss.detect_sinks(model.load(), tokens)
    assert {sink.position for sink in sinks.primary} == {0, 60}
    assert found(sinks) == {sink for sink in expected if sink[0] != 60}


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


def measurements(n_layers, n_tokens, sinks, persistence, *, primary_score=0.4, share=0.3):
    """Made by hand: one head, ordinary tokens that draw `share` of uniform attention.

    Args:
        sinks: for each sink token, its layers, its norm over that of an ordinary token, and the
            attention that it draws in the layers after, over that of uniform attention.
    """
    uniform = uniform_score(n_tokens)
    aligned = torch.zeros(1, n_layers, n_tokens)
    norm = torch.ones(n_layers, n_tokens)
    score = share * uniform.expand(n_layers, 1, n_tokens).clone()
    score[:, :, 0] = primary_score
    for token, (layers, size, drawn) in sinks.items():
        aligned[0, layers, token], norm[layers, token] = 1, size
        if token:
            shown = [layer + 1 for layer in layers if layer + 1 < n_layers]
            score[shown, :, token] = drawn * uniform[token]
    geometry = Geometry(
        candidates=(0,),
        norm=norm,
        centered_norm=norm,
        alignment=aligned,
        centered_alignment=aligned,
        persistence=persistence[None],
        residual=torch.ones(1, n_layers, 2),
        common=torch.zeros(n_layers, 2),
        background_norm=torch.ones(n_layers),
        background_centered_norm=torch.ones(n_layers),
        share_alike=torch.zeros(n_layers),
    )
    n_later = torch.arange(n_tokens - 1.0, -1, -1)
    return Measurements(
        tokens=tuple(range(n_tokens)),
        token_strings=tuple(map(str, range(n_tokens))),
        geometry=geometry,
        score=score,
        visible=Visible(n_later.expand(n_layers, -1), uniform.expand(n_layers, -1)),
        beginnings=frozenset(range(4)),
    )


def persistence_of(n_layers, *turns):
    """1, but for the layers in which the primary turns."""
    cosine = torch.ones(n_layers)
    cosine[list(turns)] = 0
    return cosine


def lives_of(detection, token):
    return [(s.kind, s.l_start, s.lifetime) for s in detection.sinks if s.position == token]


def test_a_sink_that_outlives_a_break_of_the_primary_stays_secondary():
    """Two phases, one life of a token through both."""
    primary = ([1, 2, 3, 4, 7, 8, 9, 10], 50, 0)
    through = ([3, 4, 7, 8, 9], 50, 20)
    measured = measurements(12, 40, {0: primary, 20: through}, persistence_of(12, 1, 5, 7))
    detection = detect(measured, thresholds=DEFAULTS)
    assert detection.phases == ((1, 5), (7, 11))
    assert lives_of(detection, 20) == [("secondary", 3, 2), ("secondary", 7, 3)]
    assert [s.evidence.delay for s in detection.sinks if s.position == 20] == [2, 0]


def test_only_a_token_at_the_beginning_is_primary_with_the_phase():
    """Whether the first token rises early or late, the others keep their label."""
    others = {2: ([2, 3, 4, 5], 50, 20), 20: ([2, 3, 4, 5], 50, 20)}
    for first in (1, 2):
        primary = (list(range(first, 6)), 50, 0)
        measured = measurements(8, 40, {0: primary, **others}, persistence_of(8, first))
        detection = detect(measured, thresholds=DEFAULTS)
        assert lives_of(detection, 20) == [("secondary", 2, 4)]
        expected = "primary" if first == 2 else "secondary"
        assert lives_of(detection, 2) == [(expected, 2, 4)]
        later = next(sink for sink in detection.sinks if sink.position == 20)
        assert later.evidence.delay == 2 - first


def test_more_than_nothing_is_not_yet_attention():
    """Ordinary tokens draw next to nothing; a token that draws 30 times that is no sink."""
    primary, other = ([1, 2, 3, 4], 50, 0), [2, 3, 4]
    for share, expected in ((1e-5, 0), (0.5, 1)):
        sinks = {0: primary, 20: (other, 50, 30 * share)}
        measured = measurements(6, 40, sinks, persistence_of(6, 5), share=share)
        assert len(lives_of(detect(measured, thresholds=DEFAULTS), 20)) == expected


def test_leaning_towards_the_primary_for_one_layer_is_no_life():
    """However many tokens do, and however much they draw in the next."""
    leaning = {token: ([1], 50, 20) for token in range(5, 30)}
    primary = ([1, 2, 3, 4], 50, 0)
    measured = measurements(6, 60, {0: primary, **leaning}, persistence_of(6, 5))
    detection = detect(measured, thresholds=DEFAULTS)
    assert {sink.position for sink in detection.sinks} == {0}
    for_one = detect(measured, thresholds=DEFAULTS | {"min_lifetime": 1})
    assert {sink.position for sink in for_one.sinks} == {0, *range(5, 30)}


def test_weak_residuals_that_draw_a_lot_and_strong_ones_that_draw_nothing():
    primary, life = ([1, 2, 3, 4], 200, 0), [2, 3, 4]
    sinks = {0: primary, 20: (life, 2.3, 75), 30: (life, 200, 0.2)}
    detection = detect(measurements(6, 500, sinks, persistence_of(6, 5)), thresholds=DEFAULTS)
    assert {sink.position for sink in detection.sinks} == {0, 20}


def test_strength_does_not_depend_on_the_length_of_the_text():
    """A sink whose share falls with the root of the length as its multiple of uniform rises."""
    primary, life = ([1, 2, 3, 4], 200, 0), [2, 3, 4]
    for n_tokens in (100, 1600):
        drawn = 8 * (n_tokens / 100) ** 0.5
        sinks = {0: primary, n_tokens // 4: (life, 20, drawn)}
        detection = detect(
            measurements(6, n_tokens, sinks, persistence_of(6, 5)), thresholds=DEFAULTS
        )
        (sink,) = (sink for sink in detection.sinks if sink.position)
        assert sink.strength == pytest.approx(8 * float(uniform_score(100)[25]) ** 0.5, rel=0.15)


def test_lives_are_judged_by_the_next_layer_that_has_attention():
    primary, life = ([1, 2, 3, 4], 200, 0), [1, 2]
    sinks = {0: primary, 20: (life, 20, 30), 30: (life, 20, 0.5)}
    measured = measurements(6, 60, sinks, persistence_of(6, 5))
    measured.score[[1, 2]] = torch.nan
    uniform = measured.visible.uniform.clone()
    uniform[[1, 2]] = torch.nan
    measured = replace(measured, visible=Visible(measured.visible.n_seeing, uniform))
    detection = detect(measured, thresholds=DEFAULTS)
    assert {sink.position for sink in detection.sinks} == {0, 20}
    scores = next(sink for sink in detection.sinks if sink.position == 20).evidence.sink_score
    assert scores == (float(measured.score[3, 0, 20]),) * 2


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


def baseline_of(score, ordinary):
    n = score.shape[2]
    n_later = torch.arange(n - 1.0, -1, -1).expand(len(score), -1)
    visible = Visible(n_later, uniform_score(n).expand(len(score), -1))
    return AttentionBaseline.of(score, 0, examples=ordinary, visible=visible, min_queries=4)


def test_uniform_attention_has_ratio_one():
    n = 40
    score = uniform_score(n).expand(2, 3, n)
    ratio = baseline_of(score, torch.ones(n, dtype=torch.bool)).ratio(score)
    torch.testing.assert_close(ratio[:, :-1], torch.ones(2, n - 1))
    assert torch.isnan(ratio[:, -1]).all()


def test_heads_that_ignore_the_primary_do_not_count():
    n = 40
    score = uniform_score(n).expand(1, 4, n).clone()
    score[0, 0, 0] = 0.5  # head 0 looks at the primary
    score[0, 0, 20] *= 10  # and at token 20;
    score[0, 1:, 30] *= 10  # the others look at token 30
    ordinary = torch.ones(n, dtype=torch.bool)
    ordinary[[0, 20, 30]] = False
    ratio = baseline_of(score, ordinary).ratio(score)
    assert ratio[0, 20].item() == pytest.approx(10, rel=1e-4)
    assert ratio[0, 30].item() == pytest.approx(1, rel=1e-4)


def test_late_tokens_are_compared_with_tokens_that_as_many_queries_see():
    """All attend to the most recent token: late ones draw more, and none stands out."""
    n = 200
    n_later = torch.arange(n - 1.0, -1, -1)
    score = (1 / n_later.clamp_min(1)).expand(1, 1, n)
    ratio = baseline_of(score, torch.ones(n, dtype=torch.bool)).ratio(score)
    assert ratio[0, 4:-8].max() < 2.5


def test_strength_counts_what_many_sinks_leave():
    """Where three quarters of the attention goes to aligned tokens, each draws a fraction."""
    n = 101
    ordinary = torch.arange(n) % 4 == 0
    uniform = uniform_score(n)
    score = torch.where(ordinary, 0.01, 1.3) * uniform
    baseline = baseline_of(score.expand(1, 1, n), ordinary)
    left = 1 - float((score * torch.arange(n - 1, -1, -1))[~ordinary].nansum()) / (n - 1)
    assert float(baseline.left) == pytest.approx(max(left, 0.1), rel=1e-4)
    alone = (1.3 * uniform / uniform.sqrt())[41]
    strength = baseline.strength(score.expand(1, 1, n))
    assert float(strength[0, 41]) == pytest.approx(float(alone / baseline.left), rel=1e-4)


def test_refilter_judges_as_detection_does(tmp_path):
    model = random_planted(3)
    host, tokens = model.load(), model.tokens(96, seed=3)
    sinks = ss.detect_sinks(host, tokens)
    assert sinks.refilter().sinks == sinks.sinks
    thresholds = {"min_lifetime": 5, "min_strength": 0.5, "min_alignment": 0.95}
    again = ss.SinkMap.load(sinks.save(tmp_path / "map.safetensors")).refilter(**thresholds)
    detected = ss.detect_sinks(host, tokens, **thresholds)
    assert again.sinks == detected.sinks
    assert again.thresholds == detected.thresholds
    assert again.refilter(min_lifetime=2, min_strength=0.35, min_alignment=0.9).sinks == sinks.sinks
    shortest = min(sink.lifetime for sink in sinks.secondary)
    longer = [sink for sink in sinks.secondary if sink.lifetime > shortest]
    assert sinks.refilter(min_lifetime=shortest + 1).secondary == longer != []
    with pytest.raises(ss.InputError, match="min_cosine"):
        sinks.refilter(min_cosine=0.9)
    with pytest.raises(ss.InputError, match="evidence"):
        ss.detect_sinks(host, tokens, criterion="published").refilter(min_lifetime=3)


def geometry_of(layers):
    """The geometry of residuals [layer, token, d_model]."""
    collector = ResidualGeometry()
    n_layers, n_tokens, d_model = layers.shape
    collector.start(Run(n_layers, 1, n_tokens, d_model, torch.arange(n_tokens)))
    for layer, residual in enumerate(layers):
        collector.update("resid_post", layer, residual)
    return collector.result()


def test_sinks_that_are_the_majority_are_not_the_background():
    """58 of 60 tokens are as large as the first: the other two are what they are compared with."""
    residual = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    residual[1, :, 0] = 500
    residual[1, [1, 2]] = residual[0, [1, 2]]
    geometry = geometry_of(residual)
    assert geometry.share_alike.tolist() == pytest.approx([0, 58 / 60])
    assert geometry.background_norm[1] < 10
    assert (geometry.centered_norm[1, 3:] > 100 * geometry.background_centered_norm[1]).all()


def test_a_text_all_of_whose_tokens_are_sinks_is_noticed():
    """Nothing is left to compare with, but an ordinary token does not grow 50 times in a block."""
    residual = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    common = residual.clone()
    common[:, :, 0] += 20  # all point one way, in both layers
    assert geometry_of(common).share_alike.tolist() == [0, 0]
    residual[1, :, 0] = 500
    assert geometry_of(residual).share_alike.tolist() == [0, 1]
