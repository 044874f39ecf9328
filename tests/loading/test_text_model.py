"""Of a multimodal model the text model is measured, and nothing is installed or downloaded."""

from __future__ import annotations

import subprocess
import urllib.request

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.loading import check_wrapped

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = torch.arange(10, 26)


def gemma():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = TEXT | {"head_dim": 8, "sliding_window": 8}
    config = Gemma3Config(text_config=text, vision_config=VISION, image_token_index=5)
    return Gemma3ForConditionalGeneration(config).eval()


def mistral():
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    text = TEXT | {"model_type": "mistral", "head_dim": 8}
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    return Mistral3ForConditionalGeneration(config).eval()


@pytest.fixture
def tokenizer(tiny):
    return tiny("llama").tokenizer


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"started or asked for {arguments}")

    for name in ("run", "call", "check_call", "check_output", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", refuse)


@pytest.mark.parametrize("make", [gemma, mistral])
def test_the_text_model_is_taken(make, tokenizer):
    hf = make()
    with torch.no_grad():
        expected = hf(input_ids=TOKENS[None]).logits
    model = ss.load_model(hf, tokenizer=tokenizer, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS[None]), expected, atol=1e-4, rtol=1e-4)
    sink_map = ss.detect_sinks(model, TOKENS)
    assert sink_map.provenance.model.text_model_of == type(hf).__name__
    assert sink_map.array("norm").shape == (3, len(TOKENS))


def test_from_a_folder(tmp_path, tokenizer):
    hf = gemma()
    hf.save_pretrained(tmp_path / "wrapped")
    tokenizer.save_pretrained(tmp_path / "wrapped")
    with torch.no_grad():
        expected = hf(input_ids=TOKENS[None]).logits
    model = ss.load_model(tmp_path / "wrapped", device="cpu", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS[None]), expected, atol=1e-4, rtol=1e-4)


def test_a_text_model_that_transformers_does_not_have_alone_is_refused(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    hf = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"intermediate_size": 16})
    )
    with pytest.raises(ss.ModelError, match=r"multimodal.*text-only model of the same family"):
        ss.load_model(hf, tokenizer=tokenizer, progress=False)


def test_a_text_model_that_is_not_one_by_itself_is_refused(tokenizer):
    hf = gemma()
    hf.model.register_forward_hook(
        lambda module, inputs, output: setattr(
            output, "last_hidden_state", 2 + output.last_hidden_state
        )
    )
    with pytest.raises(ss.ModelError, match="other logits than the whole"):
        ss.load_model(hf, tokenizer=tokenizer, progress=False)


def test_a_wrapped_model_that_differs_is_noticed(hf_model, monkeypatch, tokenizer):
    hf = hf_model("llama")
    wrong = check_wrapped.probe_logits("llama", hf) * 1.01
    monkeypatch.setattr(check_wrapped, "probe_logits", lambda *_: wrong)
    with pytest.warns(UserWarning, match=r"differ from those of the model itself by 9.9e-03"):
        ss.load_model(hf, tokenizer=tokenizer, progress=False)


def test_a_model_that_does_not_run_is_refused(hf_model, tokenizer):
    hf = hf_model("llama")
    hf.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / torch.zeros(3, 3).inverse())
    with pytest.raises(ss.ModelError, match="does not run in transformers"):
        ss.load_model(hf, tokenizer=tokenizer, progress=False)
