"""Read a model's own tokenizer, and protect it from changes.

A sink is a token, so a tokenizer that splits a text differently measures another text. Two
libraries change tokens silently. transformers picks the tokenizer class of some models by the
model type alone (every Qwen2 model gets Qwen2's rules, although the distilled DeepSeek-R1 models,
which are of that type, have other rules). TransformerLens replaces a tokenizer by one that puts a
BOS token before every text, even for a model that was never trained with one (GPT-2, SmolLM2).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secondary_sinks.errors import LoadError
from secondary_sinks.loading.convert import RECORD
from secondary_sinks.loading.messages import one_line

# Cases on which the rules of tokenizers differ: contractions, digits, spaces, line ends, code,
# accents in two normal forms, and scripts without spaces.
_PROBE = "The cat's 12345 naïve nai\u0308ve cafés:\n\n  x_1 = f(a);\t// 数学 θ² …\r\n A. the"


def read_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """Read the tokenizer of a folder or hub id.

    Where the class that transformers picks splits a text differently from the model's own
    `tokenizer.json`, the file is used, with a warning. In a folder that `convert` wrote the file is
    the right tokenizer, so no class is tried.

    Args:
        source: Folder or hub id.
        options: Further arguments of `from_pretrained` (revision, local_files_only, ...).

    Raises:
        LoadError: transformers finds no tokenizer that it can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (Path(source) / RECORD).is_file():
            return _read_converted(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if _follows_its_file(tokenizer, source, options):
            return tokenizer
        from_file = PreTrainedTokenizerFast.from_pretrained(source, **options)
    except Exception as error:
        # The failures are of many types: OSError, ValueError, a TypeError on a missing file, ...
        raise LoadError(
            f"{source} has no tokenizer that transformers can read (tokenizer.json and "
            f"tokenizer_config.json): {one_line(error)}. Copy these files there, or pass "
            "tokenizer=AutoTokenizer.from_pretrained(...) with the tokenizer that the model was "
            "trained with."
        ) from error
    # Settings in tokenizer_config.json, such as add_bos_token, may overrule the file. Only a
    # difference that remains with the same settings comes from the class.
    if from_file(_PROBE).input_ids == tokenizer(_PROBE).input_ids:
        return tokenizer
    warnings.warn(
        f"transformers' {type(tokenizer).__name__} splits text differently from the tokenizer.json "
        f"of {source}. The file is used; pass tokenizer= to use another tokenizer.",
        stacklevel=4,
    )
    return from_file


def _read_converted(folder: Path) -> Any:
    """The tokenizer of a folder that `convert` wrote.

    `from_pretrained` gives the same one, but parses the file twice and copies every added token:
    with the 262,144 words of Gemma 3 it takes twice as long.
    """
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for decided_by_the_file in ("tokenizer_class", "add_bos_token", "add_eos_token"):
        settings.pop(decided_by_the_file, None)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), name_or_path=str(folder), **settings
    )


def _follows_its_file(tokenizer: Any, source: str, options: dict[str, Any]) -> bool:
    """Whether the probe gets the tokens that `tokenizer.json` gives; True if there is no file."""
    from tokenizers import Tokenizer
    from transformers.utils.hub import cached_file

    if not tokenizer.is_fast or type(tokenizer).__name__ == "TokenizersBackend":
        return True  # has no such file, or was read from it without changes
    location = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    path = cached_file(
        source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **location
    )
    if path is None:
        return True
    return bool(Tokenizer.from_file(path).encode(_PROBE).ids == tokenizer(_PROBE).input_ids)


@contextmanager
def unchanged_tokenizer(tokenizer: Any) -> Iterator[None]:
    """Keep TransformerLens from replacing `tokenizer` in the block.

    TransformerLens loads a second tokenizer, by name, with `add_bos_token=True`, unless the init
    arguments of the first already have it. They are set in the block, which changes no token, and
    restored afterwards.
    """
    init_arguments = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path)
    tokenizer.init_kwargs["add_bos_token"] = True
    try:
        yield
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(init_arguments)
