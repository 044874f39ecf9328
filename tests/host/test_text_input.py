"""Texts become the token ids that the model was trained on, and bad ones say why."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.text_input import is_many, pad, tokenize

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


@pytest.fixture
def model(make_tiny):
    model = make_tiny("llama")
    model.tokenizer.chat_template = TEMPLATE
    return model


def ids(model, text, **kwargs):
    (one,) = tokenize(model, text, **kwargs)
    return one.tokens.tolist()


def test_a_string_follows_the_tokenizers_convention(model):
    """The tiny tokenizer adds no beginning-of-sequence token, so none is there."""
    assert ids(model, "w3 w4 w5") == [3, 4, 5]
    assert ids(model, "w3 w4 w5", prepend_bos=True) == [1, 3, 4, 5]
    assert ids(model, "w3 w4 w5", prepend_bos=False) == [3, 4, 5]


def test_a_text_that_has_its_bos_gets_no_other(model):
    assert ids(model, "<bos> w3 w4", prepend_bos=True) == [1, 3, 4]
    model.cfg.default_prepend_bos = True
    assert ids(model, "<bos> w3 w4") == [1, 3, 4]
    assert ids(model, "w3 w4") == [1, 3, 4]


def test_the_hosts_own_setting_is_followed(model):
    model.cfg.default_prepend_bos = True
    assert ids(model, "w3 w4") == [1, 3, 4] == model.to_tokens("w3 w4")[0].tolist()


def test_chat_goes_through_the_template(model):
    conversation = [{"role": "w3", "content": "w4"}, {"role": "assistant", "content": "w6"}]
    (one,) = tokenize(model, conversation)
    assert one.token_strings[0] == "w3"
    assert one.tokens.tolist() == [3, 4, 0, 6], "the assistant answered: no turn is opened"
    assert one.chat
    assert ids(model, conversation[:1]) == [3, 4, 9], "the assistant's turn is opened"
    assert ids(model, "w7 w8", chat=True) == [0, 7, 8, 9]
    plain, other = tokenize(model, ["w7 w8", "w3"], chat=True)
    assert (plain.tokens.tolist(), other.tokens.tolist()) == ([0, 7, 8, 9], [0, 3, 9])


def test_several_conversations(model):
    conversations = [[{"role": "w3", "content": "w4"}], [{"role": "w5", "content": "w6 w7"}]]
    first, second = tokenize(model, conversations)
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([3, 4, 9], [5, 6, 7, 9])
    assert is_many(conversations)
    assert not is_many(conversations[0])


def test_token_ids_in_every_form(model):
    expected = [4, 5, 6]
    row = torch.tensor(expected)
    for text in (row, row[None], row.to(torch.int32)):
        assert ids(model, text) == expected
    assert [len(t) for t in tokenize(model, [row, row[:2]])] == [3, 2]
    assert [len(t) for t in tokenize(model, torch.stack([row, row]))] == [3, 3]
    assert tokenize(model, row)[0].token_strings == ("w4", "w5", "w6")


def test_max_tokens_cuts(model):
    assert ids(model, "w3 w4 w5 w6", max_tokens=2) == [3, 4]


def test_padding_is_on_the_right(model):
    texts = tokenize(model, ["w3 w4 w5", "w6 w7"])
    tokens, mask = pad(texts)
    assert tokens.tolist() == [[3, 4, 5], [6, 7, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("text", "kwargs", "message"),
    [
        ("", {}, "empty"),
        ("w3", {}, "1 token;"),
        ([], {}, "list of texts is empty"),
        (["w3 w4", ""], {}, "text 1 is empty"),
        (" ".join(["w3"] * 129), {}, "129 tokens and the model's context holds 128"),
        (torch.tensor([3, 64]), {}, "vocabulary has 64"),
        (torch.tensor([3, -1]), {}, "from -1"),
        (torch.tensor([3.0, 4.0]), {}, "integers"),
        (torch.zeros(2, 2, 2, dtype=torch.long), {}, r"\[2, 2, 2\]"),
        (3, {}, "from int"),
        ("w3 w4", {"max_tokens": 1}, "max_tokens must .* got 1"),
        ("w3 w4", {"max_tokens": 2.5}, "max_tokens must .* got 2.5"),
        ([3, 4.5, 5], {}, "from int"),
        ([[3, 4], [5, "w6"]], {}, "from list"),
        ({"ids": [3, 4]}, {}, "needs input_ids"),
        (b"w3 w4", {}, "from bytes"),
        ([torch.tensor([3.0, 4.0])], {}, "integers"),
        ([torch.ones(2, 3, dtype=torch.long)], {}, "integers"),
        (torch.tensor([True, False]), {}, "integers"),
        (torch.tensor([3, 4, 5]), {"attention_mask": torch.tensor([1, 0, 1])}, "between tokens"),
        (torch.tensor([3, 4, 5]), {"attention_mask": torch.tensor([0, 0, -1e9])}, "1 for tokens"),
        ("w3 w4", {"attention_mask": torch.ones(1, 2)}, "attention_mask"),
        (
            torch.ones(2, 3, dtype=torch.long),
            {"attention_mask": torch.ones(2, 2)},
            "attention_mask",
        ),
    ],
)
def test_bad_texts(model, text, kwargs, message):
    with pytest.raises(ss.InputError, match=message):
        ss.detect_sinks(model, text, progress=False, **kwargs)


def test_what_a_model_lacks(make_tiny):
    model = make_tiny("llama")
    model.tokenizer.chat_template = None
    with pytest.raises(ss.InputError, match="no chat template"):
        tokenize(model, "w3 w4", chat=True)
    model.tokenizer.bos_token = None
    with pytest.raises(ss.InputError, match="no beginning-of-sequence"):
        tokenize(model, "w3 w4", prepend_bos=True)
    assert ids(model, "w3 w4") == [3, 4], "without one, none is asked for"
    model.tokenizer = None
    with pytest.raises(ss.InputError, match="no tokenizer"):
        tokenize(model, "w3 w4")
    assert tokenize(model, torch.tensor([3, 4]))[0].token_strings == ("#3", "#4")


def test_no_transformer_lens_model():
    with pytest.raises(ss.ModelError, match="TransformerBridge or HookedTransformer"):
        ss.detect_sinks(torch.nn.Linear(2, 2), "text")


@pytest.mark.parametrize("kind", ["list", "array", "encoding", "dictionary", "tensors"])
def test_token_ids_come_as_people_have_them(model, kind):
    """One text and several, with and without padding."""
    encode = model.tokenizer
    one, several = "w3 w4 w5", ["w3 w4 w5", "w7 w8"]
    ids = {
        "list": lambda text: encode(text).input_ids,
        "array": lambda text: np.array(encode(text, padding=True).input_ids),
        "encoding": lambda text: encode(text, padding=True),
        "dictionary": lambda text: dict(encode(text)),
        "tensors": lambda text: encode(text, padding=True, return_tensors="pt"),
    }[kind]
    given = ids(one)
    assert [text.tokens.tolist() for text in tokenize(model, given)] == [[3, 4, 5]]
    found = ss.trace(model, given, [ss.ResidualNorms()])
    assert isinstance(found, ss.Trace)
    traces = ss.trace(
        model, ids(several if kind != "array" else several[:1] * 2), [ss.ResidualNorms()]
    )
    assert isinstance(traces, list)
    if kind != "array":
        assert [one.tokens.tolist() for one in traces] == [[3, 4, 5], [7, 8]]


def test_padding_that_no_mask_marks_is_warned_of(model):
    padding = model.tokenizer.pad_token_id
    for padded in ([padding, padding, 5, 6], [5, 6, padding, padding]):
        with pytest.warns(UserWarning, match="begins or ends with padding"):
            ss.trace(model, torch.tensor(padded), [ss.ResidualNorms()])
        mask = torch.tensor([token != padding for token in padded]).long()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masked = ss.trace(
                model, torch.tensor(padded)[None], [ss.ResidualNorms()], attention_mask=mask[None]
            )
        assert masked.tokens.tolist() == [5, 6]
    with pytest.raises(ss.InputError, match="two attention masks"):
        tokenize(model, model.tokenizer("w3 w4"), attention_mask=torch.ones(1, 2))
