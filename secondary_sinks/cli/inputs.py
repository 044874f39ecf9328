"""The texts that a command line is given, read and checked before a model is loaded.

Loading a model takes seconds to minutes, so every mistake that can be seen without one is looked
for here: a missing file, a line that is not JSON, a record without a text. What only the model can
tell (a text above its context length, a tokenizer without chat template) waits for it.

Nothing outside the standard library is imported at the top: `secondary-sinks --help` reads this.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secondary_sinks.errors import InputError


@dataclass(frozen=True)
class Source:
    """One text as it was given: a text, a conversation, or a prompt with its output."""

    name: str
    """How the text is called in tables and file names."""
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    output: str | None = None


def read_sources(text: str | None, file: Path | None, jsonl: Path | None) -> list[Source]:
    """The texts of exactly one of the three inputs.

    Raises:
        InputError: none or several inputs; a file that cannot be read or is empty; a line of the
            JSONL file that holds no text, with its number.
    """
    given = [value is not None for value in (text, file, jsonl)]
    if sum(given) != 1:
        what = "none" if not any(given) else "several"
        raise InputError(f"give one of --text, --file and --jsonl; {what} was given")
    if jsonl is not None:
        return _read_jsonl(jsonl)
    if file is not None:
        text = _read_text(file)
    if not text:
        raise InputError(f"{'the text' if file is None else file} is empty")
    return [Source("sinks", text=text)]


def as_model_input(model: Any, source: Source, *, chat: bool) -> tuple[Any, int | None]:
    """What `detect_sinks` is given for a text, and the number of tokens that are prompt.

    A prompt with its output is put together as the reference implementation does it: rendered by
    the chat template with the assistant's turn opened and the output behind it (`chat`), or simply
    joined. The second value is None for anything else, which is all prompt.

    Raises:
        InputError: the model lacks a tokenizer or chat template.
    """
    if source.prompt is None:
        return (source.text if source.messages is None else list(source.messages)), None
    import torch

    from secondary_sinks.host.text_input import tokenize

    output = source.output or ""
    if not chat:
        tokens = tokenize(model, source.prompt + output)[0].tokens
        behind = _count(model, source.prompt + output) - _count(model, source.prompt)
        return tokens, len(tokens) - max(behind, 0)
    prompt = tokenize(model, source.prompt, chat=True)[0]
    rendered = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": source.prompt}], tokenize=False, add_generation_prompt=True
    )
    # Tokenized as one string, as the reference does, so that tokens may reach over the border.
    ids = model.tokenizer(rendered + output, add_special_tokens=False).input_ids
    return torch.tensor(ids, dtype=torch.long), len(prompt)


def _count(model: Any, text: str) -> int:
    return len(model.tokenizer(text, add_special_tokens=False).input_ids)


def _read_text(path: Path) -> str:
    try:
        if str(path) == "-":
            return sys.stdin.read()
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error


def _read_jsonl(path: Path) -> list[Source]:
    sources = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        try:
            sources.append(_source(f"text-{number:04d}", entry))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not sources:
        raise InputError(f"{path} has no texts: it is empty")
    return sources


def _source(name: str, entry: Any) -> Source:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict):
        raise InputError(f"neither a string nor an object but {type(entry).__name__}")
    if "messages" in entry:
        return Source(name, messages=_messages(entry["messages"]))
    if "text" in entry:
        return Source(name, text=_string(entry, "text"))
    if "prompt" in entry and "output" in entry:
        return Source(name, prompt=_string(entry, "prompt"), output=_string(entry, "output"))
    keys = ", ".join(sorted(map(str, entry))[:6]) or "nothing"
    raise InputError(f"an object needs text, or messages, or prompt and output; this has {keys}")


def _string(entry: dict[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value:
        raise InputError(f"{key} must be a string that is not empty")
    return value


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    is_list = isinstance(value, list) and value
    if not is_list or not all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in value
    ):
        raise InputError("messages must be a list of objects with role and content")
    return tuple(value)
