"""The commands that intervene, on a planted model in a folder."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import secondary_sinks as ss
from secondary_sinks.analyses.attribute_to_mlps import MlpAttribution
from secondary_sinks.analyses.dose_response import DoseResponse
from secondary_sinks.analyses.patch_activations import PatchResult
from secondary_sinks.analyses.remove_sinks import SinkRemoval
from secondary_sinks.cli.app import app
from secondary_sinks.planted.planted_model import PlantedPhase, PlantedSink, planted_model


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
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def written(out, name):
    assert {path.name for path in out.iterdir()} == {
        f"{name}.safetensors",
        f"{name}.csv",
        f"{name}.png",
    }
    return out / f"{name}.safetensors"


def test_attribute(planted, folder, tmp_path):
    text = planted.text(48)
    result = run("attribute", folder, "--text", text, "--controls", 3, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    found = MlpAttribution.load(written(tmp_path / "a", "attribution"))
    assert set(found.to_frame().writer) == {3}


def test_dose(planted, folder, tmp_path):
    result = run("dose", folder, "--text", planted.text(48), "--out", tmp_path / "d")
    assert result.exit_code == 0, result.output
    curve = DoseResponse.load(written(tmp_path / "d", "dose")).to_frame()
    assert curve.lifetime.iloc[0] == 0
    assert set(curve.lifetime[curve.scale >= 0.25]) == {3}


def test_remove(planted, folder, tmp_path):
    text = planted.text(48)
    result = run("remove", folder, "--text", text, "--controls", 2, "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    found = SinkRemoval.load(written(tmp_path / "r", "removal"))
    assert not found.reverse
    back = run("remove", folder, "--text", text, "--controls", 2, "--reverse")
    assert back.exit_code == 0, back.output


def test_patch(planted, folder, tmp_path):
    clean = planted.text(24)
    corrupted = clean.replace("t20", "t21")
    result = run(
        "patch", folder, "--clean", clean, "--corrupted", corrupted, "--out", tmp_path / "p"
    )
    assert result.exit_code == 0, result.output
    frame = PatchResult.load(written(tmp_path / "p", "patching")).to_frame()
    assert (frame.site == "mlp_out").any()


def test_bad_input_is_one_line(planted, folder, tmp_path):
    ordinary = planted.text(24).replace("t20", "t21")
    for command in ("attribute", "dose", "remove"):
        result = run(command, folder, "--text", ordinary)
        assert result.exit_code == 2
        assert "no secondary sinks" in result.output
        assert "Traceback" not in result.output
    result = run("patch", folder, "--clean", "t20 t5 t6 t7", "--corrupted", "t20 t5")
    assert result.exit_code == 2
    (tmp_path / "file").write_text("")
    result = run("remove", folder, "--text", ordinary, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot write" in result.output


def test_the_folder_holds_the_planted_model(planted, folder):
    """What the other tests rest on: saving and loading keeps the sinks."""
    model = ss.load_model(folder, progress=False)
    text = planted.text(48)
    sinks = ss.detect_sinks(model, text)
    assert {s.level for s in sinks.secondary} == {(3, 3)}
