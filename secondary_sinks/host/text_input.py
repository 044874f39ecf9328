"""Turn texts into token ids, one row for each text.

A string goes through the model's own `to_tokens`. The setting `cfg.default_prepend_bos` says
whether that puts a beginning-of-sequence token in front: `load_model` sets it to what the model was
trained with (Llama has one, Qwen and SmolLM2 do not), TransformerLens by itself nearly always
prepends one. This matters for sinks: a first token that Qwen2.5 never saw in training does not
become the primary sink; the token after it does, or none. A conversation goes through the
tokenizer's chat template, which adds its own special tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.model_info import describe

Message: TypeAlias = dict[str, str]
Conversation: TypeAlias = "Sequence[Message]"
Ids: TypeAlias = "Tensor | np.ndarray | Sequence[int] | Mapping[str, Any]"
Text: TypeAlias = "str | Ids | Conversation | Sequence[str | Tensor | Sequence[int] | Conversation]"


@dataclass(frozen=True)
class TokenizedText:
    """One text as the model reads it."""

    tokens: Int[Tensor, " token"]
    token_strings: tuple[str, ...]
    chat: bool
    """Whether the tokens come from a chat template."""

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


def bos_of(model: Any) -> int | None:
    """The id of the model's beginning-of-sequence token; None without one or without a tokenizer.

    In packed texts it begins a document wherever it stands.
    """
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    return None if bos is None else int(bos)


def plain_input(text: Any, attention_mask: Any = None) -> tuple[Any, Tensor | None]:
    """Token ids as people have them, as tensors; strings, conversations and tensors as they are.

    Accepts what a Hugging Face tokenizer returns (a `BatchEncoding` or a dictionary with
    `input_ids` and perhaps `attention_mask`), NumPy arrays, lists of ids, and lists of such lists.

    Raises:
        InputError: a dictionary without `input_ids`, or a second attention mask.
    """
    if isinstance(text, Mapping):
        if "input_ids" not in text:
            raise InputError(
                f"a dictionary of token ids needs input_ids, this one has {sorted(map(str, text))}"
            )
        if attention_mask is not None and text.get("attention_mask") is not None:
            raise InputError("two attention masks: one in the dictionary, one as an argument")
        mask = attention_mask if attention_mask is not None else text.get("attention_mask")
        ids, mask = _as_tensors(text["input_ids"]), _as_tensors(mask)
        if isinstance(ids, list) and isinstance(mask, list):  # rows of different lengths
            return [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)], None
        return ids, mask
    return _as_tensors(text), _as_tensors(attention_mask)


def _as_tensors(value: Any) -> Any:
    """Arrays and lists of integers as one tensor, or as a list of tensors if their lengths differ;
    anything else as it is."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray) or not value:
        return value
    if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        return torch.tensor(value)
    rows = [_as_tensors(row) for row in value]
    if not all(isinstance(row, Tensor) and row.ndim == 1 for row in rows):
        return value
    if any(isinstance(row, Tensor) for row in value) or len({len(row) for row in rows}) > 1:
        return rows
    return torch.stack(rows)


def warn_of_padding(texts: Sequence[TokenizedText], pad_id: int) -> None:
    """Warn of token ids that begin or end with padding which no attention mask marks."""
    for index, text in enumerate(texts):
        is_padding = text.tokens == pad_id
        if len(text) > 2 and bool(is_padding[:2].all() or is_padding[-2:].all()):
            warnings.warn(
                f"text {index} begins or ends with padding (token {pad_id}), which is read as "
                "text: pass attention_mask=, or what the tokenizer returned",
                stacklevel=4,
            )


def is_many(text: Any) -> bool:
    """Whether `text` is several texts: a list of strings or tensors, or a 2-D tensor of more than
    one row. A conversation (a list of messages) is one text."""
    if isinstance(text, Tensor):
        return text.ndim == 2 and text.shape[0] != 1
    return isinstance(text, Sequence) and not isinstance(text, str) and not _is_conversation(text)


def tokenize(
    model: Any,
    text: Text,
    *,
    chat: bool = False,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    attention_mask: Int[Tensor, " batch token"] | None = None,
) -> list[TokenizedText]:
    """Token ids and strings of every text.

    Args:
        model: a TransformerLens model.
        text: a string, a conversation (a list of messages), token ids [token] or [batch, token] (a
            tensor, an array, lists, or what a tokenizer returns: see `plain_input`), or a list of
            strings, of conversations, or of token tensors of different lengths.
        chat: wrap each string in the model's chat template as a user's message, with the
            assistant's turn opened; token ids are assumed to come from a template already.
        prepend_bos: None keeps the model's own setting, True and False override it. A string that
            already begins with the beginning-of-sequence token gets no second one.
        max_tokens: cut each text after this many tokens.
        attention_mask: for a padded token tensor, 1 for tokens and 0 for padding, which is removed
            (from either side).

    Raises:
        InputError: an empty text, a text of one token or longer than the model's context, token
            ids outside the vocabulary, or a text that needs a tokenizer, a chat template or a
            beginning-of-sequence token where the model has none.
    """
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 2):
        raise InputError(f"max_tokens must be an integer of at least 2, got {max_tokens!r}")
    text, attention_mask = plain_input(text, attention_mask)
    rows = _rows(text, attention_mask)
    if not rows:
        raise InputError("the list of texts is empty")
    info = describe(model)
    texts = []
    for index, row in enumerate(rows):
        where = f"text {index}" if len(rows) > 1 else "the text"
        ids, from_template = _ids(model, row, chat=chat, prepend_bos=prepend_bos, where=where)
        ids = ids[:max_tokens]
        _check(ids, where, n_ctx=info.n_ctx, vocabulary=int(model.cfg.d_vocab))
        texts.append(TokenizedText(ids, token_strings(model, ids), from_template))
    return texts


def token_strings(model: Any, ids: Int[Tensor, " token"]) -> tuple[str, ...]:
    """Each token decoded by itself; `#17` for token 17 without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return tuple(f"#{token}" for token in ids.tolist())
    return tuple(tokenizer.batch_decode([[token] for token in ids.tolist()]))


def pad(
    texts: Sequence[TokenizedText], pad_id: int = 0
) -> tuple[Int[Tensor, " batch token"], Int[Tensor, " batch token"]]:
    """Pad texts on the right to one tensor, with its attention mask.

    In a causal model no token reads those on its right, so right padding does not change the
    activations of the tokens before it.
    """
    length = max(len(text) for text in texts)
    tokens = torch.full((len(texts), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text.tokens
        mask[row, : len(text)] = 1
    return tokens, mask


def _rows(text: Any, attention_mask: Tensor | None) -> list[Any]:
    if isinstance(text, Tensor):
        _check_ids(text, (1, 2))
        if attention_mask is None:
            return list(text) if text.ndim == 2 else [text]
        return _without_padding(text if text.ndim == 2 else text[None], attention_mask)
    if attention_mask is not None:
        raise InputError("attention_mask needs a [batch, token] tensor of token ids")
    rows = [text] if isinstance(text, str) or _is_conversation(text) else text
    if not isinstance(rows, Sequence) or isinstance(rows, (bytes, bytearray)):
        raise InputError(f"cannot read a text from {type(text).__name__}: {_FORMS}")
    for row in rows:
        if isinstance(row, Tensor):
            _check_ids(row, (1,))
        elif not isinstance(row, str) and not _is_conversation(row):
            raise InputError(f"cannot read a text from {type(row).__name__}: {_FORMS}")
    return list(rows)


_FORMS = (
    "pass a string, a conversation (a list of messages), a tensor of token ids, or a list of one "
    "of these"
)


def _check_ids(tokens: Tensor, dimensions: tuple[int, ...]) -> None:
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if not whole or tokens.ndim not in dimensions:
        shape = "[token] or [batch, token]" if 2 in dimensions else "[token]"
        raise InputError(
            f"token ids must be integers {shape}; got {tokens.dtype} {list(tokens.shape)}"
        )


def _without_padding(tokens: Tensor, attention_mask: Any) -> list[Tensor]:
    """Each row without its padding, which may be on either side but not between tokens."""
    if not isinstance(attention_mask, Tensor) or attention_mask.numel() != tokens.numel():
        what = list(getattr(attention_mask, "shape", [])) or type(attention_mask).__name__
        raise InputError(f"attention_mask is {what}, but the tokens are {list(tokens.shape)}")
    mask = attention_mask.reshape(tokens.shape).to(tokens.device)
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError("attention_mask must be 1 for tokens and 0 for padding")
    rows = []
    for index, (row, is_token) in enumerate(zip(tokens, mask.bool(), strict=True)):
        places = is_token.nonzero().flatten()
        if len(places) and int(places[-1] - places[0]) + 1 != len(places):
            raise InputError(f"attention_mask of text {index} has padding between tokens")
        rows.append(row[is_token])
    return rows


def _ids(
    model: Any, row: Any, *, chat: bool, prepend_bos: bool | None, where: str
) -> tuple[Tensor, bool]:
    if isinstance(row, Tensor):
        return row.detach().to("cpu", torch.long), chat
    if isinstance(row, str) and not row:
        raise InputError(f"{where} is empty")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("the model has no tokenizer; pass token ids instead of a string")
    if chat or not isinstance(row, str):
        rendered = _apply_template(tokenizer, row)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids
        return torch.tensor(ids, dtype=torch.long), True
    bos = tokenizer.bos_token
    if prepend_bos and bos is None:
        raise InputError(
            "the model's tokenizer has no beginning-of-sequence token; omit prepend_bos"
        )
    if bos is None or row.startswith(bos):
        prepend_bos = False
    # truncate=False: a text that is too long raises below instead of being cut.
    settings = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    return model.to_tokens(row, truncate=False, **settings)[0].to("cpu", torch.long), False


def _apply_template(tokenizer: Any, row: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the model's tokenizer has no chat template; pass plain text (chat=False)")
    messages = [{"role": "user", "content": row}] if isinstance(row, str) else list(row)
    opened = messages[-1].get("role") != "assistant"
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    )


def _check(ids: Tensor, where: str, *, n_ctx: int | None, vocabulary: int) -> None:
    if len(ids) < 2:
        raise InputError(
            f"{where} has {len(ids)} token{'' if len(ids) == 1 else 's'}; a sink is a token that "
            "later tokens attend to, so at least 2 are needed"
        )
    if n_ctx is not None and len(ids) > n_ctx:
        raise InputError(
            f"{where} has {len(ids)} tokens and the model's context holds {n_ctx}; cut the text, "
            f"for example with max_tokens={n_ctx}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InputError(
            f"{where} has token ids from {int(ids.min())} to {int(ids.max())}, the model's "
            f"vocabulary has {vocabulary}"
        )


def _is_conversation(text: Any) -> bool:
    return (
        isinstance(text, Sequence)
        and not isinstance(text, str)
        and len(text) > 0
        and isinstance(text[0], dict)
    )
