"""Run every experiment on one or more models, and write an index of figures and verdicts.

    python experiments/run_all.py [--model qwen2.5-coder-0.5b --model smollm2-135m]

Each model is loaded once, the sinks of its texts are found once, and the questions that several
experiments share (writers, removals) are asked once. An experiment that fails is reported in the
index and does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import importlib
import platform
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from levels_over_models import run_models
from shared import MAX_TOKENS, N_TEXTS, Bench, Outcome, make_bench, write

import secondary_sinks as ss

EXPERIMENTS = (
    "figure_1_norms",
    "figure_2_levels",
    "figure_3_primary",
    "figure_4_mlp_stages",
    "figure_5_principal_directions",
    "figure_6_separability",
    "figure_7_norm_law",
    "claim_1_writers",
    "claim_2_dose",
    "claim_3_primary",
    "beyond_neurons",
    "beyond_heads",
    "beyond_erasers",
    "beyond_tokens",
    "beyond_measures",
)
MODELS = ("qwen2.5-coder-0.5b", "smollm2-135m")


def run_on(bench: Bench, folder: Path) -> tuple[dict[str, Outcome], list[str]]:
    """All experiments on one model; outcomes, and the names of those that failed."""
    outcomes, failed = {}, []
    for name in EXPERIMENTS:
        began = time.perf_counter()
        try:
            outcomes[name] = importlib.import_module(name).run(bench)
            write(outcomes[name], name, folder)
        except Exception:
            failed.append(name)
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"{bench.name}: {name}, {time.perf_counter() - began:.0f} s", err=True)
    return outcomes, failed


def index(
    outcomes: dict[str, dict[str, Outcome]], abouts: Sequence[str], over_models: Outcome
) -> str:
    """The index page: each claim with its verdicts and figures, model by model."""
    lines = [
        "# Results",
        "",
        "Made by `make experiments`. The verdicts are written by the scripts from what they "
        "measured, by the rule that each states; they speak of these models and texts.",
        "",
        *(f"* {about}" for about in abouts),
        "",
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, "
        f"transformer-lens {version('transformer-lens')}, secondary_sinks {ss.__version__}.",
        "",
        "| experiment | " + " | ".join(outcomes) + " |",
        "|---|" + "---|" * len(outcomes),
    ]
    for name in EXPERIMENTS:
        cells = [own[name].verdict.answer if name in own else "failed" for own in outcomes.values()]
        lines.append(f"| [{name}](#{name.replace('_', '-')}) | " + " | ".join(cells) + " |")
    for name in EXPERIMENTS:
        claim = (importlib.import_module(name).__doc__ or "").strip()
        title, _, rest = claim.partition("\n")
        lines += ["", f'<a id="{name.replace("_", "-")}"></a>', "", f"## {title.rstrip('.')}"]
        lines += ["", rest.strip()]
        for model, own in outcomes.items():
            lines += ["", f"### {model}", ""]
            lines += _section(own[name], model) if name in own else ["The experiment failed."]
    lines += ["", "## Levels over models", "", *_section(over_models, "")]
    return "\n".join(lines) + "\n"


def _section(outcome: Outcome, folder: str) -> list[str]:
    lines = [str(outcome.verdict)]
    for stem in outcome.figures:
        path = f"{folder}/{stem}.png" if folder else f"{stem}.png"
        lines += ["", f"![{stem}]({path})"]
    return lines


def main(
    model: Annotated[list[str] | None, typer.Option(help="A model; may be given again.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts, one JSON object a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/experiments"),
    n_texts: Annotated[int, typer.Option(min=1, help="Bundled texts to take.")] = N_TEXTS,
    max_tokens: Annotated[int, typer.Option(min=2, help="Cut each text.")] = MAX_TOKENS,
) -> None:
    """Run every experiment on every model."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    abouts, levels, failed = [], [], []
    for name in model or MODELS:
        bench = make_bench(name, texts, n_texts=n_texts, max_tokens=max_tokens)
        folder = Path(name).name
        outcomes[folder], missing = run_on(bench, out / folder)
        failed += missing
        abouts.append(bench.about())
        levels.append(ss.sink_levels(bench.maps))
    over_models = run_models(levels)
    write(over_models, "levels_over_models", out)
    (out / "index.md").write_text(index(outcomes, abouts, over_models), encoding="utf-8")
    typer.echo(out / "index.md")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
