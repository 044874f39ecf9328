"""Which architectures can be measured, and how: a table made by trying each of them.

    python experiments/architectures.py [NAME ...] [--out docs/results]

For every architecture that the installed TransformerLens supports and transformers has, a tiny
model with random weights is built from its configuration, and every part of the library is tried on
it. A cell says "yes", or why not, in the words of the library. A word that the library did not
choose ("IndexError: ...") is a defect of the library.

Each architecture runs in a process and a time limit of its own, so that none stops the others. What
is tried is whether activations can be read and edited rightly: cached and packed rows are compared
with full passes. Whether trained models of the family have sinks is another question.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import secondary_sinks as ss

N_TOKENS = 48
POSITION = 20
"""The token whose activations are edited, and whose MLPs are asked for."""
LIMIT = 120
"""Seconds for one architecture."""

COLUMNS = {
    "load": "the model, or the text model of a multimodal one",
    "residual": "norms and alignment of the residual stream",
    "attention": "sink scores",
    "streamed": "attention without whole patterns, for long texts",
    "detection": "`detect_sinks`",
    "cached": "rows over the kept text",
    "packed": "rows behind the text",
    "full": "a pass for each row",
    "attribution": "`attribute_to_mlps`",
}
"""What is tried, in this order."""

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
    "attention_chunk_size": 16,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
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

_ALTERNATING = ["linear_attention", "full_attention"] * 2

SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"layer_types": _ALTERNATING},
    "qwen3_5_text": {"layer_types": _ALTERNATING},
    "qwen3_5_moe_text": {"layer_types": _ALTERNATING},
    "olmo_hybrid": {"layer_types": _ALTERNATING},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"]},
    "nemotron_h": {"layer_types": ["mamba", "attention", "moe", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "glm4_moe_lite": {"num_key_value_heads": 4, "head_dim": 4},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4},
    "youtu": {"num_key_value_heads": 4, "head_dim": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4, "head_dim": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""What some configurations need beyond `SIZE`, by model type."""


def tiny_config(config_class: Any) -> Any:
    """A configuration of a class, and of its parts, with the sizes above."""
    default = config_class()
    settings = default.to_dict()
    names = config_class.attribute_map or {}
    arguments: dict[str, Any] = {}
    for name, size in SIZE.items():
        own = names.get(name, name)
        if own in settings and not isinstance(settings[own], dict):
            arguments[own] = size
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            arguments[name] = tiny_config(type(part)).to_dict()
    return config_class(**arguments | SPECIAL.get(config_class.model_type, {}))


def build(architecture: str) -> Any:
    """A tiny model of an architecture, with random weights large enough that attention varies, and
    one token so large that it is the primary sink."""
    import transformers

    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    config = tiny_config(model_class.config_class)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
            if parameter.shape == (SIZE["vocab_size"], SIZE["hidden_size"]):
                parameter[SIZE["bos_token_id"]] *= 200
    return model


def tokenizer() -> Any:
    """A tokenizer of as many words as the models have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(SIZE["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="w1", eos_token="w2", pad_token="w0", name_or_path="tiny"
    )


def examine(architecture: str) -> dict[str, str]:
    """Try everything in `COLUMNS` on one architecture; what cannot be tried is left out."""
    row: dict[str, str] = {}

    def attempt(name: str, step: Callable[[], Any]) -> Any:
        try:
            value = step()
        except Exception as error:
            row[name] = _words(error, architecture)
            return None
        row[name] = "yes"
        return value

    try:
        hf = build(architecture)
    except Exception as error:
        return {"load": f"not built: {_words(error, architecture)}"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = attempt("load", lambda: ss.load_model(hf, tokenizer=tokenizer(), progress=False))
    if model is None:
        return row
    differs = [str(w.message) for w in caught if "differ" in str(w.message)]
    row["load"] = f"with a warning: {differs[0]}" if differs else "yes"
    tokens = torch.randint(8, 64, (N_TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens[0] = SIZE["bos_token_id"]
    geometry, scores = ss.ResidualGeometry(), ss.SinkScores()
    attempt("residual", lambda: ss.trace(model, tokens, [geometry]))
    attempt("attention", lambda: ss.trace(model, tokens, [scores], attention="eager"))
    attempt("streamed", lambda: ss.trace(model, tokens, [scores], attention="streaming"))
    sink_map = attempt(
        "detection",
        lambda: ss.detect_sinks(model, tokens, min_attention_ratio=0.0, min_strength=0.0),
    )
    if sink_map is None:
        return row
    edits = [
        ss.Intervention("mlp_out", 1, POSITION, ss.Zero()),
        ss.Intervention("attn_out", 0, POSITION, ss.Scale(2.0)),
    ]
    for method in ("cached", "packed", "full"):
        options: dict[str, Any] = {"method": method, "progress": False}
        attempt(method, lambda: ss.counterfactuals(model, sink_map, edits, **options))  # noqa: B023
    attempt(
        "attribution",
        lambda: ss.attribute_to_mlps(
            model, sink_map, sinks=[POSITION], n_controls=2, progress=False
        ),
    )
    return row


def _words(error: Exception, architecture: str) -> str:
    """An error in the words of the library, or the name and the words of another error."""
    text = " ".join(str(error).split()).replace(repr(architecture), "the model")
    text = text.replace(f"{architecture} ({architecture})", "the model")
    text = text.replace(f"{architecture} is a {architecture}, not", "it is not")
    if not isinstance(error, ss.SecondarySinksError):
        text = f"{type(error).__name__}: {text[:200]}"
    return text.replace(architecture, "the model")


def examine_apart(architecture: str) -> dict[str, str]:
    """`examine` in a process and a time limit of its own."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_examine_into, args=(architecture, answers), daemon=True)
    process.start()
    try:
        row: dict[str, str] = answers.get(timeout=LIMIT)
    except Empty:
        row = {"load": f"no answer within {LIMIT} seconds"}
    process.terminate()
    process.join()
    return row


def _examine_into(architecture: str, answers: Any) -> None:
    torch.set_num_threads(1)  # a forked process cannot share its parent's threads
    answers.put(examine(architecture))


def page(frame: pd.DataFrame, absent: Sequence[str]) -> str:
    """The table as Markdown: "yes" or the number of a reason, and the reasons below."""
    loaded = frame[frame["residual"] != ""]
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        return text if text in ("yes", "") else f"({reasons.setdefault(text, len(reasons) + 1)})"

    rows = [
        [f"`{row['architecture']}`", *(cell(row[column]) for column in COLUMNS)]
        for row in loaded.to_dict("records")
    ]
    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    lines.append("")
    for reason, names in frame[frame["residual"] == ""].groupby("load", sort=False)["architecture"]:
        lines.append(f"* {', '.join(f'`{name}`' for name in names)} not loaded: {reason}")
    if names := ", ".join(f"`{name}`" for name in absent):
        lines.append(f"* {names} not tried: transformers has no such class")
    return "\n".join(lines) + "\n"


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Architectures; all by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("out/experiments"),
) -> None:
    """Try every part of the library on every architecture."""
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    transformers.logging.set_verbosity_error()
    chosen = sorted(names or SUPPORTED_ARCHITECTURES, key=str.lower)
    absent = [name for name in chosen if not hasattr(transformers, name)]
    rows = []
    for name in (name for name in chosen if name not in absent):
        rows.append({"architecture": name} | examine_apart(name))
        typer.echo(f"{name}: {rows[-1]['load'][:80]}", err=True)
    frame = pd.DataFrame(rows, columns=["architecture", *COLUMNS]).fillna("")
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "architectures.csv", index=False)
    (out / "architectures.txt").write_text(page(frame, absent), encoding="utf-8")
    typer.echo(out / "architectures.txt")


if __name__ == "__main__":
    typer.run(main)
