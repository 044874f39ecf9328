"""Seventy-two bundled texts, so that statistics over many texts need no data set.

>>> import secondary_sinks as ss
>>> model = ss.load_model("smollm2-135m")
>>> texts = ss.bundled_texts(n=16)
>>> sink_maps = ss.detect_sinks(model, [text.content for text in texts])

The texts are of eight kinds (chats, mathematics, prose, code, lists, tables, several languages, and
plain documents such as letters and articles), written for this project and under its license. They
differ in how they begin, how they are punctuated and how long they are, since first tokens and
delimiters tend to become sinks; no two share a paragraph. In the tokenizers of Qwen2.5 and SmolLM2
each has between 200 and 1,500 tokens, chats with their template.

Not evidence for: rates over language. The set is small, mostly English, and by one author; a
difference between two of its kinds rests on about ten texts of each. To describe a model's usual
input, use that input.

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
    """Its kind and a number, such as `prose-03`; stable across versions."""
    kind: str
    """One of `chat`, `mathematics`, `prose`, `code`, `lists`, `tables`, `multilingual`, `plain`."""
    language: str
    """ISO 639-1 code of its language; for code the name of the programming language."""
    content: str | tuple[dict[str, str], ...]
    """The text, or the messages of a chat, with role and content, as `detect_sinks` and `trace`
    take them. Messages always go through the model's chat template; with `chat=True` every other
    text would become a user's message as well."""

    @property
    def is_chat(self) -> bool:
        """Whether the content is a chat, which needs a model with a chat template."""
        return not isinstance(self.content, str)

    @property
    def n_characters(self) -> int:
        """Length of the text, or of all messages of a chat."""
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

    >>> ss.bundled_texts(["prose", "plain"], n=8)

    Not evidence for: rates over language (see the module).

    Args:
        kinds: one or several of `KINDS`; by default all. Leave out `chat` for a model without a
            chat template.
        n: how many, drawn without replacement; by default all. The kinds have equal numbers of
            texts, up to one, as long as they last. With the same seed and kinds a larger sample
            contains every smaller one.
        seed: of the draw.

    Returns:
        The texts, in the order of the set.

    Raises:
        InputError: an unknown kind, no kinds, or n below 1 or above the number of texts.
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
    """All ids in the order in which they are drawn: in rounds of one of every kind."""
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
    """All texts. Read again each time, since messages are dictionaries that a caller may change."""
    from importlib.resources import files

    bundled = files("secondary_sinks") / "data" / "texts.jsonl"
    # splitlines() would also break at characters that JSON allows within a string.
    lines = bundled.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [_text(json.loads(line)) for line in lines]


def _text(entry: dict[str, Any]) -> BundledText:
    content = tuple(entry["messages"]) if "messages" in entry else entry["text"]
    return BundledText(entry["id"], entry["kind"], entry["language"], content)
