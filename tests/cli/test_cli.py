"""The command line on a tiny random model: what it writes, and what it says when it cannot."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import secondary_sinks as ss
from secondary_sinks.cli import saved_maps
from secondary_sinks.cli.app import app
from secondary_sinks.cli.detect import demo_messages
from secondary_sinks.cli.outputs import json_record
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.sinks.sink_map import SinkMap

TEMPLATE = (
    "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)
WORDS = "w5 w9 w12 w3 w40 w9 w33 w21 w5 w8 w17 w30 w44 w7 w11 w60"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{n}": n for n in range(3, 64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a failure of the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secondary_sinks.loading.load_model.load_model", refuse)


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def same(one: SinkMap, other: SinkMap) -> bool:
    return (
        one.sinks == other.sinks
        and one.token_strings == other.token_strings
        and one.phases == other.phases
        and torch.equal(one.norm, other.norm)
        and torch.equal(one.alignment, other.alignment)
    )


def test_help_and_aliases_import_no_torch():
    code = (
        "import sys\n"
        "from secondary_sinks.cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "for command in ('--help', '--version', 'models', 'texts'):\n"
        "    assert CliRunner().invoke(app, [command]).exit_code == 0\n"
        "heavy = {'torch', 'transformer_lens', 'pandas', 'numpy', 'matplotlib'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_commands():
    assert run("--version").stdout == f"secondary-sinks {ss.__version__}\n"
    shown = run("--help").stdout
    assert all(name in shown for name in ("detect", "levels", "models", "fetch", "demo", "texts"))


def test_models_lists_every_alias():
    shown = run("models").stdout
    for alias in ss.list_models():
        assert alias.name in shown
    small = next(line for line in shown.splitlines() if line.startswith("smollm2-135m"))
    assert "package index" in small
    assert small.split()[-1] == "no"
    (gemma,) = [line for line in shown.splitlines() if line.startswith("gemma3-270m: ")]
    assert "Gemma Terms of Use" in gemma


def test_check_says_line_by_line_what_works(folder, tmp_path):
    done = run("check", folder, "--tokens", 300, "--out", tmp_path / "out")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.exit_code == 0, done.output
    assert ["cached", "rows", "ok"] in [line[:3] for line in lines]
    assert "with 300 tokens" in " ".join(done.stdout.split())
    frame = pd.read_csv(tmp_path / "out" / "check.csv")
    assert set(frame["outcome"]) == {"ok"}
    assert ss.ModelCheck.load(tmp_path / "out" / "check.safetensors").passed
    failed = run("check", folder, "--tokens", 1000)
    assert failed.exit_code == 1
    assert "context holds 512 tokens" in " ".join(failed.stdout.split())


@pytest.mark.slow
def test_detect_writes_what_the_library_finds(folder, tmp_path):
    out = tmp_path / "new" / "out"
    done = run("detect", folder, "--text", WORDS, "--out", out)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "sinks.csv",
        "sinks.png",
        "sinks.safetensors",
    ]
    expected = ss.detect_sinks(ss.load_model(folder, progress=False), WORDS)
    assert same(SinkMap.load(out / "sinks.safetensors"), expected)
    assert len(pd.read_csv(out / "sinks.csv")) == len(expected.sinks)
    assert (out / "sinks.png").read_bytes().startswith(b"\x89PNG")
    assert "16 tokens" in done.stdout
    assert str(out) in done.stderr


def test_json_is_all_that_standard_output_holds(folder):
    done = run("detect", folder, "--text", WORDS, "--criterion", "published", "--json")
    record = json.loads(done.stdout)
    model = ss.load_model(folder, progress=False)
    expected = ss.detect_sinks(model, WORDS, criterion="published")
    assert record["criterion"] == "published"
    assert record["n_tokens"] == expected.n_tokens
    assert [sink["layers"] for sink in record["sinks"]] == [
        list(sink.layers) for sink in expected.sinks
    ]


def test_standard_input_and_max_tokens(folder):
    done = run("detect", folder, "--file", "-", "--max-tokens", 6, "--json", input=WORDS)
    assert json.loads(done.stdout)["n_tokens"] == 6


def test_thresholds_reach_the_detector(folder):
    options = {"min-alignment": 0.5, "min-norm-ratio": 1.1, "min-attention-ratio": 2.0}
    options |= {"min-primary-ratio": 1.5, "min-queries": 3}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    record = json.loads(run("detect", folder, "--text", WORDS, "--json", *flags).stdout)
    for name, value in options.items():
        assert record["thresholds"][name.replace("-", "_")] == value


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [
        json.dumps(WORDS),
        "",
        json.dumps({"text": WORDS + " w50", "id": 7}),
        json.dumps({"messages": [{"role": "user", "content": WORDS}]}),
        json.dumps({"prompt": "w4 w6 w8", "output": " " + WORDS}),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_jsonl_gives_a_map_for_each_text_and_tables_over_all(folder, jsonl, tmp_path):
    out = tmp_path / "out"
    done = run("detect", folder, "--jsonl", jsonl, "--out", out, "--batch-size", 3)
    assert done.exit_code == 0, done.output
    names = [f"text-{number:04d}" for number in (1, 3, 4, 5)]
    for name in names:
        for ending in ("safetensors", "csv", "png"):
            assert (out / f"{name}.{ending}").is_file()
        assert name in done.stdout
    assert (out / "levels.png").is_file()
    assert not (out / "sink_detection.jsonl").exists()
    maps = [SinkMap.load(out / f"{name}.safetensors") for name in names]
    assert [sinks.n_tokens for sinks in maps] == [16, 17, 21, 19]
    with (out / "sinks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["text"], int(row["position"])) for row in rows] == [
        (name, sink.position)
        for name, sinks in zip(names, maps, strict=True)
        for sink in sinks.sinks
    ]


@pytest.mark.slow
def test_published_records_of_prompts_with_outputs(folder, jsonl, tmp_path):
    out = tmp_path / "out"
    done = run(
        "detect", folder, "--jsonl", jsonl, "--out", out, "--chat", "--criterion", "published"
    )
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (out / "sink_detection.jsonl").open()]
    # <bos> user w4 w6 w8 <eos> <bos> assistant, and then the output.
    assert records[-1]["prompt_len"] == 8
    assert records[-1]["response_len"] == len(WORDS.split())
    read = ss.read_published(out / "sink_detection.jsonl")
    saved = SinkMap.load(out / "text-0005.safetensors")
    assert [s.layers for s in read[-1].sinks] == [s.layers for s in saved.sinks]
    assert " ".join(saved.token_strings[:8]) == "<bos> <unk> w4 w6 w8 <eos> <bos> <unk>"


def test_one_line_of_json_for_each_text(folder, jsonl):
    done = run("detect", folder, "--jsonl", jsonl, "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["text"] for record in records] == [f"text-{n:04d}" for n in (1, 3, 4, 5)]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a b"', "not JSON"),
        ("17", "int"),
        ('{"question": "a"}', "this has question"),
        ('{"text": ""}', "text must be a string"),
        ('{"prompt": "a", "output": 3}', "output must be a string"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
    ],
)
def test_a_corrupt_line_is_named_before_anything_is_loaded(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'"w3 w4"\n\n{line}\n"w5 w6"\n')
    done = run("detect", "anything", "--jsonl", path)
    assert done.exit_code == 2
    assert "line 3" in done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none was given"),
        (["--text", "a", "--file", "b"], "several"),
        (["--text", ""], "empty"),
        (["--file", "/nowhere/at/all"], "cannot read /nowhere/at/all"),
        (["--text", "a b", "--min-alignment", "2"], "min_alignment must be a cosine"),
        (["--text", "a b", "--criterion", "published", "--min-queries", "4"], "--min-queries"),
        (["--text", "a b", "--device", "toaster"], "'toaster' cannot be used"),
    ],
)
def test_bad_input_is_refused_without_a_model(arguments, message):
    done = run("detect", "anything", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["detect", "demo", "levels"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, command, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(saved_maps, "read_maps", lambda files: pytest.fail("files were read"))
    rest = {"detect": ["m", "--text", "a b"], "demo": [], "levels": ["x.jsonl"]}[command]
    done = run(command, *rest, "--out", tmp_path / "file" / "out")
    assert done.exit_code == 2
    assert "cannot write to" in done.stderr


def test_a_model_that_is_not_there_is_one_line_and_exit_code_1(tmp_path):
    done = run("detect", tmp_path / "no-such-model", "--text", "a b")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "no-such-model" in last
    assert "Traceback" not in done.stderr


def test_debugging_shows_where_it_happened(tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDARY_SINKS_DEBUG", "1")
    done = run("detect", tmp_path / "no-such-model", "--text", "a b")
    assert isinstance(done.exception, ss.LoadError)


def test_an_error_nobody_foresaw_says_how_to_see_more(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("secondary_sinks.loading.load_model.load_model", fail)
    done = run("detect", "m", "--text", "a b")
    assert done.exit_code == 1
    assert "unexpected RuntimeError: out of memory" in done.stderr
    assert "SECONDARY_SINKS_DEBUG=1" in done.stderr


def test_a_text_that_is_too_long_names_the_text(folder, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(WORDS) + "\n" + json.dumps("w3 " * 600) + "\n")
    done = run("detect", folder, "--jsonl", path)
    assert done.exit_code == 2
    assert "text-0002" in done.stderr


def test_a_dtype_reaches_the_weights(folder):
    done = run("detect", folder, "--text", WORDS, "--dtype", "bfloat16", "--json")
    assert json.loads(done.stdout)["model"]["dtype"] == "bfloat16"


def test_levels_of_saved_maps_and_of_records(invented_maps, tmp_path):
    files, records = invented_maps
    out = tmp_path / "levels"
    done = run("levels", *files, records, "--out", out)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out / "levels.csv")
    assert list(table.model) == ["a model", "published"]
    assert list(table.onset) == [8, 16]
    assert list(table.n_sinks) == [4, 1]
    assert (out / "levels.png").is_file()
    assert "published" in done.stdout


@pytest.fixture
def invented_maps(tmp_path):
    """Two saved maps with two sinks each, and one published record."""
    from secondary_sinks.sinks.sink import Sink

    def a_map(name, *sinks):
        return SinkMap(None, (), 99, Provenance(ModelInfo(name)), "published", 0, ((1, 9),), sinks)

    primary = Sink(0, "x", 1, "primary", tuple(range(1, 9)))
    twins = [Sink(p, "y", 2, "secondary", tuple(range(8, 18))) for p in (5, 7)]
    files = [a_map("a model", primary, *twins).save(tmp_path / f"{n}.safetensors") for n in "ab"]
    published = a_map("p", primary, Sink(3, "z", 3, "secondary", tuple(range(16, 30))))
    return files, ss.write_published(tmp_path / "published.jsonl", published)


def test_levels_refuses_what_it_cannot_read(tmp_path, folder):
    wrong = tmp_path / "x.csv"
    wrong.touch()
    assert run("levels", wrong).exit_code == 2
    assert run("levels", tmp_path / "none.safetensors").exit_code == 1
    weights = run("levels", f"{folder}/model.safetensors")
    assert weights.exit_code == 1
    assert "not a SinkMap" in weights.stderr
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "no records" in run("levels", empty).stderr


def test_fetch_prints_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "secondary_sinks.loading.fetch.fetch", lambda alias, progress: tmp_path / alias
    )
    assert run("fetch", "smollm2-135m").stdout == f"{tmp_path / 'smollm2-135m'}\n"


def test_fetch_of_an_unknown_alias():
    done = run("fetch", "smolm2-135m")
    assert done.exit_code == 1
    assert "smollm2-135m" in done.stderr


@pytest.mark.slow
def test_demo_writes_data_and_pictures(folder, tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--model", folder)
    assert done.exit_code == 0, done.output
    names = ("sinks.safetensors", "sinks.csv", "sinks.png", "sinks.pdf")
    for name in names:
        assert (out / name).stat().st_size > 0
        assert f"wrote {out / name}" in done.stdout
    model = ss.load_model(folder, progress=False)
    expected = ss.detect_sinks(model, demo_messages(), max_tokens=400)
    assert same(SinkMap.load(out / "sinks.safetensors"), expected)


def test_the_bundled_conversation_is_one():
    messages = demo_messages()
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert all(message["content"] for message in messages)


def test_json_has_null_for_what_is_not_known(invented_maps):
    files, _ = invented_maps
    record = json_record("x", SinkMap.load(files[0]))
    assert record["sinks"][1]["norm"] is None
    assert json.loads(json.dumps(record, allow_nan=False))["sinks"][1]["layers"] == [*range(8, 18)]


@pytest.mark.slow
def test_interrupting_is_clean(tmp_path):
    code = (
        "import signal, sys, time\n"
        # Whatever started the tests in the background may have set it aside.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import secondary_sinks.loading.load_model as load\n"
        "def slow(*args, **kwargs):\n"
        "    print('loading now', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "load.load_model = slow\n"
        "from secondary_sinks.cli.app import main\n"
        "sys.argv = ['secondary-sinks', 'detect', 'm', '--text', 'a b']\n"
        "main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "loading now" in line:
            break
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "interrupted" in rest
