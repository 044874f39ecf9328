"""Tiny random models of many families, and the real models, for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.sinks.criterion import DEFAULTS
from secondary_sinks.sinks.sink import Evidence, Sink
from secondary_sinks.sinks.sink_map import SinkMap

REAL_MODELS = {"qwen", "smollm", "gemma"}
FAST_FAMILY = "llama"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help=f"the first case of every test, of model families only {FAST_FAMILY}, without real "
        "models and without what is marked slow",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    seen: set[tuple[str, str]] = set()

    def is_fast(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        values = {} if call is None else call.params
        families = {values[name] for name in ("family", "streamed_family") if name in values}
        name = (item.nodeid.split("::")[0], getattr(item, "originalname", item.name))
        if (
            name in seen
            or REAL_MODELS & {*getattr(item, "fixturenames", ()), *map(str, values.values())}
            or item.get_closest_marker("slow") is not None
            or not families <= {FAST_FAMILY}
        ):
            return False
        seen.add(name)
        return True

    fast = [item for item in items if is_fast(item)]
    left_out = [item for item in items if item not in set(fast)]
    items[:] = fast
    config.hook.pytest_deselected(items=left_out)


SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
LLAMA_LIKE = SIZE | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WINDOW = {"sliding_window": 8}

# Family -> (configuration class, its arguments). Windows are shorter than the texts of the tests.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 128},
    ),
    "neox": ("GPTNeoXConfig", SIZE | {"intermediate_size": 64, "max_position_embeddings": 128}),
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", LLAMA_LIKE | {"head_dim": 8}),
    "mistral": ("MistralConfig", LLAMA_LIKE | WINDOW),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | WINDOW | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | WINDOW | {"head_dim": 8}),
    "phi3": ("Phi3Config", LLAMA_LIKE | {"pad_token_id": 0}),
    "olmo2": ("Olmo2Config", LLAMA_LIKE),
    "gpt-oss": (
        "GptOssConfig",
        LLAMA_LIKE | WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4}),
}

OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 128}

# Scores that cannot be edited, or positions that follow the sequence index.
UNMASKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJConfig", OLD | {"rotary_dim": 4}),
    "opt": (
        "OPTConfig",
        SIZE | {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    ),
    "gpt-neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 128,
            "window_size": 8,
            "attention_types": [[["global", "local", "global"], 1]],
            "intermediate_size": 48,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}),
    "mpt": (
        "MptConfig",
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 64, "max_seq_len": 128},
    ),
    "llama4": (
        "Llama4TextConfig",
        LLAMA_LIKE
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "pad_token_id": 0}
        | {"num_experts_per_tok": 1, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1]},
    ),
    "falcon-alibi": (
        "FalconConfig",
        SIZE
        | {"alibi": True, "new_decoder_architecture": False}
        | {"multi_query": False, "parallel_attn": False},
    ),
}

# Attention of its own kind in the bridge, or of an old kind in Hugging Face's model.
OTHER_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "GraniteConfig",
        LLAMA_LIKE | {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    ),
    "smollm3": ("SmolLM3Config", LLAMA_LIKE | {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "cohere2": (
        "Cohere2Config",
        LLAMA_LIKE
        | WINDOW
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
} | {kind: UNMASKABLE[kind] for kind in ("opt", "gptj", "gpt-neo", "bloom")}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Layers that differ from each other, latent attention, and no attention at all.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": (
        "Qwen3NextConfig",
        LLAMA_LIKE
        | EXPERTS
        | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
        | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "lfm2": ("Lfm2Config", LLAMA_LIKE | {"layer_types": ["conv", "full_attention", "conv"]}),
    "jamba": (
        "JambaConfig",
        LLAMA_LIKE
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2}
        | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "granite4": (
        "GraniteMoeHybridConfig",
        LLAMA_LIKE
        | {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"}
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_chunk_size": 8},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        LLAMA_LIKE
        | WINDOW
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 16}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64},
    ),
}
LATENT = {
    "deepseek": (
        "DeepseekV3Config",
        SIZE
        | {"num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 128}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 4, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 3},
    ),
}
WITHOUT_ATTENTION = {
    "mamba": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 4}
        | {"time_step_rank": 4},
    ),
}


WINDOWED = {
    "mistral": (True, True, True),
    "gemma2": (True, False, True),
    "gemma3": (True, True, True),
    "gpt-oss": (True, False, True),
    "cohere2": (True, False, True),
    "gpt-neo": (False, True, False),
}
"""Family -> which of its layers have a window of 8 keys; other families have none."""


def _visible_keys(family: str, n_tokens: int) -> torch.Tensor:
    query, key = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)
    full = key <= query
    window = full & (query - key < WINDOW["sliding_window"])
    kinds = WINDOWED.get(family, (False, False, False))
    return torch.stack([window if has_window else full for has_window in kinds])


@pytest.fixture(scope="session")
def visible_keys() -> Callable[[str, int], torch.Tensor]:
    """Family, number of tokens -> which keys each query sees, [layer, query, key]."""
    return _visible_keys


def build_hf(family: str, seed: int = 0) -> Any:
    """A tiny Hugging Face model of `family` with random weights, larger than the usual
    initialization so that attention is not uniform."""
    import transformers

    kinds = FAMILIES | UNMASKABLE | OTHER_ATTENTION | HYBRIDS | LATENT | WITHOUT_ATTENTION
    name, arguments = kinds[family]
    token_ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, name)(**(token_ids | arguments))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    torch.random.set_rng_state(state)
    model.config.architectures = [type(model).__name__]
    return model.float().eval()


def build_tokenizer(size: int = 64) -> Any:
    """A tokenizer of `size` words ("w0" ... ), one token each, with no special tokens added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{n}": n for n in range(3, size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        name_or_path="tiny",
    )


def bridge(hf: Any) -> Any:
    """A Hugging Face model in a TransformerBridge, with raw weights."""
    import secondary_sinks as ss

    return ss.load_model(hf, tokenizer=build_tokenizer(), progress=False)


@functools.cache
def _tiny(family: str) -> Any:
    return bridge(build_hf(family))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    """Family name -> tiny random model in a bridge, made once."""
    return _tiny


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Any]:
    """Family name -> a tiny model of one's own, to be changed at will."""
    return lambda family, seed=0: bridge(build_hf(family, seed))


@pytest.fixture(scope="session")
def hf_model() -> Callable[..., Any]:
    """Family name -> a tiny Hugging Face model."""
    return build_hf


@pytest.fixture(scope="session")
def wrap() -> Callable[[Any], Any]:
    """A tiny Hugging Face model -> its bridge, which takes it over in place."""
    return bridge


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(params=[*FAMILIES, *OTHER_ATTENTION])
def streamed_family(request: pytest.FixtureRequest) -> str:
    """Each family whose attention can be streamed in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def qwen() -> Any:
    """Qwen2.5-Coder-0.5B-Instruct, from the package index or the cache."""
    import secondary_sinks as ss

    return ss.load_model("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def smollm() -> Any:
    """SmolLM2-135M-Instruct, from the package index or the cache."""
    import secondary_sinks as ss

    return ss.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma() -> Any:
    """Gemma-3-270M, from the package index or the cache."""
    import secondary_sinks as ss

    return ss.load_model("gemma3-270m")


def random_tokens(n: int, *, rows: int | None = None, seed: int = 0) -> torch.Tensor:
    """Random token ids of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if rows is None else (rows, n)
    return torch.randint(3, 64, shape, generator=generator)


@pytest.fixture(scope="session")
def tokens_of() -> Callable[..., torch.Tensor]:
    """Random token ids of the tiny models."""
    return random_tokens


TOKENS = ("\n", " you", "。你", "$x$", "\\times", " internationalization")


def _invented(
    n_secondary: int,
    n_tokens: int = 400,
    *,
    n_layers: int = 24,
    primary_lives: tuple[tuple[int, int], ...] = ((2, 22),),
) -> SinkMap:
    generator = torch.Generator().manual_seed(n_secondary)
    shape = (n_layers, n_tokens)
    norm = 8 + 4 * torch.rand(shape, generator=generator)
    ratio = 0.5 + torch.rand(shape, generator=generator)
    score = torch.rand(n_layers, 2, n_tokens, generator=generator) / n_tokens
    alignment = torch.rand(shape, generator=generator) * 0.3
    places = torch.randperm(n_tokens - 20, generator=generator)[:n_secondary].sort().values + 2
    lives = [(0, start, end) for start, end in primary_lives]
    lives += [(position, 8, 18) for position in places.tolist()]
    sinks = []
    for position, start, end in lives:
        norm[start:end, position] = 1000.0 if position == 0 else 200.0
        score[start + 1 : end + 1, :, position] = 0.3 if position == 0 else 0.05
        ratio[start + 1 : end + 1, position] = 40.0
        alignment[start:end, position] = 0.98
        layers = tuple(range(start, end))
        n = len(layers)
        evidence = Evidence(
            alignment=(0.98,) * n,
            centered_alignment=(0.98,) * n,
            norm=(200.0,) * n,
            norm_ratio=(20.0,) * n,
            centered_norm_ratio=(22.0,) * n,
            sink_score=(0.05,) * n,
            attention_ratio=40.0,
            strength=2.0,
            n_queries=100,
            delay=start - primary_lives[0][0],
            published_kind="primary" if position == 0 else "secondary",
        )
        kind = "primary" if position == 0 else "secondary"
        sinks.append(Sink(position, TOKENS[position % 6], 5 + position, kind, layers, evidence))
    score[:, :, -8:] = torch.nan
    return SinkMap(
        tokens=torch.zeros(n_tokens, dtype=torch.long),
        token_strings=tuple(TOKENS[index % 6] for index in range(n_tokens)),
        n_tokens=n_tokens,
        provenance=Provenance(
            ModelInfo("an $invented$ model", n_layers=n_layers),
            thresholds=dict(DEFAULTS),
        ),
        criterion="evidence",
        primary_position=0,
        phases=primary_lives,
        sinks=tuple(sinks),
        alignment=alignment,
        centered_alignment=alignment,
        norm=norm,
        centered_norm=norm,
        background_norm=norm.median(dim=1).values,
        background_centered_norm=norm.median(dim=1).values,
        mean_attention=score,
        uniform_attention=torch.full(shape, 1 / n_tokens),
        attention_ratio=ratio,
        strength=ratio / 20,
    )


@pytest.fixture(scope="session")
def invented() -> Callable[..., SinkMap]:
    """Number of secondary sinks, length -> a map with them at random positions.

    All have onset 8 and lifetime 10; their tokens are hard to draw.
    """
    return _invented


@pytest.fixture
def published() -> SinkMap:
    """A map as `read_published` makes it: sinks, no arrays; one lives in separate layers."""
    return SinkMap(
        tokens=None,
        token_strings=(),
        n_tokens=1390,
        provenance=Provenance(ModelInfo("published")),
        criterion="published",
        primary_position=0,
        phases=((6, 35),),
        sinks=(
            Sink(0, "#1", 1, "primary", tuple(range(6, 35))),
            Sink(589, "#220", 220, "secondary", (16, 17, 18, 21, 22)),
        ),
    )
