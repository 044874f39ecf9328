"""Which architectures can be measured, and how: a table made by trying each of them.

    python experiments/architectures.py [--out docs/results]

For every architecture that the installed TransformerLens supports and transformers has, a tiny
model with random weights is built from its configuration, and every part of the library is tried on
it. A cell says "yes", or why not, in the words of the error. A word that the library did not choose
("IndexError: ...") is a defect of the library.

Each architecture runs in a process and a time limit of its own, so that none stops the others.
Random weights say whether activations can be read and edited rightly (`counterfactuals` compares
its engines with full passes), not whether a trained model of the family has sinks.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import secondary_sinks as ss

N_TOKENS = 48
POSITION = 20
"""The token whose activations are edited."""
LIMIT = 120
"""Seconds for one architecture."""

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state spaces, convolutions and linear attention
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_ngroups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "attention_window_size": 16,
    # old names
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 4,
    "max_seq_len": 128,
    "ffn_dim": 48,
    "num_layers": 4,
    "attention_heads": 4,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    # what is not read here
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "out_hidden_size": 32,
    "embed_dim": 32,
    # special tokens, within the vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 3,
    "image_token_index": 3,
    "audio_token_id": 4,
    "audio_token_index": 4,
    "video_token_id": 5,
    "video_token_index": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
}
"""Sizes by the names that configurations use; of each configuration, those that it has."""

ALTERNATING = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ALTERNATING},
    "qwen3_5_text": {"layer_types": ALTERNATING},
    "qwen3_5_moe_text": {"layer_types": ALTERNATING},
    "olmo_hybrid": {"layer_types": ALTERNATING},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"]},
    "nemotron_h": {"layer_types": ["mamba", "attention", "moe", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4},
    "youtu": {"num_key_value_heads": 4, "head_dim": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""What some configurations need beyond `SIZE`, by model type."""


def tiny_config(config_class: Any) -> Any:
    """A configuration of a class with the sizes above, and so its parts."""
    default = config_class()
    settings = default.to_dict()
    renamed = {old: new for new, old in (config_class.attribute_map or {}).items()}
    arguments: dict[str, Any] = {
        name: size
        for name, size in SIZE.items()
        if name in settings and renamed.get(name) not in SIZE and not isinstance(settings[name], dict)
    }
    for name, size in SIZE.items():
        own = (config_class.attribute_map or {}).get(name)
        if own in settings:
            arguments[own] = size
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            arguments[name] = tiny_config(type(part)).to_dict()
    arguments |= SPECIAL.get(config_class.model_type, {})
    return config_class(**arguments)


def build(architecture: str) -> Any:
    """A tiny model of an architecture, with random weights large enough that attention varies."""
    import transformers

    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    config = tiny_config(model_class.config_class)
    config._attn_implementation = "eager"
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
        model.get_input_embeddings().weight[1] *= 20
    return model.float().eval()


def tokenizer() -> Any:
    """A tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{n}": n for n in range(3, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        name_or_path="tiny",
    )


def examine(architecture: str) -> dict[str, str]:
    """Try every part of the library on one architecture."""
    row: dict[str, str] = {}
    try:
        hf = build(architecture)
    except Exception as error:
        return {"load": f"not built: {_words(error)}"}

    def attempt(name: str, step: Callable[[], Any]) -> Any:
        try:
            value = step()
            row[name] = value if isinstance(value, str) else "yes"
        except Exception as error:
            row[name] = _words(error)
            return None
        return value

    model = attempt("load", lambda: ss.load_model(hf, tokenizer=tokenizer(), progress=False))
    if model is None:
        return row
    tokens = torch.randint(8, 64, (N_TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens[0] = 1
    norms = [ss.ResidualNorms()]
    attempt("norms", lambda: ss.trace(model, tokens, norms, progress=False))
    attempt("scores", lambda: ss.trace(model, tokens, [ss.SinkScores()], attention="eager"))
    attempt("streamed", lambda: ss.trace(model, tokens, [ss.SinkScores()], attention="streaming"))
    sink_map = attempt("detection", lambda: ss.detect_sinks(model, tokens, min_attention_ratio=0.0, min_primary_ratio=1.5))
    if sink_map is None:
        return row
    edits = [
        ss.Intervention("mlp_out", 1, POSITION, ss.Zero()),
        ss.Intervention("attn_out", 0, POSITION, ss.Scale(2.0)),
    ]
    for method in ("cached", "packed", "full"):
        attempt(
            method,
            lambda method=method: ss.counterfactuals(
                model, sink_map, edits, method=method, progress=False
            ),
        )
    attempt(
        "attribution",
        lambda: ss.attribute_to_mlps(model, sink_map, sinks=[POSITION], n_controls=2, progress=False),
    )
    return row


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    own = isinstance(error, ss.SecondarySinksError)
    return text if own else f"{type(error).__name__}: {text[:300]}"


def examine_apart(architecture: str) -> dict[str, str]:
    """`examine` in a process and a time limit of its own."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_examine_into, args=(architecture, answers), daemon=True)
    process.start()
    try:
        row = answers.get(timeout=LIMIT)
    except Empty:
        row = {"load": f"no answer within {LIMIT} seconds"}
    process.terminate()
    process.join()
    return dict(row)


def _examine_into(architecture: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    answers.put(examine(architecture))
