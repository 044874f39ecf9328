"""The bundled texts: what the set promises, sampling, and the way through the command line."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
from typer.testing import CliRunner

import secondary_sinks as ss
from secondary_sinks.cli.app import app
from secondary_sinks.cli.inputs import read_sources
from secondary_sinks.host.text_input import tokenize
from secondary_sinks.texts import KINDS, BundledText


def parts(text: BundledText) -> list[str]:
    """The strings of a text: one, or one a message."""
    if isinstance(text.content, str):
        return [text.content]
    return [message["content"] for message in text.content]


def paragraphs(text: BundledText) -> set[str]:
    pieces = (piece for part in parts(text) for piece in re.split(r"\n\s*\n", part))
    return {" ".join(piece.split()) for piece in pieces if piece.strip()}


def test_every_kind_has_its_texts() -> None:
    texts = ss.bundled_texts()
    counts = Counter(text.kind for text in texts)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 7
    assert 66 <= len(texts) <= 72
    assert len({text.id for text in texts}) == len(texts)
    assert all(text.id.startswith(f"{text.kind}-") for text in texts)
    assert all(text.is_chat == (text.kind == "chat") for text in texts)
    assert len({text.language for text in texts if text.kind == "multilingual"}) >= 12
    assert len({text.language for text in texts if text.kind == "code"}) >= 8


def test_no_two_texts_share_a_paragraph_or_their_first_word() -> None:
    texts = ss.bundled_texts()
    shared = Counter(piece for text in texts for piece in paragraphs(text))
    assert not [piece for piece, count in shared.items() if count > 1]
    openings = Counter(parts(text)[0].split()[0].lower() for text in texts)
    assert not [word for word, count in openings.items() if count > 1]


def test_texts_are_clean() -> None:
    for text in ss.bundled_texts():
        for part in parts(text):
            assert part == part.strip()
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ufffd\ufeff\u2028\u2029]", part), text.id


def test_chats_alternate_and_most_bring_their_own_system_prompt() -> None:
    chats = ss.bundled_texts("chat")
    # A template fills in the same default for all others, and its sinks would count many times.
    assert sum(text.content[0]["role"] != "system" for text in chats) <= 2  # type: ignore[index]
    for text in chats:
        assert not isinstance(text.content, str)
        roles = [message["role"] for message in text.content]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)
        assert len(turns) >= 4
        assert all(set(message) == {"role", "content"} for message in text.content)


@pytest.mark.parametrize("name", ["qwen", "smollm"])
def test_lengths_in_tokens(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    texts = ss.bundled_texts()
    lengths = [len(tokenize(model, text.content)[0]) for text in texts]
    outside = {text.id: n for text, n in zip(texts, lengths, strict=True) if not 200 <= n <= 1500}
    assert not outside
    assert sum(n > 900 for n in lengths) >= 5
    assert 350 <= sorted(lengths)[len(lengths) // 2] <= 460


def test_every_content_is_one_text_for_detect_sinks(smollm: Any) -> None:
    chat, plain = ss.bundled_texts("chat")[0], ss.bundled_texts("plain")[0]
    sinks = ss.detect_sinks(smollm, chat.content, max_tokens=64)
    assert isinstance(sinks, ss.SinkMap)
    assert sinks.primary
    both = ss.detect_sinks(smollm, [chat.content, plain.content], max_tokens=64)
    assert [found.n_tokens for found in both] == [64, 64]
    assert both[0].tokens.equal(sinks.tokens)
    assert plain.content.startswith(both[1].token_strings[0])


def test_a_sample_is_balanced_reproducible_and_nested() -> None:
    everything = ss.bundled_texts()
    for n in (1, 5, 8, 20, 56, len(everything)):
        sample = ss.bundled_texts(n=n, seed=3)
        assert sample == ss.bundled_texts(n=n, seed=3)
        assert len(sample) == n == len({text.id for text in sample})
        assert sample == [text for text in everything if text in sample]
        counts = [sum(text.kind == kind for text in sample) for kind in KINDS]
        assert n == len(everything) or max(counts) - min(counts) <= 1
    ids = [{text.id for text in ss.bundled_texts(n=n, seed=3)} for n in (4, 16, 40)]
    assert ids[0] < ids[1] < ids[2]
    samples = {tuple(t.id for t in ss.bundled_texts(n=16, seed=seed)) for seed in range(20)}
    assert len(samples) == 20


def test_kinds_can_be_chosen() -> None:
    assert ss.bundled_texts("code") == ss.bundled_texts(["code"])
    two = ss.bundled_texts(["tables", "lists"])
    assert {text.kind for text in two} == {"lists", "tables"}
    assert Counter(t.kind for t in ss.bundled_texts(["tables", "lists"], n=6)) == {
        "lists": 3,
        "tables": 3,
    }


@pytest.mark.parametrize(
    ("kinds", "n", "message"),
    [
        ("essays", None, "no kind 'essays'"),
        (["prose", 3], None, "no kind 3"),
        ([], None, "no kinds given"),
        (None, 0, "n is 0"),
        (None, 73, "have 72 texts"),
        ("prose", 10, "have 9 texts"),
        (None, 2.0, "n is 2.0"),
        (None, True, "n is True"),
    ],
)
def test_what_cannot_be_drawn_is_refused(kinds: Any, n: Any, message: str) -> None:
    with pytest.raises(ss.InputError, match=message):
        ss.bundled_texts(kinds, n=n)


def test_a_caller_can_change_what_it_got() -> None:
    before = ss.bundled_texts("chat")
    ss.bundled_texts("chat")[0].content[0]["content"] = "something else"  # type: ignore[index]
    assert ss.bundled_texts("chat") == before


def test_command_line_writes_what_detect_reads(tmp_path) -> None:
    path = tmp_path / "folder" / "texts.jsonl"
    result = CliRunner().invoke(app, ["texts", "--out", str(path)])
    assert result.exit_code == 0, result.output
    texts = ss.bundled_texts()
    sources = read_sources(None, None, path)
    assert [source.messages or source.text for source in sources] == [t.content for t in texts]
    assert all(text.id in result.stdout for text in texts)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(r["id"], r["kind"], r["language"]) for r in records] == [
        (text.id, text.kind, text.language) for text in texts
    ]


def test_command_line_chooses_and_refuses(tmp_path) -> None:
    run = CliRunner().invoke
    chosen = run(app, ["texts", "--kind", "prose", "--kind", "code", "--n", "6", "--seed", "1"])
    ids = [line.split()[0] for line in chosen.stdout.splitlines()[1:]]
    assert ids == [text.id for text in ss.bundled_texts(["prose", "code"], n=6, seed=1)]
    for arguments in (["--kind", "essays"], ["--n", "73"]):
        result = run(app, ["texts", *arguments])
        assert result.exit_code == 2
        assert "Traceback" not in result.output
    (tmp_path / "file").write_text("")
    result = run(app, ["texts", "--out", str(tmp_path / "file" / "texts.jsonl")])
    assert result.exit_code == 2
    assert "cannot write" in result.output
    result = run(app, ["texts", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a folder" in result.output
