"""Read a model's own tokenizer, and keep it as it is.

A sink is a token, so a tokenizer that cuts a text differently measures another text. Two things
change tokens silently. transformers picks the tokenizer class of some model types by the type
alone (any Qwen2 model gets Qwen2's rules, though the distilled DeepSeek-R1 models, which are of
that type, come with rules of their own). And TransformerLens replaces a tokenizer by one that
puts a BOS token before every text, also where the model never saw one (GPT-2, SmolLM2).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from secondary_sinks.errors import LoadError
from secondary_sinks.loading.convert import one_line

# Cases on which tokenizers' rules differ: contractions, digits, spaces, line ends, code, accents
# in two normal forms, and scripts without spaces.
_PROBE = "The cat's 12345 naïve nai\u0308ve cafés:\n\n  x_1 = f(a);\t// 数学 θ² …\r\n A. the"


def read_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """The tokenizer of a folder or hub id.

    Where transformers' choice of class tokenises otherwise than the model's own `tokenizer.json`,
    the file is believed, with a warning.

    Args:
        source: Folder or hub id.
        options: What else `from_pretrained` is to be told (revision, local_files_only, ...).

    Raises:
        LoadError: transformers finds no tokenizer that it can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if _follows_its_file(tokenizer, source, options):
            return tokenizer
        literal = PreTrainedTokenizerFast.from_pretrained(source, **options)
    except Exception as error:
        # The failures are of many types: OSError, ValueError, a TypeError on a missing file, ...
        raise LoadError(
            f"{source} has no tokenizer that transformers can read (tokenizer.json and "
            f"tokenizer_config.json): {one_line(error)}. Copy these files there, or pass "
            "tokenizer=AutoTokenizer.from_pretrained(...) with the tokenizer that the model was "
            "trained with."
        ) from error
    # Settings of tokenizer_config.json, such as add_bos_token, may rightly overrule the file: only
    # a difference that is left with the same settings comes from the class.
    if literal(_PROBE).input_ids == tokenizer(_PROBE).input_ids:
        return tokenizer
    warnings.warn(
        f"transformers' {type(tokenizer).__name__} tokenises otherwise than the tokenizer.json of "
        f"{source}; the file is followed. Pass tokenizer= to decide otherwise.",
        stacklevel=5,
    )
    return literal


def _follows_its_file(tokenizer: Any, source: str, options: dict[str, Any]) -> bool:
    """Whether the probe gets the tokens that `tokenizer.json` gives; True if there is no file."""
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    if not tokenizer.is_fast or type(tokenizer).__name__ == "TokenizersBackend":
        return True  # no such file, or read from it as it is
    where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    path = cached_file(
        source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **where
    )
    if path is None:
        return True
    return bool(Tokenizer.from_file(path).encode(_PROBE).ids == tokenizer(_PROBE).input_ids)


@contextmanager
def kept_as_it_is(tokenizer: Any) -> Iterator[None]:
    """Within the block TransformerLens takes the tokenizer as it is.

    It would otherwise load a second one, by name, with `add_bos_token=True`. A mark that this has
    been done stops it, without changing a single token.
    """
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path)
    tokenizer.init_kwargs["add_bos_token"] = True
    try:
        yield
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(before)
