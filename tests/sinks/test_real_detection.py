"""Detection on the three real models, against attention alone."""

from __future__ import annotations

import pytest

import secondary_sinks as ss

MODELS = ["qwen", "smollm", "gemma"]


def sinks_of(model, text, **options):
    """The sinks of a text, in the model's chat template where it has one."""
    chat = bool(model.tokenizer.chat_template)
    return ss.detect_sinks(model, text, chat=chat, **options)


@pytest.fixture(scope="module")
def text():
    """Three bundled texts, one after the other."""
    parts = [part for part in ss.bundled_texts() if part.id == "mathematics-09"]
    parts += ss.bundled_texts("prose")[:2]
    return "\n\n".join(part.content for part in parts)


@pytest.mark.parametrize("name", MODELS)
def test_calls_agree_with_attention(name, text, request):
    sink_map = sinks_of(request.getfixturevalue(name), text, max_tokens=500)
    check = ss.attention_check(sink_map)
    assert check.recall == check.precision == 1.0
    assert sink_map.primary_position == 0
    assert {sink.position for sink in sink_map.primary} == {0}


def test_ratios_to_neighbors_alone_call_commas_of_gemma(gemma, text):
    """Heads that read the primary leave ordinary tokens nothing there."""
    sink_map = sinks_of(gemma, text, max_tokens=500)
    loose = sink_map.refilter(min_attention_ratio=3, min_strength=0, min_lifetime=1)
    assert len(ss.attention_check(loose).false_calls) > 10
    assert len(loose.secondary) > 4 * len(sink_map.secondary)


def test_strength_of_a_sink_does_not_depend_on_the_length_of_the_text(qwen, text):
    """The sinks of the system prompt, in 64 tokens and in 400."""
    short, long = (sinks_of(qwen, text, max_tokens=n) for n in (64, 400))
    places = [2, 3, 7, 12, 18, 20, 23]
    assert [sink.position for sink in short.secondary] == places
    strength = {sink.position: sink.strength for sink in long.secondary}
    for sink in short.secondary:
        assert strength[sink.position] == pytest.approx(sink.strength, rel=0.25)
    # Its share falls by more than that, and its multiple of uniform attention rises by more.
    share = {sink.position: sink.sink_score for sink in long.secondary}
    assert all(share[sink.position] < 0.8 * sink.sink_score for sink in short.secondary)


@pytest.mark.parametrize("before", ["", "🙂", "\n\n", "the "])
def test_labels_do_not_depend_on_how_a_text_begins(smollm, before):
    story = ss.bundled_texts("prose")[2].content
    sink_map = ss.detect_sinks(smollm, before + story, max_tokens=200)
    assert all(sink.position < 4 for sink in sink_map.primary)
    assert {sink.token for sink in sink_map.secondary} == {" the"}
    assert len(sink_map.secondary) >= 3


def test_a_word_repeated(qwen, smollm):
    """Nearly all tokens are sinks: they are found, or nothing is, and a note says why."""
    repeated = " ".join(["the"] * 60)
    found = ss.detect_sinks(qwen, repeated)
    assert found.primary_position == 0
    assert len(found.secondary) > 50
    assert {1, 2}.isdisjoint(sink.position for sink in found.sinks)
    assert any("few ordinary tokens" in note for note in found.notes)
    nothing = ss.detect_sinks(smollm, repeated)
    assert nothing.sinks == ()
    assert any("no ordinary tokens" in note for note in nothing.notes)
