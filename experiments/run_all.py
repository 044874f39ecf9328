"""Run every experiment on one or more models, and write an index of figures and verdicts.

    python experiments/run_all.py [--model qwen2.5-coder-0.5b --model smollm2-135m]

Each model is loaded once, the sinks of its texts are detected once, and the analyses that several
experiments share (writers, removals) run once. An experiment that fails is reported in the index
and does not stop the others; the exit code is then 1. The index covers all models whose results are
in the folder, so another model can be added later, or run at the same time.
"""

from __future__ import annotations

import importlib
import platform
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from levels_over_models import run_models
from shared import MAX_TOKENS, N_TEXTS, Bench, make_bench, write

import secondary_sinks as ss

KINDS = ("figure", "claim", "beyond")
"""An experiment is a script whose name begins with one of these; they run in this order."""
EXPERIMENTS = tuple(
    sorted(
        (
            path.stem
            for path in Path(__file__).parent.glob("*_*.py")
            if path.stem.split("_")[0] in KINDS
        ),
        key=lambda name: (KINDS.index(name.split("_")[0]), name),
    )
)
MODELS = ("qwen2.5-coder-0.5b", "smollm2-135m")
LEVELS, ABOUT = "levels.safetensors", "about.txt"


def run_on(bench: Bench, folder: Path) -> list[str]:
    """Run all experiments on one model; return the names of those that failed."""
    failed = []
    for name in EXPERIMENTS:
        began = time.perf_counter()
        try:
            write(importlib.import_module(name).run(bench), name, folder)
        except Exception:
            failed.append(name)
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"{bench.name}: {name}, {time.perf_counter() - began:.0f} s", err=True)
    ss.sink_levels(bench.maps).save(folder / LEVELS)
    (folder / ABOUT).write_text(f"{bench.about()}\n", encoding="utf-8")
    return failed


def index(out: Path) -> str:
    """The page of all models with results below `out`: verdicts and figures by claim."""
    folders = sorted(path.parent for path in out.glob(f"*/{ABOUT}"))
    lines = [
        "# Results",
        "",
        "Made by `make experiments`. Each script writes its verdict from what it measured, by the "
        "rule that it states. A verdict holds for these models and texts.",
        "",
        *(f"* {(folder / ABOUT).read_text().strip()}" for folder in folders),
        "",
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, "
        f"transformer-lens {version('transformer-lens')}, secondary_sinks {ss.__version__}.",
        "",
        "| experiment | " + " | ".join(folder.name for folder in folders) + " |",
        "|---|" + "---|" * len(folders),
    ]
    for name in EXPERIMENTS:
        cells = [_verdict(folder, name).split("**")[1].rstrip(".") for folder in folders]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    for name in EXPERIMENTS:
        claim = (importlib.import_module(name).__doc__ or "").strip()
        title, _, rest = claim.partition("\n")
        lines += ["", f"## {title.rstrip('.')}", "", f"`experiments/{name}.py`. {rest.strip()}"]
        for folder in folders:
            figures = sorted(path.name for path in folder.glob(f"{name}*.png"))
            lines += ["", f"### {folder.name}", "", _verdict(folder, name)]
            for figure in figures:
                lines += ["", f"![{name} in {folder.name}]({folder.name}/{figure})"]
    lines += ["", "## Levels over models", "", _verdict(out, "levels_over_models")]
    lines += ["", "![sink levels of every model](levels_over_models.png)"]
    return "\n".join(lines) + "\n"


def _verdict(folder: Path, name: str) -> str:
    path = folder / f"{name}.txt"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "**Failed.** See the log."


def main(
    model: Annotated[list[str] | None, typer.Option(help="A model; may be given again.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts, one JSON object a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/experiments"),
    n_texts: Annotated[int, typer.Option(min=1, help="Bundled texts to take.")] = N_TEXTS,
    max_tokens: Annotated[int, typer.Option(min=2, help="Cut each text.")] = MAX_TOKENS,
) -> None:
    """Run every experiment on every model."""
    failed = []
    for name in model or MODELS:
        bench = make_bench(name, texts, n_texts=n_texts, max_tokens=max_tokens)
        failed += run_on(bench, out / Path(name).name)
    levels = [ss.SinkLevels.load(path) for path in sorted(out.glob(f"*/{LEVELS}"))]
    write(run_models(levels), "levels_over_models", out)
    (out / "index.md").write_text(index(out), encoding="utf-8")
    typer.echo(out / "index.md")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
