"""Neurons of the writers: planted truth, sums in every family, two real models."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.neuron_contributions import OnlyNeurons
from secondary_sinks.planted.circuits import Layout, Write, circuits
from secondary_sinks.planted.planted_model import planted_model, random_planted
from secondary_sinks.planted.weights import NOISE_NEURONS
from secondary_sinks.sinks.direct_writes import direct_writes

SEEDS = [0, 3]  # with and without feeders


def planted_neurons(plan):
    """(layer, token) -> the neurons that write that token's vector there."""
    found, used = {}, {}
    for part in circuits(plan, Layout.of(plan)):
        first = used.get(part.layer, NOISE_NEURONS)
        used[part.layer] = first + part.n_neurons
        if isinstance(part, Write):
            found.setdefault((part.layer, part.token), tuple(range(first, first + part.n_neurons)))
    return found


@functools.cache
def planted(seed):
    """Truth by position, the planted neurons, and the contributions of a random planted model."""
    model = random_planted(seed)
    tokens = model.tokens(64)
    host = model.load()
    found = ss.neuron_contributions(host, ss.detect_sinks(host, tokens), n_controls=3)
    truth = {sink.position: sink for sink in model.truth(tokens).sinks}
    return truth, planted_neurons(model.plan), found


@functools.cache
def default():
    """A planted model with two sinks, and its map of a text."""
    model = planted_model()
    host = model.load()
    return host, ss.detect_sinks(host, model.tokens(64))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_neurons_are_the_planted_ones(seed):
    truth, neurons, found = planted(seed)
    assert [sink.position for sink in sorted(found.sinks, key=lambda s: s.position)] == sorted(
        truth
    )
    for index, sink in enumerate(found.sinks):
        expected = truth[sink.position]
        assert sink.writer == expected.writer
        assert set(sink.neurons) == set(neurons[expected.writer, expected.token])
        own = found.contribution[index, list(sink.neurons)]
        assert float(own.sum()) == pytest.approx(sink.write, rel=0.05)
        assert sink.write == pytest.approx(expected.norm, rel=0.15)
        assert sink.error < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_without_them_there_is_no_sink_and_with_them_alone_there_is(seed):
    truth, _, found = planted(seed)
    for test in found.tests:
        lives = truth[found.sinks[test.sink].position].lifetime
        kept = test.kind in ("keep_top", "ablate_random", "ablate_active")
        assert test.lifetime == (lives if kept else 0), test
        assert test.length_left == pytest.approx(1 if kept else 0, abs=0.05)
    counts = found.tests_frame().groupby("kind").size()
    assert counts["ablate_random"] == 3 * counts["keep_top"] == 3 * len(found.sinks)


@pytest.mark.parametrize("seed", SEEDS)
def test_their_gates_read_what_the_feeders_wrote(seed):
    truth, _, found = planted(seed)
    for sink in found.sinks:
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
    sinks = ss.detect_sinks(model, tokens)
    some = (ss.Sink(9, "", int(tokens[9]), "secondary", (1, 2)),)
    sinks = dataclasses.replace(sinks, sinks=some, phases=((0, 3),))
    writes = direct_writes(model, sinks, some).mlp[0]
    layer = int(writes.argmax())
    if float(writes[layer]) <= 0:
        pytest.fail("no MLP of this random model writes along the direction; take another seed")
    if family in ("gpt-oss", "mixtral"):
        with pytest.raises(ss.ModelError, match="mixture of experts"):
            ss.neuron_contributions(model, sinks, writers=layer)
        return
    found = ss.neuron_contributions(model, sinks, writers=layer, share=0.999, n_controls=2)
    one = found.sinks[0]
    whole = float(found.contribution[0].sum()) + one.bias
    assert whole == pytest.approx(float(writes[layer]), rel=1e-3)
    assert (one.bias != 0) == (family in ("gpt2", "neox"))
    hidden = []
    hook = (f"blocks.{layer}.mlp.hook_pre", lambda value, hook: hidden.append(value[0, 9].clone()))
    with torch.no_grad():
        model.run_with_hooks(tokens[None], fwd_hooks=[hook])
    stage = "pre" if "pre" in one.inputs.reads else "gate"
    expected = hidden[0][list(one.inputs.neurons)]
    torch.testing.assert_close(one.inputs.pre_activation(stage), expected, rtol=1e-3, atol=1e-3)
    last = f"attn {layer}" if family != "neox" else f"mlp {layer - 1}" if layer else "embedding"
    assert one.inputs.parts[-2:] == (last, "bias")


def test_a_share_can_be_the_whole_and_neurons_are_named():
    host, sinks = default()
    found = ss.neuron_contributions(host, sinks, verify=False, n_inputs=0)
    assert found.tests == ()
    assert all(sink.inputs is None for sink in found.sinks)
    assert found.inputs_frame().empty
    assert found.jaccard.tolist() == [[1, 0], [0, 1]], "each sink has its own two neurons"
    whole = ss.neuron_contributions(host, sinks, share=1.0, verify=False, n_inputs=1)
    assert [len(sink.inputs.neurons) for sink in whole.sinks] == [1, 1]
    assert all(one.k <= other.k for one, other in zip(found.sinks, whole.sinks, strict=True))


def test_seeds_choose_the_controls_and_nothing_else():
    host, sinks = default()
    which = sinks.secondary[:1]

    def ask(seed):
        return ss.neuron_contributions(host, sinks, which=which, n_controls=2, seed=seed)

    one, again, other = ask(1), ask(1), ask(2)
    assert one.tests == again.tests
    assert one.seed == 1
    assert one.tests_frame().query("kind == 'keep_random'").norm.tolist() != (
        other.tests_frame().query("kind == 'keep_random'").norm.tolist()
    )
    assert torch.equal(one.contribution, other.contribution)


def test_an_edit_keeps_or_drops_neurons():
    value = torch.arange(5.0)
    assert OnlyNeurons((1, 3), keep=True)(value, value, value).tolist() == [0, 1, 0, 3, 0]
    assert OnlyNeurons((1, 3), keep=False)(value, value, value).tolist() == [0, 0, 2, 0, 4]
    assert OnlyNeurons((), keep=False)(value, value, value).tolist() == value.tolist()


def test_a_hook_inside_the_mlp_is_noticed():
    host, sinks = default()
    half = [("blocks.4.mlp.hook_post", lambda value, hook: value * 0.5)]
    with pytest.raises(ss.ModelError, match="a hook inside it"):
        ss.neuron_contributions(host, sinks, writers=4, fwd_hooks=half)


def test_tables_and_file(tmp_path):
    host, sinks = default()
    found = ss.neuron_contributions(host, sinks, n_controls=2)
    frame = found.to_frame()
    assert (frame["ablate_top.lifetime"] == 0).all()
    assert (frame["keep_random.lifetime"] == 0).all()
    assert sorted(found.neurons_frame().neuron) == [16, 17, 18, 19]
    assert repr(found).endswith("2 sinks: 2 of 58 neurons make 90% of the write)")
    assert "<table" in found._repr_html_()
    back = ss.NeuronContributions.load(found.save(tmp_path / "neurons.safetensors"))
    assert back.to_frame().equals(frame)
    assert back.inputs_frame().equals(found.inputs_frame())
    assert back.tests == found.tests


def test_bad_input():
    host, sinks = default()
    with pytest.raises(ss.InputError, match="share is 0"):
        ss.neuron_contributions(host, sinks, share=0)
    with pytest.raises(ss.InputError, match="n_controls is 0"):
        ss.neuron_contributions(host, sinks, n_controls=0)
    with pytest.raises(ss.InputError, match="writer 12 is out of range"):
        ss.neuron_contributions(host, sinks, writers=12)
    with pytest.raises(ss.InputError, match="name no layer for position 34"):
        ss.neuron_contributions(host, sinks, writers={11: 4})
    erased = max(sink.layers[-1] for sink in sinks.secondary) + 1
    with pytest.raises(ss.InputError, match="writes nothing along"):
        ss.neuron_contributions(host, sinks, writers=erased)


def test_qwen(qwen):
    """One neuron makes every sink of the system prompt, gated open by MLPs 3 and 4."""
    from secondary_sinks.cli.app import demo_messages

    sinks = ss.detect_sinks(qwen, demo_messages(), max_tokens=48)
    which = [sink for sink in sinks.secondary if sink.position < 24]
    found = ss.neuron_contributions(qwen, sinks, which=which, n_controls=1, progress=False)
    assert len(found.sinks) == 7
    assert {(sink.writer, sink.neurons) for sink in found.sinks} == {(5, (956,))}
    frame = found.to_frame()
    assert (frame.largest_share > 0.99).all()
    for kind, lifetime in (("ablate_top", 0), ("keep_top", 17), ("keep_active", 0)):
        assert set(frame[f"{kind}.lifetime"]) == {lifetime}
    assert set(frame["ablate_random.lifetime"]) == {17}
    for sink in found.sinks:
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
    found = ss.neuron_contributions(smollm, text, n_controls=2, progress=False)
    assert {sink.token for sink in found.sinks} == {" the"}
    assert {sink.writer for sink in found.sinks} == {2}
    assert {sink.neurons[:2] for sink in found.sinks} <= {(90, 430), (430, 90)}
    assert (found.to_frame()["ablate_top.length_left"] < 0.25).all()
