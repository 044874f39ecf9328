"""The measured facts of two real models; no text here is one that the criterion was made on."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss

CHAT = [
    {
        "role": "user",
        "content": "A baker has 7 trays of 12 rolls and sells 59 rolls before noon. In the "
        "afternoon she bakes two more trays and sells half of what is there. How many rolls are "
        "left? Reason step by step.",
    },
    {
        "role": "assistant",
        "content": "We count the rolls one step at a time.\n\n1. Seven trays of twelve rolls are "
        "7 * 12 = 84 rolls.\n2. After selling 59 of them, 84 - 59 = 25 rolls are left at noon.\n"
        "3. Two more trays add 2 * 12 = 24 rolls, so there are 25 + 24 = 49 rolls.\n4. Half of 49 "
        "is 24.5; as rolls are sold whole, she sells 24 of them and keeps 25.\n\nThe answer is 25 "
        "rolls. If she sold 25 instead, the answer would be 24, so the question should say which "
        "way to round. In practice the difference of one roll is small, and the seller would eat "
        "it for lunch.",
    },
]
POEM = (
    "In the north of the island there is a village where the road ends. The people of the village "
    "say that the road was never meant to end there; the engineer died, the money was spent, and "
    "the sea took the last bridge in the winter of the great storm. Since then the village has had "
    "two clocks. One of them shows the time of the mainland, and the other the time of the sea, "
    "which is read from the tide and is never the same for two days. The children learn the one "
    "in the school and the other from the old people on the beach."
)


@pytest.fixture(scope="module")
def chat_map(qwen):
    return ss.detect_sinks(qwen, CHAT, max_tokens=400)


def test_qwen_primary(chat_map):
    assert chat_map.primary_position == 0
    assert chat_map.phases[0][0] == 2
    assert chat_map.norm[2, 0].item() == pytest.approx(1634, rel=0.01)
    assert chat_map.norm[3:20, 0].min() > 2200
    assert chat_map.norm[5].median().item() == pytest.approx(13, abs=3)
    assert {s.kind for s in chat_map.sinks if s.position == 0} == {"primary"}


def test_qwen_secondary_sinks_of_the_system_prompt(chat_map):
    in_prompt = [s for s in chat_map.secondary if s.position < 24]
    assert [s.position for s in in_prompt] == [2, 3, 7, 12, 18, 20, 23]
    assert [s.token for s in in_prompt] == ["\n", "You", ",", ".", ".", "\n", "\n"]
    assert {s.level for s in in_prompt} == {(5, 17)}
    for sink in in_prompt:
        assert 170 < sink.norm < 390
        assert 0.015 < max(sink.evidence.sink_score) < 0.2


def test_qwen_by_the_published_rule(qwen):
    """With 24 layers the published label calls a life of 17 layers a BOS sink."""
    sinks = ss.detect_sinks(qwen, CHAT, max_tokens=400, criterion="published")
    by_position = {s.position: s for s in sinks.sinks}
    assert by_position[3].layers == tuple(range(5, 22))
    assert by_position[3].kind == "primary"
    assert sinks.secondary == []
    with torch.no_grad():
        out = qwen.original_model(sinks.tokens[None], output_hidden_states=True)
    hidden = torch.stack(out.hidden_states[1:])[:, 0]
    torch.testing.assert_close(sinks.norm, hidden.norm(dim=-1), rtol=1e-3, atol=1e-2)
    cosine = torch.cosine_similarity(hidden, hidden[:, :1], dim=-1)
    start, end = sinks.phases[0]
    assert {
        (layer, token) for s in sinks.sinks for layer, token in ((x, s.position) for x in s.layers)
    } == {
        (layer, token)
        for layer, token in (cosine.abs() > 0.9).nonzero().tolist()
        if start <= layer < end
    }


def test_qwen_makes_no_sink_of_a_bos_that_it_never_saw(qwen):
    """The token behind it becomes the primary, as it does when it stands in front."""
    plain = ss.detect_sinks(qwen, POEM)
    with_bos = ss.detect_sinks(qwen, POEM, prepend_bos=True)
    assert plain.phases[0][0] == 2
    assert plain.norm[10, 0] > 10 * plain.norm[10].median()
    assert with_bos.token_strings[:2] == ("<|endoftext|>", "In")
    assert with_bos.norm[10, 0] < 3 * with_bos.norm[10].median()
    assert with_bos.primary_position == 1
    assert with_bos.phases == plain.phases


def test_smollm_two_phases(smollm):
    sinks = ss.detect_sinks(smollm, CHAT, max_tokens=400)
    assert sinks.phases == ((1, 9), (11, 29))
    assert sinks.norm[5, 0].item() == pytest.approx(800, rel=0.05)
    assert sinks.norm[9:11, 0].max() < 250
    assert sinks.norm[15, 0].item() == pytest.approx(25_000, rel=0.02)
    assert [s.lifetime for s in sinks.primary if s.position == 0] == [8, 18]
    assert all(s.layers[-1] <= 8 for s in sinks.secondary), "only BOS is a sink in the second phase"


@pytest.mark.parametrize("first", ["Before", "There", "Suppose", "1", "We", "class"])
def test_smollm_kinds_do_not_depend_on_the_first_word(smollm, first):
    """How fast the first token rises does depend on it."""
    sinks = ss.detect_sinks(smollm, first + POEM[2:])
    assert sinks.phases[0] == (1, 9)
    assert [s.position for s in sinks.primary] == [0, 0]
    assert " the" in {s.token for s in sinks.secondary}


def test_smollm_the_sinks_of_the_first_phase(smollm):
    sinks = ss.detect_sinks(smollm, POEM)
    the = [s for s in sinks.secondary if s.token == " the"]
    assert the, "some of the many occurrences of ' the' are sinks"
    assert {s.l_start for s in the} == {2}
    strongest = max(the, key=lambda s: s.sink_score)
    primary = next(s for s in sinks.primary if s.l_start == 1)
    assert strongest.sink_score > 0.5 * primary.sink_score
    by_norm = sorted(the, key=lambda s: s.norm)
    assert by_norm[-1] == strongest, "the longest vector draws the most attention"
    published = ss.detect_sinks(smollm, POEM, criterion="published")
    assert published.phases[0][0] == 11, "the published rule looks at the larger rise only"
    assert not {s.position for s in the} & {s.position for s in published.sinks}
