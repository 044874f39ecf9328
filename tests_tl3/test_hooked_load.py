"""Contract with TransformerLens 3: `HookedTransformer` and bridge made from the same weights.

Run these where `transformer-lens>=3.9,<4` is installed; 4.0 removed `HookedTransformer`.
"""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from secondary_sinks.errors import ModelError
from secondary_sinks.loading import hooked_transformer as hooked
from secondary_sinks.loading.load_model import load_model

WORDS = ["<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", ".", "dog", "ran"]
TEXT = "the cat sat on a mat ."
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "vocab_size": len(WORDS), "max_position_embeddings": 96}
GROUPED = {**SIZES, **HEADS, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 8}


def tiny_tokenizer(*, adds_bos=False):
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def filled(model):
    """The model with weights large enough that every part of it matters to the result."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
    return filled(GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes)))


MAKERS = {
    "llama": lambda: filled(LlamaForCausalLM(LlamaConfig(**GROUPED))),
    "gpt2": gpt2,
    "neox": lambda: filled(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **HEADS))),
    "qwen2": lambda: filled(Qwen2ForCausalLM(Qwen2Config(**GROUPED))),
    "mistral with a window": lambda: filled(MistralForCausalLM(MistralConfig(**GROUPED, **WINDOW))),
}


def sliding_qwen2(window):
    config = Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=window, max_window_layers=1
    )
    return filled(Qwen2ForCausalLM(config))


def residuals_of_hugging_face(hf, tokens):
    with torch.inference_mode():
        return hf(tokens, output_hidden_states=True).hidden_states[1:-1]


@pytest.mark.filterwarnings("ignore:.*splits text differently")  # no Qwen2 has a tiny tokenizer
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_residuals_and_tokens_are_those_of_hugging_face(tmp_path, family, kind):
    hf = MAKERS[family]()
    # A folder name that would make TransformerLens take any model for a Llama.
    folder = tmp_path / "llama-or-gemma"
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = load_model(folder, kind=kind, device="cpu", progress=False)
    assert isinstance(model, HookedTransformer if kind == "hooked" else TransformerBridge)
    assert not model.training
    assert model.cfg.model_name == "llama-or-gemma"

    tokens = torch.randint(len(WORDS), (1, 40), generator=torch.Generator().manual_seed(1))
    expected = residuals_of_hugging_face(hf, tokens)
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    for layer, reference in enumerate(expected):
        residual = cache[f"blocks.{layer}.hook_resid_post"]
        assert torch.allclose(residual, reference, atol=1e-4, rtol=1e-4)
    assert model.tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_the_tokens_of_a_text_never_change(kind, adds_bos):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    expected = tokenizer(TEXT).input_ids
    model = load_model(MAKERS["llama"](), tokenizer=tokenizer, kind=kind, progress=False)
    assert model.tokenizer(TEXT).input_ids == expected
    assert expected[0] == (0 if adds_bos else 3)
    assert model.to_tokens(TEXT, prepend_bos=True)[0].tolist()[:3] == [0, 3, 4]
    assert tokenizer.pad_token is None
    assert "add_bos_token" not in tokenizer.init_kwargs


def test_the_weights_are_raw_and_the_model_in_memory_is_left_alone():
    hf = MAKERS["gpt2"]()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    architectures, attention = hf.config.architectures, hf.config._attn_implementation
    model = hooked.to_hooked(hf, tiny_tokenizer_as_loaded(), "cpu", torch.float32)
    assert model.cfg.normalization_type == "LN"
    assert torch.equal(model.W_E, hf.transformer.wte.weight)
    assert torch.equal(model.blocks[0].mlp.W_out, hf.transformer.h[0].mlp.c_proj.weight)
    assert torch.equal(model.blocks[2].ln1.w, hf.transformer.h[2].ln_1.weight)
    assert (hf.config.architectures, hf.config._attn_implementation) == (architectures, attention)
    with torch.no_grad():
        model.W_E.zero_()
    assert all(torch.equal(hf.state_dict()[name], tensor) for name, tensor in before.items())


def tiny_tokenizer_as_loaded():
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return tokenizer


def test_bfloat16_passes_the_check():
    hf = MAKERS["llama"]().to(torch.bfloat16)
    model = load_model(hf, tokenizer=tiny_tokenizer(), kind="hooked", progress=False)
    assert model.W_E.dtype == model.cfg.dtype == torch.bfloat16


def test_a_conversion_that_loses_the_sliding_window_is_refused():
    with pytest.raises(ModelError, match=r"residual after layer \d differs by .*kind=\"bridge\""):
        load_model(sliding_qwen2(8), tokenizer=tiny_tokenizer(), kind="hooked", progress=False)
    # The bridge runs Hugging Face's own attention, so it is right about the same model.
    hf = sliding_qwen2(8)
    tokens = torch.randint(len(WORDS), (1, 40), generator=torch.Generator().manual_seed(1))
    expected = residuals_of_hugging_face(hf, tokens)
    model = load_model(hf, tokenizer=tiny_tokenizer(), progress=False)
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    assert torch.allclose(cache["blocks.1.hook_resid_post"], expected[1], atol=1e-4, rtol=1e-4)


def test_a_window_too_long_to_be_checked_is_refused():
    hf = sliding_qwen2(8)
    hf.config.max_position_embeddings = 8192
    hf.config.sliding_window = 4096
    with pytest.raises(ModelError, match="sliding window of 4096 tokens in a context of 8192"):
        hooked.to_hooked(hf, tiny_tokenizer(), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("layer", "where"), [(1, "residual after layer 1"), (2, r"logits \(after layer 2\)")]
)
def test_one_wrong_weight_is_noticed_at_its_layer(monkeypatch, layer, where):
    convert = hooked._convert

    def convert_wrongly(*arguments):
        model = convert(*arguments)
        with torch.no_grad():
            model.blocks[layer].mlp.W_out[3] *= 1.5
        return model

    monkeypatch.setattr(hooked, "_convert", convert_wrongly)
    with pytest.raises(ModelError, match=where):
        load_model(MAKERS["llama"](), tokenizer=tiny_tokenizer(), kind="hooked", progress=False)


def test_a_failing_conversion_names_the_way_out(monkeypatch):
    def unknown(*arguments):
        raise NotImplementedError("LlamaForCausalLM is not supported")

    monkeypatch.setattr(hooked, "_convert", unknown)
    with pytest.raises(ModelError, match=r"cannot convert LlamaForCausalLM.*kind=\"bridge\""):
        load_model(MAKERS["llama"](), tokenizer=tiny_tokenizer(), kind="hooked", progress=False)


def test_only_causal_language_models_are_taken():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=10, **sizes))
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model(t5, tokenizer=tiny_tokenizer(), kind="hooked")
