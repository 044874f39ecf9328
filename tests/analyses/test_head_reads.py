"""Which heads look at sinks: logits by hand in every family, planted sink heads, a real model."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.analyses.head_reads import FACTORS, PARTS, Logits
from secondary_sinks.planted.planted_model import planted_model, random_planted


@functools.cache
def planted(seed):
    """A random planted model, its map of a text, and its heads."""
    model = random_planted(seed)
    host, tokens = model.load(), model.tokens(64)
    sinks = ss.detect_sinks(host, tokens)
    return model, sinks, ss.head_reads(host, sinks)


@functools.cache
def default():
    model = planted_model()
    host = model.load()
    return host, ss.detect_sinks(host, model.tokens(64))


@functools.cache
def reads_of_default():
    return ss.head_reads(*default())


def with_hooks(hooks):
    """The heads of the default model and its text, under hooks."""
    host, sinks = default()
    return ss.head_reads(
        host, ss.detect_sinks(host, sinks.tokens, fwd_hooks=hooks), fwd_hooks=hooks
    )


def arranged(model, tokens, **options):
    """A map of a random model in which two tokens are said to be sinks."""
    sinks = ss.detect_sinks(model, tokens, **options)
    some = (
        ss.Sink(0, "", int(tokens[0]), "primary", (0, 1)),
        ss.Sink(5, "", int(tokens[5]), "secondary", (1,)),
    )
    return dataclasses.replace(sinks, sinks=some, phases=((0, 3),), primary_position=0)


def with_random_vectors(model, seed=1):
    """Biases and the weights of norms drawn at random, so that none of them is ignored."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def mean_logit(scores, position):
    """By hand: of the later queries that see the key."""
    column = scores[:, position + 1 :, position]
    seen = column > -1e30
    return (column * seen).sum(dim=1) / seen.sum(dim=1)


def total(logits):
    return sum(getattr(logits, name) for name in PARTS)


def test_parts_of_logits_add_up_in_every_family(make_tiny, family, tokens_of):
    model, tokens = with_random_vectors(make_tiny(family)), tokens_of(24)
    heads = ss.head_reads(model, arranged(model, tokens), n_matched=3)
    assert heads.error < 1e-5
    assert heads.notes == ()
    _, cache = model.run_with_cache(tokens[None])
    for layer in range(3):
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][0]
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        for index, sink in enumerate(heads.sinks):
            expected = mean_logit(scores, sink.position)
            torch.testing.assert_close(
                heads.sink.logit[index, layer], expected, rtol=1e-4, atol=1e-5
            )
            ordinary = torch.stack([mean_logit(scores, p) for p in sink.matched]).mean(dim=0)
            torch.testing.assert_close(
                heads.ordinary.logit[index, layer], ordinary, rtol=1e-4, atol=1e-5
            )
        rest = 1 - pattern.sum(dim=-1)
        entropy = torch.special.entr(pattern).sum(-1) + torch.special.entr(rest.clamp(0, 1))
        queries = [p for p in range(8, 24) if p not in (0, 5)]
        torch.testing.assert_close(
            heads.entropy[layer], entropy[:, queries].mean(dim=1), rtol=1e-3, atol=1e-4
        )
    for logits in (heads.sink, heads.ordinary):
        torch.testing.assert_close(total(logits), logits.logit, rtol=1e-4, atol=1e-5)
    has_biases = family in ("gpt2", "neox", "qwen2", "gpt-oss")
    assert bool(heads.sink.query_bias.abs().max() > 0.01) == has_biases
    assert bool(heads.sink.key_bias.abs().max() > 0.01) == has_biases
    assert bool(heads.sink.rotation.abs().max() > 0.01) == (family != "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "neox", "qwen2", "gpt-oss"])
def test_parts_of_the_biases_are_those_that_vanish_with_them(make_tiny, tokens_of, family):
    """Without biases what is left is content and rotation; the first layer reads the same text."""
    tokens = tokens_of(24)
    model = with_random_vectors(make_tiny(family))
    before = ss.head_reads(model, arranged(model, tokens), n_matched=3)
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            names = ("q_proj.bias", "k_proj.bias", "query_key_value.bias", "c_attn.bias")
            if name.endswith(names):
                parameter.zero_()
    for block in model.blocks:  # fused projections are split when the model is wrapped
        for part in (block.attn.q, block.attn.k):
            bias = getattr(part.original_component, "bias", None)
            if bias is not None:
                bias.data.zero_()
    after = ss.head_reads(model, arranged(model, tokens), n_matched=3)
    assert after.sink.query_bias.abs().max() == after.sink.key_bias.abs().max() == 0
    assert after.sink.distance.abs().max() == 0
    for name in ("content", "rotation"):
        torch.testing.assert_close(
            getattr(after.sink, name)[:, 0], getattr(before.sink, name)[:, 0], rtol=1e-3, atol=1e-4
        )


def test_a_cap_is_a_part_of_its_own(make_tiny, tokens_of):
    model, tokens = make_tiny("gemma2"), tokens_of(24)
    with torch.no_grad():
        for layer in model.original_model.model.layers:
            layer.self_attn.q_proj.weight *= 60
    heads = ss.head_reads(model, arranged(model, tokens), n_matched=3)
    assert heads.sink.cap.abs().max() > 1
    assert heads.sink.logit.abs().max() < 50
    torch.testing.assert_close(total(heads.sink), heads.sink.logit, rtol=1e-3, atol=1e-3)


def test_windows_hide_what_is_far_away(make_tiny, tokens_of):
    """Only visible pairs count: the logits of a key do not depend on tokens beyond its window."""
    model, tokens = make_tiny("mistral"), tokens_of(30)
    sinks = arranged(model, tokens)
    one = ss.head_reads(model, sinks)
    other = tokens.clone()
    other[20:] = tokens[20:].flip(0)
    two = ss.head_reads(model, dataclasses.replace(sinks, tokens=other))
    torch.testing.assert_close(one.sink.logit, two.sink.logit)
    torch.testing.assert_close(one.sink.query_norm, two.sink.query_norm)
    whole = make_tiny("llama")
    sinks = arranged(whole, tokens)
    one = ss.head_reads(whole, sinks)
    two = ss.head_reads(whole, dataclasses.replace(sinks, tokens=other))
    assert not torch.allclose(one.sink.logit, two.sink.logit, rtol=1e-3)


@pytest.mark.parametrize("seed", [1, 3, 8])
def test_sink_heads_are_the_planted_ones(seed):
    """In every layer that shows sinks the first half of the heads, and no other, looks at them."""
    model, sinks, heads = planted(seed)
    n = model.plan.n_sink_heads
    assert len(heads.sinks) == len({sink.position for sink in sinks.sinks})
    for kind in ("primary", "secondary"):
        beyond = heads.of_kind(heads.sink.logit - heads.ordinary.logit, kind)
        score = heads.primary_score if kind == "primary" else heads.secondary_score
        shown = {layer for sink in heads.sinks if sink.kind == kind for layer in sink.shown}
        assert shown
        for layer in range(heads.n_layers):
            if layer not in shown:
                assert (score[layer] == 0).all()
                assert beyond[layer].isnan().all()
                continue
            assert beyond[layer, :n].min() > 2
            assert (beyond[layer, n:] < 2).all()
        assert not heads.reads(kind)[:, n:].any()
    assert heads.reads("primary")[:, :n].any()


@pytest.mark.slow
def test_factors_are_those_of_the_logit():
    _, _, heads = planted(3)
    factors = heads.sink
    made = factors.key_norm * factors.query_norm * factors.cosine
    # Means of products are no products of means, so only where queries are about alike.
    one = heads.reads("primary")
    ratio = made[0][one] / factors.logit[0][one]
    assert ratio.std() / ratio.mean() < 0.1


@pytest.mark.slow
def test_dormant_heads_see_small_values():
    """All attention on the primary, whose values are planted to be small; then made large."""

    def enlarge(value, hook):
        value = value.clone()
        value[:, 0] = value[0].norm(dim=-1).max()
        return value

    look = ("blocks.3.attn.hook_pattern", lambda pattern, hook: _onto_first(pattern))
    small = with_hooks([look])
    large = with_hooks([look, ("blocks.3.attn.hook_v", enlarge)])
    assert small.sink_attention[3].min() > 0.99
    assert (small.dormant_share[3] == 1).all()
    assert small.is_dormant[3].all()
    assert small.value_seen[3].max() < 0.1
    assert (large.dormant_share[3] == 0).all()
    assert large.value_seen[3].min() > 1
    assert small.entropy[3].max() < 0.01
    assert (small.entropy <= small.uniform_entropy[:, None] + 1e-4).all()


def _onto_first(pattern):
    moved = torch.zeros_like(pattern)
    moved[..., 0] = 1
    return moved


def test_roles_table_and_repr(tmp_path):
    _, sinks, heads = planted(3)
    frame = heads.to_frame()
    assert len(frame) == heads.n_layers * heads.n_heads
    assert set(frame.role) <= {"primary", "secondary", "both", "none"}
    assert frame.role.tolist() == [
        heads.role(layer, head) for layer, head in zip(frame["layer"], frame["head"], strict=True)
    ]
    both = frame[frame.role == "both"]
    assert (both.primary_score >= 0.1).all()
    assert (both.secondary_score >= 0.1).all()
    back = ss.HeadReads.load(heads.save(tmp_path / "heads.safetensors"))
    assert repr(back) == repr(heads)
    assert back.sinks == heads.sinks
    for entry in dataclasses.fields(Logits):
        torch.testing.assert_close(
            getattr(back.sink, entry.name), getattr(heads.sink, entry.name), equal_nan=True
        )
    long = heads.logits_frame()
    assert len(long) == len(heads.sinks) * len(frame)
    assert set(long[long.shown].position) == {sink.position for sink in sinks.sinks}
    assert "role" in heads._repr_html_()


def test_seeds_and_a_choice_of_sinks():
    host, sinks = default()
    one, again, other = (ss.head_reads(host, sinks, n_matched=3, seed=s) for s in (1, 1, 2))
    assert one.sinks == again.sinks
    assert [s.matched for s in one.sinks] != [s.matched for s in other.sinks]
    first = ss.head_reads(host, sinks, sinks=sinks.secondary[:1])
    assert [s.position for s in first.sinks] == [0, sinks.secondary[0].position]


def test_a_token_that_is_not_a_sink_has_logits_and_no_role():
    host, sinks = default()
    position = next(p for p in range(20, 64) if p not in {sink.position for sink in sinks.sinks})
    heads = ss.head_reads(host, sinks, sinks=[*sinks.secondary, position])
    alone = reads_of_default()
    *others, token = heads.sinks
    assert tuple(others) == alone.sinks
    assert (token.position, token.kind) == (position, "chosen")
    assert position not in token.matched
    shown = list(token.shown)
    assert shown == [layer + 1 for layer in sinks.secondary[0].layers]
    for name in FACTORS:
        assert getattr(heads.sink, name)[-1, shown].isfinite().all()
    torch.testing.assert_close(heads.score[-1], sinks.sink_score[:, :, position])
    reads = heads.reads("secondary")
    beyond = (heads.sink.logit - heads.ordinary.logit).masked_fill(~reads, torch.nan)
    assert (
        heads.of_kind(beyond, "chosen").nanmean()
        < 1
        < heads.of_kind(beyond, "secondary")[reads].min()
    )
    # It changes nothing in what is said of heads.
    assert heads.roles == alone.roles
    for name in ("secondary_score", "sink_attention", "dormant_share"):
        torch.testing.assert_close(getattr(heads, name), getattr(alone, name))
    assert f"position {position} is not a sink" in heads.notes[0]
    assert "and 1 other token" in repr(heads)
    assert "chosen_logit" in heads.to_frame()
    assert "chosen_logit" not in alone.to_frame()
    table = heads.logits_frame()
    assert set(table[table["kind"] == "chosen"].position) == {position}


def test_the_primary_alone_and_a_single_position():
    host, sinks = default()
    alone = ss.head_reads(host, sinks, sinks="primary")
    assert [sink.kind for sink in alone.sinks] == ["primary"]
    assert (alone.secondary_score == 0).all()
    assert not alone.reads("secondary").any()
    torch.testing.assert_close(alone.primary_score, reads_of_default().primary_score)
    by_position = ss.head_reads(host, sinks, sinks=sinks.secondary[0].position)
    assert [sink.kind for sink in by_position.sinks] == ["primary", "secondary"]


def test_scores_that_somebody_edits_are_refused():
    lean = [("blocks.2.attn.hook_attn_scores", lambda scores, hook: 1.5 * scores)]
    with pytest.raises(ss.ModelError, match="do not add up"):
        with_hooks(lean)


def test_bad_input():
    host, sinks = default()
    with pytest.raises(ss.InputError, match="n_matched is 0"):
        ss.head_reads(host, sinks, n_matched=0)
    elsewhere = dataclasses.replace(sinks.secondary[0], position=50)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        ss.head_reads(host, sinks, sinks=[elsewhere])
    with pytest.raises(ss.InputError, match="no secondary sinks in this text"):
        ss.head_reads(host, dataclasses.replace(sinks, sinks=()))


def test_qwen_queries_like_sinks_whatever_they_say(qwen):
    """What draws attention to its secondary sinks is the bias of the queries."""
    sinks = ss.detect_sinks(qwen, "The sea took the bridge.\n\nYou are alone.\n", chat=True)
    heads = ss.head_reads(qwen, sinks)
    strongest = heads.secondary_score.flatten().argsort(descending=True)[:10]

    def beyond(name):
        values = getattr(heads.sink, name) - getattr(heads.ordinary, name)
        return heads.of_kind(values, "secondary").flatten()[strongest]

    assert (beyond("logit") > 3).all()
    assert (beyond("query_bias") / beyond("logit")).median() > 0.8
    assert heads.of_kind(heads.sink.value_norm, "secondary").flatten()[strongest].median() < 0.3
    assert heads.error < 1e-3


@pytest.mark.parametrize("unmaskable", ["opt", "gptj", "gpt-neo"])
def test_models_that_show_weights_have_attention_and_no_logits(tiny, tokens_of, unmaskable):
    """In these the hook of the scores fires last, with what the pattern's fired with, so that it
    does not show GPT-Neo's window either."""
    model, tokens = tiny(unmaskable), tokens_of(24)
    # A window of 8 shows each token to 7 later queries.
    heads = ss.head_reads(model, arranged(model, tokens, min_queries=7), n_matched=3)
    assert "no logits" in heads.notes[0]
    assert torch.isnan(heads.sink.logit).all()
    _, cache = model.run_with_cache(tokens[None])
    for layer in range(3):
        if layer in heads.sinks[0].shown:
            n_seeing = 7 if unmaskable == "gpt-neo" and layer == 1 else 23  # a window of 8
            later = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, 1:, 0].sum(dim=1) / n_seeing
            torch.testing.assert_close(heads.primary_score[layer], later, rtol=1e-3, atol=1e-4)
    assert (heads.entropy <= heads.uniform_entropy[:, None] + 1e-4).all()
    if unmaskable == "gpt-neo":
        assert heads.uniform_entropy[1] <= math.log(8) + 1e-6 < heads.uniform_entropy[0]
        uniform = [sum(1 / n for n in range(2, last + 1)) / (last - 1) for last in (24, 8, 24)]
        assert heads.uniform_score[0].tolist() == pytest.approx(uniform)


def test_latent_attention_is_read_and_hybrids_are_refused(tiny, tokens_of):
    """The parts of a logit are checked against the model's own scores."""
    model = tiny("deepseek")
    sink_map = dataclasses.replace(ss.detect_sinks(model, tokens_of(48)), phases=((0, 3),))
    reads = ss.head_reads(model, sink_map, sinks=[9])
    assert reads.error < 1e-5
    hybrid = tiny("lfm2")
    with pytest.raises(ss.ModelError, match=r"head_reads .* layers 0 and 2 .* no attention"):
        ss.head_reads(hybrid, ss.detect_sinks(hybrid, tokens_of(48)), sinks=[9])
