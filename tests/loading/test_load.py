"""`load_model` from every kind of source: same numbers, same tokens, clear refusals."""

import json
import shutil
import sys
import warnings

import gguf
import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from secondary_sinks.errors import InputError, LoadError, ModelError
from secondary_sinks.loading.convert import RECORD, _metadata_read_once
from secondary_sinks.loading.load_model import load_model
from secondary_sinks.loading.tokenizer import read_tokenizer

WORDS = ["<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "."]
TEXT = "the cat sat on a mat ."
TOKENS = torch.tensor([[0, 3, 4, 5, 6, 7, 8, 9]])


def tiny_tokenizer(*, special=True, adds_bos=False):
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    marks = {"bos_token": "<s>", "eos_token": "</s>"} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **marks)


def filled(model):
    """The model with weights so large that a lost or swapped one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tiny_llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return filled(LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **heads)))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def logits_of(model, tokens=TOKENS):
    with torch.inference_mode():
        output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


# -- numbers and tokens ---------------------------------------------------------------------------


def test_a_folder_keeps_numbers_tokens_and_raw_weights(folder):
    model = load_model(folder, device="cpu", progress=False)
    original = tiny_llama()
    assert torch.allclose(logits_of(model), logits_of(original), atol=1e-5)
    assert model.tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert not model.training
    assert model.cfg.n_layers == 2
    assert model.cfg.model_name == "tiny"
    # Raw: the norm's weights are neither folded nor the writing weights centered.
    written = model.blocks[0].mlp.out.weight
    assert torch.equal(written, original.model.layers[0].mlp.down_proj.weight)
    gain = model.blocks[1].ln2.weight
    assert torch.equal(gain, original.model.layers[1].post_attention_layernorm.weight)


def test_dtype_and_device_are_those_asked_for(folder):
    assert logits_of(load_model(folder, device="cpu", progress=False)).dtype == torch.float32
    model = load_model(str(folder), device="cpu", dtype=torch.bfloat16, progress=False)
    assert logits_of(model).dtype == model.cfg.dtype == torch.bfloat16


@pytest.mark.parametrize("special", [True, False], ids=["bos known", "no special tokens"])
@pytest.mark.parametrize("adds_bos", [True, False], ids=["adds bos", "adds nothing"])
def test_the_tokens_of_a_text_never_change(folder, special, adds_bos):
    tokenizer = tiny_tokenizer(special=special, adds_bos=adds_bos)
    expected = tokenizer(TEXT).input_ids
    assert (expected[0] == 0) == adds_bos
    before = dict(tokenizer.init_kwargs), tokenizer.pad_token, len(tokenizer)
    in_memory = load_model(tiny_llama(), tokenizer=tokenizer, progress=False)
    assert in_memory.tokenizer(TEXT).input_ids == expected
    assert (dict(tokenizer.init_kwargs), tokenizer.pad_token, len(tokenizer)) == before
    assert "add_bos_token" not in in_memory.tokenizer.init_kwargs
    tokenizer.save_pretrained(folder)
    assert load_model(folder, progress=False).tokenizer(TEXT).input_ids == expected
    if special:  # TransformerLens' own convention still works: one BOS, and not two
        assert in_memory.to_tokens(TEXT, prepend_bos=True)[0].tolist() == TOKENS[0].tolist()
        assert in_memory.to_tokens(TEXT, prepend_bos=False)[0].tolist() == TOKENS[0, 1:].tolist()


def test_a_model_in_memory_keeps_its_dtype_and_needs_a_tokenizer():
    hf = tiny_llama().to(torch.bfloat16)
    expected = logits_of(hf)
    hf.config.architectures = None
    hf.train()
    model = load_model(hf, tokenizer=tiny_tokenizer(), progress=False)
    assert not model.training
    assert torch.allclose(logits_of(model), expected, atol=0.1)
    assert logits_of(model).dtype == torch.bfloat16
    with pytest.raises(LoadError, match="tokenizer=AutoTokenizer"):
        load_model(tiny_llama())
    with pytest.raises(LoadError, match="loaded already"):
        load_model(model, tokenizer=tiny_tokenizer())


def test_a_tokenizer_of_the_users_replaces_the_folders(folder):
    model = load_model(folder, tokenizer=tiny_tokenizer(adds_bos=True), progress=False)
    assert model.tokenizer(TEXT).input_ids == TOKENS[0].tolist()


def test_the_folders_own_tokenizer_wins_over_the_usual_one_of_its_family(tmp_path):
    # A Qwen2 model whose tokenizer is not Qwen2's, as the distilled DeepSeek-R1 models are.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=10, **sizes, **heads)).save_pretrained(tmp_path)
    tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path)
    message = r"Qwen2Tokenizer splits text differently.*tokenizer\.json"
    with pytest.warns(UserWarning, match=message) as warned:
        model = load_model(tmp_path, progress=False)
    assert [warning.filename for warning in warned] == [__file__]
    assert model.tokenizer(TEXT).input_ids == TOKENS[0].tolist()


def test_gpt2_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes)).eval()
    hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, progress=False)
    assert torch.allclose(logits_of(model), logits_of(hf), atol=1e-5)
    assert model.tokenizer(TEXT).input_ids == TOKENS[0, 1:].tolist()


def test_a_falcon_that_gets_its_position_bias_twice_is_loaded_with_a_warning():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"bos_token_id": 0, "eos_token_id": 1}
    hf = filled(FalconForCausalLM(FalconConfig(vocab_size=10, alibi=True, **sizes, **marks)))
    logits = {}
    for attention in ("eager", "sdpa"):
        hf.config._attn_implementation_internal = attention
        logits[attention] = logits_of(hf, torch.arange(8)[None])
    differs = (logits["eager"] - logits["sdpa"]).norm() > 0.01 * logits["sdpa"].norm()
    with warnings.catch_warnings(record=True) as warned:
        load_model(hf, tokenizer=tiny_tokenizer(), progress=False)
    files = [w.filename for w in warned if "adds the position bias twice" in str(w.message)]
    assert files == [__file__] * bool(differs)


@pytest.mark.slow
def test_an_alias_from_the_package_index_speaks():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_model("smollm2-135m", device="cpu", progress=False)
    ids = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert model.tokenizer.decode(logits_of(model, ids)[0, -1].argmax()) == " Paris"
    assert model.cfg.n_layers == 30
    assert model.cfg.model_name == "smollm2-135m"
    assert model.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


# -- GGUF -----------------------------------------------------------------------------------------


def write_gguf(path):
    """A tiny Llama in GGUF, its matrices quantized to 8 bits."""
    hf = tiny_llama()
    writer = gguf.GGUFWriter(path, "llama")
    config = hf.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "t", "at", "c", "s", "o", "n", "m"])
    writer.add_token_merges(["a t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    parts |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in hf.state_dict().items():
        short = name.removeprefix("model.").removesuffix(".weight").replace("layers.", "blk.")
        for long, part in parts.items():
            short = short.replace(long, part)
        whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        data = tensor.numpy().astype(numpy.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else None
        stored = data if kind is None else gguf.quants.quantize(data, kind)
        writer.add_tensor(f"{whole.get(short, short)}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_without_changing_a_bit(tmp_path, monkeypatch, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECONDARY_SINKS_CACHE", str(tmp_path / "cache"))
        model = load_model(str(path), device="cpu", progress=False)
    assert capsys.readouterr() == ("", "")
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    converted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(logits_of(converted), logits_of(direct))
    assert torch.allclose(logits_of(model), logits_of(direct), atol=1e-5)
    assert not torch.allclose(logits_of(direct), logits_of(tiny_llama()), atol=1e-5)  # quantized
    assert list(converted.state_dict()) == list(direct.state_dict())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cache", "tiny.gguf"]
    assert path.read_bytes() == before

    # The second load, also of a copy under the same name, converts nothing.
    monkeypatch.setattr("secondary_sinks.loading.convert._read_gguf", None)
    (tmp_path / "copy").mkdir()
    shutil.copy(path, tmp_path / "copy")
    again = load_model(tmp_path / "copy" / "tiny.gguf", cache_dir=tmp_path / "cache")
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_metadata_of_a_gguf_file_is_read_once_and_as_the_package_reads_it(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    stock = gguf.GGUFReader
    with _metadata_read_once():
        fast = gguf.GGUFReader(str(path))
        assert gguf.GGUFReader(str(path)) is fast
    assert gguf.GGUFReader is stock
    usual = stock(path)
    assert [f.contents() for f in fast.fields.values()] == [
        f.contents() for f in usual.fields.values()
    ]
    for mine, theirs in zip(fast.tensors, usual.tensors, strict=True):
        assert mine.name == theirs.name
        assert numpy.array_equal(mine.data, theirs.data)


def test_a_converted_tokenizer_is_the_one_that_its_class_reads(tmp_path):
    backend = tiny_tokenizer(adds_bos=True)
    backend.add_tokens(["<cat>"])
    backend.chat_template = "{{ messages[0].content }}"
    backend.save_pretrained(tmp_path)
    (tmp_path / RECORD).touch()
    read, usual = read_tokenizer(str(tmp_path), {}), AutoTokenizer.from_pretrained(tmp_path)
    text = f"{TEXT}<cat> </s> dog"
    assert read(text).input_ids == usual(text).input_ids
    assert (len(read), read.chat_template) == (len(usual), usual.chat_template)
    assert read.special_tokens_map == usual.special_tokens_map
    assert read.all_special_ids == usual.all_special_ids


def test_files_beside_a_gguf_file_do_not_leak_into_it(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 7}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "mat"}')
    model = load_model(path, cache_dir=tmp_path / "cache", progress=False)
    assert model.cfg.n_layers == 2
    assert model.tokenizer.bos_token == "<s>"
    assert model.tokenizer("cat").input_ids == [5, 4]


@pytest.mark.parametrize("keep", [0, 20, 700, -4000], ids=["empty", "header", "fields", "tensors"])
def test_a_truncated_gguf_file_is_refused_by_name(tmp_path, keep):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match=r"tiny\.gguf could not be read.*truncated"):
        load_model(path, cache_dir=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoadError, match=r'pip install "secondary_sinks\[gguf\]"'):
        load_model(path, cache_dir=tmp_path / "cache", progress=False)


def test_a_gguf_tokenizer_gets_its_normalizer_back_where_it_is_known(tmp_path):
    from transformers import Qwen2Tokenizer

    from secondary_sinks.loading.convert import _save_tokenizer

    Qwen2Config(vocab_size=10).save_pretrained(tmp_path)
    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    usual = tokenizer.backend_tokenizer.pre_tokenizer
    written = {}
    for case, rule in {"its own": usual, "another": pre_tokenizers.Whitespace()}.items():
        tokenizer.backend_tokenizer.normalizer = None  # as a GGUF file leaves it
        tokenizer.backend_tokenizer.pre_tokenizer = rule
        _save_tokenizer(tokenizer, tmp_path)
        written[case] = json.loads((tmp_path / "tokenizer.json").read_text())["normalizer"]
    assert written == {"its own": {"type": "NFC"}, "another": None}


# -- refusals -------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("keep", [4, 1000, -8], ids=["header", "body", "last bytes"])
def test_truncated_safetensors_are_refused_by_name(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(LoadError, match=r"model\.safetensors is truncated"):
        load_model(folder)


def test_absent_tensors_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lack 1 tensors.*layers\.1\.mlp\.down_proj"):
        load_model(folder, progress=False)


def test_a_folder_without_tokenizer_says_how_to_pass_one(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LoadError, match=r"no tokenizer.*tokenizer=AutoTokenizer"):
        load_model(folder, progress=False)
    model = load_model(folder, tokenizer=tiny_tokenizer(), progress=False)
    assert torch.allclose(logits_of(model), logits_of(tiny_llama()), atol=1e-5)


def test_folders_and_files_without_a_model_are_told_apart(tmp_path, folder):
    with pytest.raises(LoadError, match=r"no file or folder '\./nowhere'"):
        load_model("./nowhere")
    with pytest.raises(LoadError, match=r"no file or folder 'nowhere\.gguf'"):
        load_model("nowhere.gguf")
    with pytest.raises(LoadError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(LoadError, match=r"Load its \.gguf file instead: .*some\.gguf"):
        load_model(tmp_path)
    with pytest.raises(LoadError, match="name the folder that holds them"):
        load_model(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="holds no weights"):
        load_model(folder)


def test_custom_code_is_not_run_unless_asked_for(folder):
    (folder / "own.py").write_text("raise SystemExit('this must not run')")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="pass trust_remote_code=True"):
        load_model(folder, progress=False)


def tiny_bert(model_class, **changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    return model_class(BertConfig(vocab_size=10, num_attention_heads=2, **sizes, **changes))


def tiny_t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=10, **sizes))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: tiny_bert(BertModel), "an encoder"),
        (lambda: tiny_bert(BertLMHeadModel), "an encoder"),
        (tiny_t5, "an encoder-decoder"),
        (lambda: LlamaModel(tiny_llama().config), "a LlamaModel"),
    ],
    ids=["BERT", "BERT with a causal head", "T5", "Llama without a head"],
)
def test_only_causal_language_models_are_taken(tmp_path, make, what):
    hf = make()
    with pytest.raises(ModelError, match=f"is {what}, not a causal language model"):
        load_model(hf, tokenizer=tiny_tokenizer())
    hf.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"is {what}, not a causal language model"):
        load_model(tmp_path, progress=False)


def test_unknown_names_suggest_the_nearest_aliases():
    with pytest.raises(LoadError, match=r"'qwen3-4b-bsae' is not an alias.*mean qwen3-4b-base"):
        load_model("qwen3-4b-bsae")


@pytest.mark.parametrize("source", ["qwen3-4b-base", "Qwen/Qwen3-4b-Base"])
def test_without_a_network_the_error_names_what_works(offline, source):
    with pytest.raises(LoadError, match=r"no network.*smollm2-135m.*\.gguf") as caught:
        load_model(source, progress=False)
    assert "Qwen/Qwen3-4" in str(caught.value)


def test_an_unreachable_hub_is_noticed_before_its_client_retries(monkeypatch):
    from secondary_sinks.loading.hub import hub_options

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    assert hub_options("main") == {"revision": "main", "local_files_only": True}
    with pytest.raises(LoadError, match="hub cannot be reached"):
        load_model("someone/some-model", progress=False)


def test_a_wrong_kind_is_refused(folder):
    with pytest.raises(InputError, match="'bridge' or 'hooked', got 'hook'"):
        load_model(folder, kind="hook")


def test_hooked_transformer_names_the_generation_that_has_it(folder):
    with pytest.raises(ModelError, match=r"4\.0 removed it.*transformer-lens>=3\.9,<4"):
        load_model(folder, kind="hooked")


# -- manners --------------------------------------------------------------------------------------


def test_nothing_is_printed_and_the_users_settings_come_back(folder, capsys):
    transformers_logging.enable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    load_model(folder, progress=False)
    assert capsys.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == verbosity


def test_weights_stay_as_they_are_when_the_model_is_edited(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder, device="cpu", progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert (folder / "model.safetensors").read_bytes() == before
