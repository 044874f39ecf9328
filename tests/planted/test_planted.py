"""Planted models: does a forward pass show exactly the sinks that `truth` names?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.planted.planted_model import (
    PlantedModel,
    PlantedOccurrence,
    PlantedPhase,
    PlantedSink,
    planted_model,
    random_planted,
)

SEEDS = range(16)
SEEDS_WITH_SINKS = range(20)
"""Seeds of models with at least one secondary sink."""
Edit = Callable[[Tensor], Tensor]


@cache
def drawn(seed: int) -> PlantedModel:
    return random_planted(seed)


@torch.no_grad()
def run(
    model: PlantedModel, tokens: Tensor, edits: dict[tuple[int, int, int], Edit] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals without the common part and MLP outputs, each [layer, row, token, d_model].

    The patterns between them are [layer, row, head, query, key]. `edits` maps (row, layer,
    position) to a function of the MLP's output there.
    """
    resid, mlps, handles = [], [], []

    def edit_mlp(layer: int):
        def hook(_module, _inputs, output):
            output = output.clone()
            for (row, edited_layer, position), edit in (edits or {}).items():
                if edited_layer == layer:
                    output[row, position] = edit(output[row, position])
            mlps.append(output)
            return output

        return hook

    def record(_module, _inputs, output):
        resid.append(output[0] if isinstance(output, tuple) else output)

    for layer, block in enumerate(model.hf.model.layers):
        handles += [
            block.mlp.register_forward_hook(edit_mlp(layer)),
            block.register_forward_hook(record),
        ]
    try:
        out = model.hf(tokens, output_attentions=True, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(resid) - model.common, torch.stack(out.attentions), torch.stack(mlps)


def run_text(model: PlantedModel, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`run` of one text without edits, and without the row axis."""
    resid, patterns, mlps = run(model, tokens)
    return resid[:, 0], patterns[:, 0], mlps[:, 0]


def sink_scores(patterns: Tensor) -> Tensor:
    """Mean attention from later queries [layer, head, position], the last position left out."""
    later = torch.arange(patterns.shape[-1] - 1, 0, -1)
    return patterns.tril(-1).sum(-2)[..., :-1] / later


def spans(model: PlantedModel, tokens: Tensor) -> list[tuple[int, int, int, float]]:
    """Every (position, first layer, layer of erasure, norm), primaries included."""
    truth = model.truth(tokens)
    secondary = [(s.position, s.onset, s.onset + s.lifetime, s.norm) for s in truth.sinks]
    return secondary + [
        (position, phase.start, phase.end, phase.norm)
        for phase in model.plan.phases
        for position in truth.primary
    ]


def alive(model: PlantedModel, tokens: Tensor) -> Tensor:
    """Planted norm at [layer, position], 0 where there is no sink."""
    table = torch.zeros(model.plan.n_layers, tokens.shape[-1])
    for position, start, end, norm in spans(model, tokens):
        table[start:end, position] = norm
    return table


def ordinary(model: PlantedModel, tokens: Tensor) -> Tensor:
    special = torch.tensor([*model.plan.primary_tokens, *model.plan.planted_tokens])
    return ~torch.isin(tokens[0], special)


def along(model: PlantedModel, resid: Tensor) -> Tensor:
    return resid @ model.sink_direction


# --- what the truth says about the residual stream and the attention -------------------------


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("seed", SEEDS)
def test_residuals_and_attention_show_sinks_exactly_where_the_truth_says(seed: int, n: int):
    model = drawn(seed)
    tokens = model.tokens(n, seed=seed + n)
    resid, patterns, _ = run_text(model, tokens)
    check_residuals(model, tokens, resid)
    check_attention(model, tokens, sink_scores(patterns))


def check_residuals(model: PlantedModel, tokens: Tensor, resid: Tensor) -> None:
    """Sinks have the planted norm and direction; no other token has both."""
    norm = resid.norm(dim=-1)
    cosine = along(model, resid) / norm
    planted = alive(model, tokens)
    usual = norm[:, ordinary(model, tokens)].median(dim=1).values[:, None]

    on = planted > 0
    torch.testing.assert_close(norm[on], planted[on], rtol=0.015, atol=0)
    assert cosine[on].min() > 0.98
    decoys = torch.isin(tokens[0], torch.tensor([*model.plan.aligned_decoys, -1]))
    large = torch.isin(tokens[0], torch.tensor([*model.plan.large_decoys, -1]))
    off = ~on & ~decoys
    assert cosine[off].abs().max() < 0.25
    assert (norm / usual)[off & ~large].max() < 3
    if decoys.any():
        assert cosine[model.plan.phases[0].start :, decoys].min() > 0.95
    if large.any():
        assert (norm / usual)[:, large].min() > 10


def check_attention(model: PlantedModel, tokens: Tensor, score: Tensor) -> None:
    """Sinks draw attention in the sink heads; decoys draw less than ordinary tokens in all."""
    usual = score[:, :, ordinary(model, tokens)[:-1]].mean(-1, keepdim=True)
    heads = model.plan.n_sink_heads
    before = alive(model, tokens)[:-1, :-1] > 0  # attention of block l + 1 shows residual l
    ratio = (score / usual)[1:, :heads].amin(1)
    assert ratio[before].min() > 10
    plain = ~before & ordinary(model, tokens)[None, :-1]
    assert (score / usual)[1:, :heads].amax(1)[plain].max() < 8
    start = model.plan.phases[0].start
    truth = model.truth(tokens)
    for position in (*truth.decoys_aligned, *truth.decoys_large):
        assert (score / usual)[start + 1 :, :, position].max() < 0.6


def test_the_primary_takes_a_third_to_nine_tenths_and_weakens_with_secondary_sinks():
    with_sinks, without = planted_model(), planted_model(secondary=())
    tokens = with_sinks.tokens(128)
    shares = []
    for model in (with_sinks, without):
        shares.append(sink_scores(run_text(model, tokens)[1])[:, :2, 0].mean(1))
    writer = with_sinks.plan.secondary[0].writer
    assert 0.5 < shares[1][writer + 1] < 0.9
    assert shares[0][writer] > 0.5
    assert 0.2 < shares[0][writer + 1] < 0.6


def test_sink_logits_hardly_depend_on_distance():
    model = planted_model(secondary=())
    tokens = model.tokens(512)
    _, patterns, _ = run_text(model, tokens)
    plain = ordinary(model, tokens)
    logit = (patterns[5, 0, :, 0] / patterns[5, 0].diagonal()).log()[plain]
    near, far = logit[20:120].mean(), logit[-100:].mean()
    assert abs(near - far) < 0.1


# --- causes ----------------------------------------------------------------------------------


def first_sink(model: PlantedModel, tokens: Tensor) -> PlantedOccurrence:
    """The sink with most feeders, so that the tests reach them."""
    return max(model.truth(tokens).sinks, key=lambda sink: len(sink.feeders))


with_secondary = pytest.mark.parametrize("seed", SEEDS_WITH_SINKS)


@with_secondary
def test_only_the_mlps_of_writer_and_feeders_are_necessary(seed: int):
    model = drawn(seed)
    tokens = model.tokens(64, seed=seed)
    sink = first_sink(model, tokens)
    end = sink.onset + sink.lifetime
    # One row for each layer, in which that layer's MLP is ablated at the sink.
    edits = {(layer, layer, sink.position): torch.zeros_like for layer in range(end)}
    resid, _, _ = run(model, tokens.expand(end, -1), edits)
    written = along(model, resid)[:, :, sink.position]
    life = written[sink.onset : end]
    necessary = [sink.writer, *sink.feeders]
    unnecessary = [layer for layer in range(end) if layer not in necessary]
    assert life[:, necessary].abs().max() < 0.01 * sink.norm
    assert ((life[:, unnecessary] / sink.norm - 1).abs() < 0.25).all()
    # Without its writer the sink leaves nothing to erase: no layer writes its opposite.
    assert written[:, sink.writer].abs().max() < 0.01 * sink.norm


@with_secondary
def test_transplanting_the_writers_output_makes_a_sink_of_the_same_life(seed: int):
    model = drawn(seed)
    tokens = model.tokens(64, seed=seed)
    sink = first_sink(model, tokens)
    _, clean, mlps = run_text(model, tokens)
    plain = ordinary(model, tokens)
    target = next(p for p in range(model.plan.primary_positions + 1, 60) if plain[p])
    donor = mlps[sink.writer, sink.position]
    resid, patterns, _ = run(model, tokens, {(0, sink.writer, target): lambda _: donor})
    written = along(model, resid)[:, 0, target]
    end = sink.onset + sink.lifetime
    assert written[: sink.onset].abs().max() < 0.5
    assert (written[sink.onset : end] / sink.norm).sub(1).abs().max() < 0.03
    if end < model.plan.n_layers:
        assert written[end:].abs().max() < max(1.0, 0.01 * sink.norm)
    heads, after = model.plan.n_sink_heads, sink.onset + 1
    drawn_now = sink_scores(patterns)[after, 0, :heads, target]
    assert (drawn_now > 5 * sink_scores(clean)[after, :heads, target]).all()


@with_secondary
def test_scaling_the_writers_output_scales_the_norm_and_keeps_the_life(seed: int):
    model = drawn(seed)
    tokens = model.tokens(64, seed=seed)
    sink = first_sink(model, tokens)
    end = sink.onset + sink.lifetime
    doses = torch.tensor([0.3, 0.5, 0.75, 1.5, 2.0, 3.5])
    edits: dict[tuple[int, int, int], Edit] = {
        (row, sink.writer, sink.position): lambda output, dose=dose: dose * output
        for row, dose in enumerate(doses)
    }
    resid, _, _ = run(model, tokens.expand(len(doses), -1), edits)
    written = along(model, resid)[:, :, sink.position]
    scaled = written[sink.onset : end] / (sink.norm * doses)
    assert (scaled - 1).abs().max() < 0.03
    if end < model.plan.n_layers:
        assert (written[end:].abs() < (0.02 * doses * sink.norm).clamp_min(1.0)).all()


@pytest.mark.parametrize("seed", range(4))
def test_without_its_eraser_a_sink_lives_on(seed: int):
    model = planted_model(seed=seed)
    tokens = model.tokens(64, seed=seed)
    sink = first_sink(model, tokens)
    end = sink.onset + sink.lifetime
    assert end < model.plan.n_layers
    resid, _, _ = run(model, tokens, {(0, end, sink.position): torch.zeros_like})
    assert (along(model, resid)[end:, 0, sink.position] > 0.95 * sink.norm).all()


# --- the model as an object ------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformer_lens_computes_the_same_residuals(architecture: str):
    model = planted_model(architecture=architecture, aligned_decoys=[30], common=10.0)
    tokens = model.tokens(64)
    before = {name: p.clone() for name, p in model.hf.state_dict().items()}
    loaded = model.load()
    _, cache = loaded.run_with_cache(tokens)
    resid, patterns, _ = run_text(model, tokens)
    for layer in range(model.plan.n_layers):
        bridge_resid = cache[f"blocks.{layer}.hook_resid_post"][0] - model.common
        torch.testing.assert_close(bridge_resid, resid[layer], rtol=1e-4, atol=2e-3)
        torch.testing.assert_close(
            cache[f"blocks.{layer}.attn.hook_pattern"][0], patterns[layer], rtol=1e-4, atol=1e-5
        )
    assert all(torch.equal(p, before[name]) for name, p in model.hf.state_dict().items())
    assert torch.equal(loaded.to_tokens(model.text(64)), tokens)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_architecture_is_the_one_asked_for(architecture: str):
    model = random_planted(3, architecture=architecture)
    assert model.hf.config.model_type == architecture
    assert not model.hf.training
    assert {p.dtype for p in model.hf.parameters()} == {torch.float32}


def test_a_model_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second, other = planted_model(), planted_model(), planted_model(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in first.hf.state_dict().items():
        assert torch.equal(weight, second.hf.state_dict()[name])
    assert not torch.equal(first.sink_direction, other.sink_direction)
    assert torch.equal(first.tokens(64, seed=3), second.tokens(64, seed=3))
    assert not torch.equal(first.tokens(64, seed=3), first.tokens(64, seed=4))


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_hold_every_planted_token_and_survive_the_tokenizer(seed: int):
    model = drawn(seed)
    tokens = model.tokens(80, seed=seed)
    assert set(model.plan.planted_tokens) <= set(tokens[0].tolist())
    encoded = model.tokenizer(model.text(80, seed=seed), return_tensors="pt").input_ids
    assert torch.equal(encoded, tokens)
    assert model.truth(tokens) == model.truth(tokens[0])


@pytest.mark.slow
def test_the_random_family_is_broad():
    plans = [drawn(seed).plan for seed in range(26)]
    assert all(plans[seed].secondary for seed in SEEDS_WITH_SINKS)
    assert {len(plan.phases) for plan in plans} == {1, 2}
    assert {plan.primary_positions for plan in plans} == {1, 2}
    assert {plan.architecture for plan in plans} == {"llama", "qwen2"}
    assert {bool(plan.common) for plan in plans} == {True, False}
    assert len({len(plan.secondary) for plan in plans}) >= 5
    assert any(sink.feeders for plan in plans for sink in plan.secondary)
    assert any(plan.aligned_decoys for plan in plans)
    assert any(plan.large_decoys for plan in plans)


# --- what is refused -------------------------------------------------------------------------

SINK = PlantedSink(token=9, writer=4, norm=80.0, lifetime=3)
PHASE = PlantedPhase(start=1, end=10, norm=300.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writer": 1}, "after its start"),
        ({"writer": 10}, "inside a primary phase"),
        ({"lifetime": 0}, "no lifetime"),
        ({"lifetime": 7}, "outlives"),
        ({"norm": 5.0}, "8 times"),
        ({"fades": True, "norm": 40.0}, "in its last layer: the norm must"),
        ({"feeders": (4,)}, "not layers before"),
        ({"feeders": (2, 2)}, "twice"),
        ({"token": 2}, "outside"),
        ({"token": 64}, "outside"),
    ],
)
def test_inconsistent_sinks_are_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        planted_model(phases=[PHASE], secondary=[dataclasses.replace(SINK, **changes)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phases": []}, "at least one"),
        ({"phases": [PHASE, PlantedPhase(start=10, end=12, norm=300)]}, "after the previous"),
        ({"phases": [PlantedPhase(start=3, end=3, norm=300)]}, "must lie"),
        ({"phases": [PlantedPhase(start=11, end=12, norm=300)]}, "last layer"),
        ({"secondary": [SINK, SINK]}, "more than once"),
        ({"aligned_decoys": [9]}, "more than once"),
        ({"aligned_decoys": [30], "aligned_decoy_norm": 1.0}, "aligned_decoy_norm"),
        ({"d_model": 24}, "axes"),
        ({"d_model": 66}, "divide"),
        ({"n_kv_heads": 3}, "divide"),
        ({"vocab": 12, "secondary": [SINK]}, "ordinary tokens"),
        ({"architecture": "gpt2"}, "gpt2"),
        ({"primary_positions": 3}, "primary_positions"),
        ({"common_alignment": 0.99}, "common_alignment"),
        ({"common": 100.0, "secondary": [dataclasses.replace(SINK, norm=20.0)]}, "common"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_inconsistent_models_are_refused(arguments: dict, message: str):
    if "phases" in arguments:
        arguments = {"secondary": [], **arguments}
    with pytest.raises(InputError, match=message):
        planted_model(**arguments)


def test_texts_without_a_truth_are_refused():
    model = planted_model()
    tokens = model.tokens(64)
    with pytest.raises(InputError, match="begin"):
        model.truth(tokens[:, 1:])
    with pytest.raises(InputError, match="again"):
        model.truth(torch.cat([tokens, tokens], dim=1))
    with pytest.raises(InputError, match="shape"):
        model.truth(tokens.expand(2, -1))
    with pytest.raises(InputError, match="least"):
        model.tokens(10)
    with pytest.raises(InputError, match="kind"):
        model.load("other")
