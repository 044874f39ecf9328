"""Seventy-two bundled texts, so that a number over many texts can be had at once.

>>> import secondary_sinks as ss
>>> model = ss.load_model("smollm2-135m")
>>> texts = ss.bundled_texts(n=16)
>>> maps = ss.detect_sinks(model, [text.content for text in texts])

What it is: texts of eight kinds (chats, mathematics, prose, code, lists, tables, several languages,
and plain documents such as letters and articles), written for this project and under its license.
They differ in how they begin, how they are punctuated and how long they are, since first tokens and
delimiters are what becomes a sink; no two share a paragraph. In the tokenizers of
Qwen2.5 and SmolLM2 each has between 200 and 1,500 tokens, chats with their template.

What it is not: a sample of anything. It is small, mostly English, and of one hand. A rate over
it is a rate over it, not over language; differences between its kinds can be differences between a
dozen texts. To say something about a model's usual input, use the model's usual input.

Nothing outside the standard library is imported: `secondary-sinks --help` reads this.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secondary_sinks.errors import InputError

KINDS = (
    "chat",
    "mathematics",
    "prose",
    "code",
    "lists",
    "tables",
    "multilingual",
    "plain",
)


@dataclass(frozen=True)
class BundledText:
    """One text of the bundled set."""

    id: str
    """Its kind and a number, such as `prose-03`; stays the same in later versions."""
    kind: str
    """One of `chat`, `mathematics`, `prose`, `code`, `lists`, `tables`, `multilingual`, `plain`."""
    language: str
    """ISO 639-1 code of its language; for code the name of the programming language."""
    content: str | tuple[dict[str, str], ...]
    """The text, or the messages of a chat, with role and content: what `detect_sinks`, `trace` and
    the other questions take as a text. Messages go through the model's chat template by themselves;
    `chat=True` would present every other text as a user's message as well."""

    @property
    def is_chat(self) -> bool:
        """Whether the content is a conversation, which needs a model with a chat template."""
        return not isinstance(self.content, str)

    @property
    def n_characters(self) -> int:
        """Length of the text, or of all messages of a chat together."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message["content"]) for message in self.content)

    def to_json(self) -> str:
        """One line of the format that `secondary-sinks detect --jsonl` reads."""
        content: dict[str, Any] = (
            {"text": self.content}
            if isinstance(self.content, str)
            else {"messages": list(self.content)}
        )
        head = {"id": self.id, "kind": self.kind, "language": self.language}
        return json.dumps(head | content, ensure_ascii=False)

    def __repr__(self) -> str:
        return f"BundledText({self.id!r}, {self.language!r}, {self.n_characters} characters)"


def bundled_texts(
    kinds: str | Sequence[str] | None = None, *, n: int | None = None, seed: int = 0
) -> list[BundledText]:
    """The bundled texts: all, those of some kinds, or a sample that is balanced over kinds.

    The set was written for this project: small, mostly English, of one hand. A rate over it is
    a rate over it, and no estimate of a rate over language.

    Args:
        kinds: which kinds of text, one or several of `chat`, `mathematics`, `prose`, `code`,
            `lists`, `tables`, `multilingual` and `plain`; by default all. Leave out `chat` for a
            model without a chat template.
        n: how many, drawn without replacement; by default all. Numbers of texts of two kinds differ
            by at most one, unless a kind has no more. With the same seed and kinds a larger sample
            contains every smaller one.
        seed: which sample.

    Returns:
        The texts, in the order of the set.

    Raises:
        InputError: a kind that there is not, no kinds, or n below 1 or above the number of texts.
    """
    wanted = _checked_kinds(kinds)
    texts = [text for text in _read() if text.kind in wanted]
    if n is None:
        return texts
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= len(texts):
        raise InputError(f"n is {n!r}; these kinds have {len(texts)} texts, so take 1 to that many")
    drawn = set(_dealt(texts, seed)[:n])
    return [text for text in texts if text.id in drawn]


def _checked_kinds(kinds: str | Sequence[str] | None) -> tuple[str, ...]:
    if kinds is None:
        return KINDS
    wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        what = f"no kind {unknown[0]!r} of text" if unknown else "no kinds given"
        raise InputError(f"{what}; there are {', '.join(KINDS)}")
    return wanted


def _dealt(texts: Sequence[BundledText], seed: int) -> list[str]:
    """All ids in the order in which they are drawn: in rounds, in each round one of every kind."""
    draw = random.Random(seed)
    piles: dict[str, list[str]] = {}
    for text in texts:
        piles.setdefault(text.kind, []).append(text.id)
    for pile in piles.values():
        draw.shuffle(pile)
    order = []
    while piles:
        for kind in draw.sample(sorted(piles), len(piles)):
            order.append(piles[kind].pop())
        piles = {kind: pile for kind, pile in piles.items() if pile}
    return order


def _read() -> list[BundledText]:
    """All texts. Read anew each time: messages are dictionaries, which a caller may change."""
    from importlib.resources import files

    bundled = files("secondary_sinks") / "data" / "texts.jsonl"
    # Not by splitlines, which also breaks at signs that JSON may hold within a string.
    lines = bundled.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [_text(json.loads(line)) for line in lines]


def _text(entry: dict[str, Any]) -> BundledText:
    content = tuple(entry["messages"]) if "messages" in entry else entry["text"]
    return BundledText(entry["id"], entry["kind"], entry["language"], content)
