"""Neurons of the writers: planted truth, sums in every family, two real models."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secondary_sinks as ss
from secondary_sinks.analyses.neuron_contributions import OnlyNeurons, fewest, strongest_others
from secondary_sinks.cli.detect import demo_messages
from secondary_sinks.planted.circuits import Layout, Write, circuits
from secondary_sinks.planted.planted_model import planted_model, random_planted
from secondary_sinks.planted.weights import NOISE_NEURONS
from secondary_sinks.sinks.direct_writes import direct_writes

pytestmark = pytest.mark.slow

SEEDS = [0, 3]  # with and without feeders
NUMBERS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)


def planted_neurons(plan):
    """(layer, token) -> the neurons that write that token's vector there."""
    neurons, used = {}, {}
    for part in circuits(plan, Layout.of(plan)):
        first = used.get(part.layer, NOISE_NEURONS)
        used[part.layer] = first + part.n_neurons
        if isinstance(part, Write):
            written = tuple(range(first, first + part.n_neurons))
            neurons.setdefault((part.layer, part.token), written)
    return neurons


@functools.cache
def planted(seed):
    """Truth by position, the planted neurons, and the contributions of a random planted model."""
    planted = random_planted(seed)
    tokens, model = planted.tokens(64), planted.load()
    result = ss.neuron_contributions(model, ss.detect_sinks(model, tokens), n_controls=3)
    truth = {sink.position: sink for sink in planted.truth(tokens).sinks}
    return truth, planted_neurons(planted.plan), result


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    planted = planted_model()
    model = planted.load()
    return model, ss.detect_sinks(model, planted.tokens(64))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_neurons_are_the_planted_ones(seed):
    truth, neurons, result = planted(seed)
    assert sorted(sink.position for sink in result.sinks) == sorted(truth)
    for index, sink in enumerate(result.sinks):
        expected = truth[sink.position]
        assert (sink.kind, sink.reason) == ("secondary", "")
        assert sink.writer == expected.writer
        assert set(sink.neurons) == set(neurons[expected.writer, expected.token])
        own = result.contribution[index, list(sink.neurons)]
        assert float(own.sum()) == pytest.approx(sink.write, rel=0.05)
        assert sink.write == pytest.approx(expected.norm, rel=0.15)
        assert sink.error < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_without_them_there_is_no_sink_and_with_them_alone_there_is(seed):
    truth, _, result = planted(seed)
    for test in result.tests:
        lives = truth[result.sinks[test.sink].position].lifetime
        kept = test.kind in ("keep_top", "ablate_random", "ablate_active")
        assert test.lifetime == (lives if kept else 0), test
        assert test.length_left == pytest.approx(1 if kept else 0, abs=0.05)
    counts = result.tests_frame().groupby("kind").size()
    assert counts["ablate_random"] == 3 * counts["keep_top"] == 3 * len(result.sinks)


@pytest.mark.parametrize("seed", SEEDS)
def test_their_gates_read_what_the_feeders_wrote(seed):
    truth, _, result = planted(seed)
    for sink in result.sinks:
        feeders = truth[sink.position].feeders
        assert sink.inputs.neurons == sink.neurons
        names = sink.inputs.parts
        gate, ordinary = sink.inputs.reads["gate"], sink.inputs.ordinary["gate"]
        above = (gate - ordinary).mean(dim=0) / (gate - ordinary).sum(dim=1).mean()
        for feeder in feeders:
            assert above[names.index(f"mlp {feeder}")] > 0.5 / len(feeders)
        if not feeders:
            assert above[names.index("embedding")] > 0.8
        others = set(names) - {"embedding", "mlp 0"} - {f"mlp {feeder}" for feeder in feeders}
        assert max(abs(float(above[names.index(name)])) for name in others) < 0.3


def test_contributions_and_inputs_add_up_in_every_family(make_tiny, family, tokens_of):
    model, tokens = make_tiny(family), tokens_of(24)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    sinks = (ss.Sink(9, "", int(tokens[9]), "secondary", (1, 2)),)
    sink_map = dataclasses.replace(ss.detect_sinks(model, tokens), sinks=sinks, phases=((0, 3),))
    writes = direct_writes(model, sink_map, sinks).mlp[0]
    layer = int(writes.argmax())
    if float(writes[layer]) <= 0:
        pytest.fail("no MLP of this random model writes along the direction; take another seed")
    if family in ("gpt-oss", "mixtral"):
        with pytest.raises(ss.ModelError, match="mixture of experts"):
            ss.neuron_contributions(model, sink_map, writers=layer)
        return
    result = ss.neuron_contributions(model, sink_map, writers=layer, share=0.999, n_controls=2)
    (sink,) = result.sinks
    whole = float(result.contribution[0].sum()) + sink.bias
    assert whole == pytest.approx(float(writes[layer]), rel=1e-3)
    assert (sink.bias != 0) == (family in ("gpt2", "neox"))
    hidden = []
    hook = (f"blocks.{layer}.mlp.hook_pre", lambda value, hook: hidden.append(value[0, 9].clone()))
    with torch.no_grad():
        model.run_with_hooks(tokens[None], fwd_hooks=[hook])
    stage = "pre" if "pre" in sink.inputs.reads else "gate"
    expected = hidden[0][list(sink.inputs.neurons)]
    torch.testing.assert_close(sink.inputs.pre_activation(stage), expected, rtol=1e-3, atol=1e-3)
    last = f"attn {layer}" if family != "neox" else f"mlp {layer - 1}" if layer else "embedding"
    assert sink.inputs.parts[-2:] == (last, "bias")


def test_a_share_can_be_the_whole_and_neurons_are_named():
    model, sink_map = default()
    result = ss.neuron_contributions(model, sink_map, verify=False, n_inputs=0)
    assert (result.tests, result.provenance.engine) == ((), None)
    assert result.writer_rule == "largest_write"
    assert all(sink.inputs is None for sink in result.sinks)
    assert result.inputs_frame().empty
    assert result.jaccard.tolist() == [[1, 0], [0, 1]], "each sink has its own two neurons"
    whole = ss.neuron_contributions(model, sink_map, share=1.0, verify=False, n_inputs=1)
    assert [len(sink.inputs.neurons) for sink in whole.sinks] == [1, 1]
    assert all(one.k <= other.k for one, other in zip(result.sinks, whole.sinks, strict=True))


def test_a_token_that_is_not_a_sink_gets_numbers_and_a_reason():
    model, sink_map = default()
    taken = {sink.position for sink in sink_map.sinks}
    positions = [p for p in range(20, 28) if p not in taken]
    result = ss.neuron_contributions(model, sink_map, sinks=positions, n_controls=1)
    assert {sink.kind for sink in result.sinks} == {"chosen"}
    sinks = ss.neuron_contributions(model, sink_map, verify=False, n_inputs=0).sinks
    least = min(sink.write for sink in sinks)
    for index, sink in enumerate(result.sinks):
        assert sink.reason.startswith(f"the token at position {sink.position} is not a sink")
        assert abs(sink.write) < 0.05 * least
        assert sink.lifetime == 0
        whole = float(result.contribution[index].sum()) + sink.bias
        assert whole == pytest.approx(sink.write, rel=1e-3, abs=1e-4)
    nothing = [sink for sink in result.sinks if sink.write <= 0]
    assert all("writes nothing along" in s.reason and s.neurons == () for s in nothing)
    written = {index for index, sink in enumerate(result.sinks) if sink.write > 0}
    assert nothing, "some tokens get a write against the direction"
    assert {test.sink for test in result.tests} == written
    assert all(test.lifetime == 0 for test in result.tests)
    assert len(result.to_frame()) == len(positions)
    assert f"{len(positions)} chosen tokens: " in repr(result)
    assert result.plot().axes
    only = dataclasses.replace(result, sinks=tuple(nothing), tests=())
    assert repr(only).endswith("nothing is written along the sink direction)")


def test_seeds_choose_the_controls_and_nothing_else():
    model, sink_map = default()

    def run(seed):
        sinks = sink_map.secondary[:1]
        return ss.neuron_contributions(model, sink_map, sinks=sinks, n_controls=2, seed=seed)

    first, again, other = run(1), run(1), run(2)
    assert first.tests == again.tests
    assert first.provenance.seed == 1
    assert first.tests_frame().query("kind == 'keep_random'").norm.tolist() != (
        other.tests_frame().query("kind == 'keep_random'").norm.tolist()
    )
    assert torch.equal(first.contribution, other.contribution)


def test_an_edit_keeps_or_drops_neurons():
    value = torch.arange(5.0)
    assert OnlyNeurons((1, 3), keep=True)(value, value, value).tolist() == [0, 1, 0, 3, 0]
    assert OnlyNeurons((1, 3), keep=False)(value, value, value).tolist() == [0, 0, 2, 0, 4]
    assert OnlyNeurons((), keep=False)(value, value, value).tolist() == value.tolist()


def test_a_hook_inside_the_mlp_is_noticed():
    model, sink_map = default()
    half = [("blocks.4.mlp.hook_post", lambda value, hook: value * 0.5)]
    hooked_map = ss.detect_sinks(model, sink_map.tokens, fwd_hooks=half)
    with pytest.raises(ss.ModelError, match="a hook inside it"):
        ss.neuron_contributions(
            model, hooked_map, sinks=sink_map.secondary[0].position, writers=4, fwd_hooks=half
        )


def test_tables_and_file(tmp_path):
    model, sink_map = default()
    result = ss.neuron_contributions(model, sink_map, n_controls=2)
    frame = result.to_frame()
    assert (frame["ablate_top.lifetime"] == 0).all()
    assert (frame["keep_random.lifetime"] == 0).all()
    assert sorted(result.neurons_frame().neuron) == [16, 17, 18, 19]
    assert repr(result).endswith("2 sinks: 2 of 58 neurons make 90% of the write)")
    assert "<table" in result._repr_html_()
    loaded = ss.NeuronContributions.load(result.save(tmp_path / "neurons.safetensors"))
    assert loaded.to_frame().equals(frame)
    assert loaded.inputs_frame().equals(result.inputs_frame())
    assert (loaded.tests, loaded.provenance) == (result.tests, result.provenance)


def test_bad_input():
    model, sink_map = default()
    with pytest.raises(ss.InputError, match="share is 0"):
        ss.neuron_contributions(model, sink_map, share=0)
    with pytest.raises(ss.InputError, match="n_controls is 0"):
        ss.neuron_contributions(model, sink_map, n_controls=0)
    with pytest.raises(ss.InputError, match="writer 12 is out of range"):
        ss.neuron_contributions(model, sink_map, writers=12)
    with pytest.raises(ss.InputError, match="the sinks are at"):
        ss.neuron_contributions(model, sink_map, writers={12: 4})
    erased = max(sink.layers[-1] for sink in sink_map.secondary) + 1
    with pytest.raises(ss.InputError, match="writes nothing along"):
        ss.neuron_contributions(model, sink_map, writers=erased)


def test_two_contributions_that_cancel_belong_together():
    assert fewest(torch.tensor([0.1, 200.0, -100.0, 0.2]), 100.3) == (1, 2)
    assert fewest(torch.tensor([0.1, 99.0, 0.2]), 99.3) == (1,)
    assert fewest(torch.tensor([50.0, 50.0]), 100.0) == (0, 1)
    assert fewest(torch.tensor([1.0, 5.0]), 106.0, bias=100.0) == ()


@given(NUMBERS, st.floats(0.1, 1), st.floats(-5, 5, width=32))
def test_the_fewest_and_all_further_ones_stay_near_the_whole(values, share, bias):
    contribution = torch.tensor(values)
    write = float(contribution.double().sum()) + bias
    neurons = fewest(contribution, write, bias=bias, share=share)
    order = contribution.abs().argsort(descending=True, stable=True).tolist()
    assert list(neurons) == order[: len(neurons)]
    allowed = max(1 - share, 1e-6) * abs(write) + 1e-9
    for n in range(len(neurons), len(values) + 1):
        left = bias + float(contribution[order[:n]].double().sum()) - write
        assert abs(left) <= allowed + 1e-9
    if neurons:
        n = len(neurons) - 1
        assert abs(bias + float(contribution[order[:n]].double().sum()) - write) > allowed - 2e-9


def test_the_strongest_others():
    size = torch.tensor([3.0, 9.0, 1.0, 5.0])
    assert strongest_others(size, [1], 2) == (3, 0)
    assert size.tolist() == [3, 9, 1, 5]


def test_qwen(qwen):
    """One neuron makes every sink of the system prompt, gated open by MLPs 3 and 4."""
    sink_map = ss.detect_sinks(qwen, demo_messages(), max_tokens=48)
    sinks = [sink for sink in sink_map.secondary if sink.position < 24]
    result = ss.neuron_contributions(qwen, sink_map, sinks=sinks, n_controls=1, progress=False)
    assert len(result.sinks) == 7
    assert {(sink.writer, sink.neurons) for sink in result.sinks} == {(5, (956,))}
    frame = result.to_frame()
    assert (frame.largest_share > 0.99).all()
    for kind, lifetime in (("ablate_top", 0), ("keep_top", 17), ("keep_active", 0)):
        assert set(frame[f"{kind}.lifetime"]) == {lifetime}
    assert set(frame["ablate_random.lifetime"]) == {17}
    for sink in result.sinks:
        for stage, sign in (("gate", 1), ("up", -1)):
            above = (sink.inputs.reads[stage] - sink.inputs.ordinary[stage])[0] * sign
            largest = above.argsort(descending=True)[:2].tolist()
            assert [sink.inputs.parts[part] for part in largest] == ["mlp 4", "mlp 3"]


def test_smollm(smollm):
    """Two neurons share the sinks of the first phase; one alone makes the weakest."""
    text = (
        "Bread needs flour, water, salt and time. Mix them in the evening, leave the dough on the "
        "table, and bake it in the morning when the oven is hot and the kitchen still cold."
    )
    sink_map = ss.detect_sinks(smollm, text)
    result = ss.neuron_contributions(smollm, sink_map, n_controls=2, progress=False)
    assert {sink.token for sink in result.sinks} == {" the"}
    assert {sink.writer for sink in result.sinks} == {2}
    assert {sink.neurons[:2] for sink in result.sinks} <= {(90, 430), (430, 90)}
    assert (result.to_frame()["ablate_top.length_left"] < 0.25).all()
