"""Every experiment runs on planted models, and its verdict follows from the planted truth."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import PlantedPhase, PlantedSink

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(FOLDER))

import detection  # noqa: E402
import run_all  # noqa: E402
from shared import Bench, Outcome, read_texts, write  # noqa: E402

ANSWERS = ("supported", "not supported", "cannot tell")


@functools.cache
def bench(with_sinks: bool = True) -> Bench:
    """Four texts of a planted model with one writer and two sinks of different strength, or of one
    without secondary sinks."""
    sinks = (
        PlantedSink(token=9, writer=5, norm=80, lifetime=4, feeders=(2, 3)),
        PlantedSink(token=12, writer=5, norm=120, lifetime=5, feeders=(2, 3)),
    )
    planted = ss.planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=400),),
        secondary=sinks if with_sinks else (),
    )
    model = planted.load()
    texts = [planted.tokens(64, seed=seed)[0] for seed in range(4)]
    return Bench(model, tuple(ss.detect_sinks(model, texts)))


@functools.cache
def outcome(name: str) -> Outcome:
    """The outcome of one experiment on it."""
    return importlib.import_module(name).run(bench())


@pytest.mark.parametrize("name", run_all.EXPERIMENTS)
def test_an_experiment_writes_figure_data_and_verdict(name, tmp_path):
    result = outcome(name)
    paths = {path.name for path in write(result, name, tmp_path)}
    assert {f"{name}.png", f"{name}.pdf", f"{name}.csv", f"{name}.txt"} <= paths
    assert all((tmp_path / path).stat().st_size for path in paths)
    assert result.verdict.answer in ANSWERS
    assert str(result.verdict) == (tmp_path / f"{name}.txt").read_text().strip()


@pytest.mark.parametrize("name", run_all.EXPERIMENTS)
def test_a_claim_is_stated_and_cannot_be_told_without_sinks(name):
    module = importlib.import_module(name)
    assert "Claim:" in module.__doc__
    assert module.run(bench(False)).verdict.answer == "cannot tell"


@pytest.mark.parametrize(
    "name",
    [
        "figure_2_levels",
        "figure_4_mlp_stages",
        "claim_1_writers",
        "claim_3_primary",
        "beyond_erasers",
    ],
)
def test_what_was_planted_is_supported(name):
    verdict = outcome(name).verdict
    assert verdict.answer == "supported", verdict.why


def test_the_writers_are_the_planted_ones():
    why = outcome("claim_1_writers").verdict.why
    assert "100 %" in why
    assert "MLP 5" in why
    assert "MLP 2" in why
    assert "MLP 3" in why


def test_attention_rises_with_the_dose_where_lifetime_was_planted():
    """A planted sink is erased in its layer whatever its length, so lifetime does not follow."""
    result = outcome("claim_2_dose")
    why = result.verdict.why
    assert "exceeds 0.8 in 100 %; of written norm and lifetime" in why
    assert set(result.tables["claim_2_sinks"]["saturation_dose"]) == {0.25}, "less makes no sink"
    assert "from a median dose of 25 % of the model's own norm on" in why


def test_the_claim_of_the_dose_holds_where_sinks_fade():
    sink = PlantedSink(token=9, writer=4, norm=80, lifetime=4, fades=True)
    phase = PlantedPhase(start=1, end=15, norm=400)
    planted = ss.planted_model(n_layers=16, phases=(phase,), secondary=(sink,))
    model = planted.load()
    maps = ss.detect_sinks(model, [planted.tokens(64)[0]])
    verdict = importlib.import_module("claim_2_dose").run(Bench(model, tuple(maps))).verdict
    assert verdict.answer == "supported", verdict.why


def test_all_of_them_in_one_command(monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "make_bench", lambda *args, **kwargs: bench())
    monkeypatch.setattr(run_all, "EXPERIMENTS", ("figure_2_levels", "claim_1_writers"))
    run_all.main(model=["planted"], texts=None, out=tmp_path, n_texts=4, max_tokens=400)
    page = (tmp_path / "index.md").read_text()
    assert "| `claim_1_writers` | Supported |" in page
    for name in ("figure_2_levels", "claim_1_writers"):
        assert f"![{name} in planted](planted/{name}.png)" in page
        assert (tmp_path / "planted" / f"{name}.png").exists()
    assert (tmp_path / "levels_over_models.png").exists()
    run_all.main(model=["another"], texts=None, out=tmp_path, n_texts=4, max_tokens=400)
    page = (tmp_path / "index.md").read_text()
    assert "| `claim_1_writers` | Supported | Supported |" in page


def test_a_failed_experiment_stops_no_other(monkeypatch, tmp_path):
    def fail(bench):
        raise RuntimeError("no")

    monkeypatch.setattr(run_all, "make_bench", lambda *args, **kwargs: bench())
    monkeypatch.setattr(run_all, "EXPERIMENTS", ("claim_2_dose", "figure_2_levels"))
    monkeypatch.setattr(importlib.import_module("claim_2_dose"), "run", fail)
    with pytest.raises(typer.Exit):
        run_all.main(model=["planted"], texts=None, out=tmp_path, n_texts=4, max_tokens=400)
    page = (tmp_path / "index.md").read_text()
    assert "| `claim_2_dose` | Failed |" in page
    assert "| `figure_2_levels` | Supported |" in page


def test_texts_are_read_from_json_lines(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    entries = [
        "plain",
        {"text": "in text"},
        {"messages": messages},
        {"prompt": "a ", "output": "b"},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    assert read_texts(path) == ["plain", "in text", messages, "a b"]


def test_every_script_is_run():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    others = {"run_all", "shared", "levels_over_models", "architectures", "detection"}
    assert scripts == {*run_all.EXPERIMENTS, *others}


def test_detection_is_compared_with_attention_text_by_text():
    """On a planted model whose sinks live long enough to be clear."""
    planted = ss.planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=400),),
        secondary=(PlantedSink(token=9, writer=3, norm=300, lifetime=7),),
    )
    model = planted.load()
    texts = [planted.text(400, seed=seed) for seed in range(2)]
    rows = pd.DataFrame(list(detection.checks(model, texts, (100, 300))))
    assert rows[["form", "n_tokens", "text"]].values.tolist() == [
        ["plain", n, text] for text in range(2) for n in (100, 300)
    ]
    table = detection.summary(rows)
    assert table["texts"].tolist() == [2, 2]
    assert table["clear_sinks"].sum() == rows["called"].sum() > 0
    assert (table["precision"].dropna() == 1).all()
    assert (table["false_calls"] == 0).all()
    assert all(len(text) > 500 for text in detection.long_texts(4, 500))
