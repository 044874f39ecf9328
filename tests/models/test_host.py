"""What a host must be before anything is measured in it."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import secondary_sinks as ss

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (
            transformers.BertConfig(hidden_size=32, intermediate_size=64, **SMALL),
            transformers.BertForMaskedLM,
        ),
        (
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64
            ),
            transformers.T5ForConditionalGeneration,
        ),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_models_that_look_both_ways_are_refused(tiny, config, model):
    hf = model(config).eval()
    hf.config.architectures = [model.__name__]
    tokenizer = tiny("llama").tokenizer
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs["add_bos_token"] = True  # keeps the host from asking a hub
    try:
        host = TransformerBridge.boot_transformers(
            "both-ways", hf_model=hf, tokenizer=tokenizer, device="cpu"
        )
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(before)
    with pytest.raises(ss.ModelError, match="not a causal language model"):
        ss.detect_sinks(host, torch.arange(3, 20))
