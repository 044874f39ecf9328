"""Every analysis as a command: the table is true, and each command writes its result."""

from __future__ import annotations

import inspect
import json

import pandas as pd
import pytest
from typer.testing import CliRunner

import secondary_sinks as ss
from secondary_sinks.cli.analyses import ANALYSES
from secondary_sinks.cli.app import app
from secondary_sinks.planted.planted_model import PlantedPhase, PlantedSink, planted_model
from secondary_sinks.result import Result

NOT_COMMANDS = {"pool_attributions", "mean_activations", "check_model"}
"""Functions of results at hand already, of whole corpora, and one with its own command."""


@pytest.fixture(scope="module")
def planted():
    return planted_model(
        n_layers=8,
        phases=(PlantedPhase(start=1, end=7, norm=300),),
        secondary=(PlantedSink(token=20, writer=3, norm=80, lifetime=3),),
    )


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    planted.hf.save_pretrained(path)
    planted.tokenizer.save_pretrained(path)
    texts = "".join(json.dumps(planted.text(48, seed=seed)) + "\n" for seed in range(3))
    (path / "texts.jsonl").write_text(texts)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def texts_of(analysis, planted, folder):
    if analysis.takes == "two maps":
        clean = planted.text(24)
        return ["--clean", clean, "--corrupted", clean.replace("t20", "t21")]
    if analysis.takes in ("maps", "maps alone"):
        return ["--jsonl", folder / "texts.jsonl"]
    return ["--text", planted.text(48)]


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: analysis.name)
def test_options_and_defaults_are_those_of_the_function(analysis):
    parameters = inspect.signature(analysis.load()).parameters
    for option in analysis.options:
        assert parameters[option.name].default == option.default, option.name
    names = list(parameters)
    assert ("model" in names) == (analysis.takes != "maps alone")
    assert ("sinks" in names) or analysis.takes not in ("map and sinks",)


def test_every_analysis_is_a_command():
    functions = {
        name
        for name in ss.__all__
        if inspect.isfunction(getattr(ss, name))
        and getattr(ss, name).__module__.startswith("secondary_sinks.analyses")
    }
    assert functions <= {analysis.function for analysis in ANALYSES} | NOT_COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: analysis.name)
def test_a_command_writes_data_table_and_figure(analysis, planted, folder, tmp_path):
    done = run(analysis.name, folder, *texts_of(analysis, planted, folder), "--out", tmp_path)
    assert done.exit_code == 0, done.output
    written = {path.suffix: path for path in tmp_path.iterdir()}
    assert {path.name for path in written.values()} == {
        f"{analysis.name}{ending}" for ending in (".safetensors", ".csv", ".png")
    }
    kinds = [value for value in vars(ss).values() if inspect.isclass(value)]
    kinds += [getattr(ss, name) for name in ss.__all__]
    result_types = {
        kind.__name__: kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Result)
    }
    returns = inspect.signature(analysis.load()).return_annotation
    result = result_types[returns].load(written[".safetensors"])
    assert len(pd.read_csv(written[".csv"])) == len(result.to_frame())
    assert result.provenance.model.n_layers == 8


@pytest.mark.slow
def test_sinks_are_chosen_by_kind_and_by_position(planted, folder):
    text = planted.text(48)
    every = run("attribute-to-mlps", folder, "--text", text, "--n-controls", 2)
    assert every.exit_code == 0, every.output
    assert "MLP 3" in every.stderr
    model = ss.load_model(folder, progress=False)
    sink = ss.detect_sinks(model, text).secondary[0]
    options = ("--n-controls", 2, "--position", sink.position)
    one = run("attribute-to-mlps", folder, "--text", text, *options)
    assert "1 sink" in one.stderr
    nothing = run("attribute-to-mlps", folder, "--text", text, "--min-lifetime", 7)
    assert nothing.exit_code == 2
    assert "pass the filter" in nothing.stderr
    assert nothing.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_bad_input_is_one_line(planted, folder, tmp_path):
    ordinary = planted.text(24).replace("t20", "t21")
    done = run("dose-response", folder, "--text", ordinary)
    assert done.exit_code == 2
    assert "name a token with --position" in done.stderr
    for command in ("attribute-to-mlps", "remove-sinks"):
        done = run(command, folder, "--text", ordinary)
        assert done.exit_code == 2
        assert "no secondary sinks" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
    lengths = ("--clean", "t20 t5 t6 t7", "--corrupted", "t20 t5")
    assert run("patch-activations", folder, *lengths).exit_code == 2
    (tmp_path / "file").write_text("")
    done = run("remove-sinks", folder, "--text", ordinary, "--out", tmp_path / "file")
    assert done.exit_code == 2
    assert "cannot write" in done.stderr


@pytest.mark.slow
def test_the_folder_holds_the_planted_model(planted, folder):
    """What the other tests rest on: saving and loading keeps the sinks."""
    model = ss.load_model(folder, progress=False)
    sink_map = ss.detect_sinks(model, planted.text(48))
    assert {sink.level for sink in sink_map.secondary} == {(3, 3)}
