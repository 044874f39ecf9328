"""Which models are refused, and which are measured with a warning."""

from __future__ import annotations

import math
import warnings

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
    tokenizer.init_kwargs["add_bos_token"] = True  # keeps TransformerLens from asking a hub
    try:
        bridge = TransformerBridge.boot_transformers(
            "both-ways", hf_model=hf, tokenizer=tokenizer, device="cpu"
        )
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(before)
    with pytest.raises(ss.ModelError, match="not a causal language model"):
        ss.detect_sinks(bridge, torch.arange(3, 20))


def times_that_the_bias_is_added(hf):
    """Read from the first head's pattern where all products of queries and keys are 0."""
    hf.transformer.h[0].self_attention.query_key_value.weight.data.zero_()
    with torch.no_grad():
        pattern = hf(torch.arange(8)[None], output_attentions=True).attentions[0][0, 0, -1]
    slope, d_head = 2 ** (-8 / hf.config.num_attention_heads), hf.config.head_dim
    return float((pattern[1:] / pattern[:-1]).log().mean()) * math.sqrt(d_head) / slope


@pytest.mark.parametrize("alibi", [True, False])
def test_a_position_bias_that_is_added_twice_gives_a_warning(tiny, alibi):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    hf = transformers.FalconForCausalLM(transformers.FalconConfig(alibi=alibi, **sizes)).eval()
    hf.config._attn_implementation = "eager"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ss.load_model(hf, tokenizer=tiny("llama").tokenizer)
    warned = any("adds the position bias twice" in str(warning.message) for warning in caught)
    assert hf.config._attn_implementation == "eager"
    again = transformers.FalconForCausalLM(hf.config).eval()
    assert warned == (alibi and times_that_the_bias_is_added(again) == pytest.approx(2, rel=0.02))
