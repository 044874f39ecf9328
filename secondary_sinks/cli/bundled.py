"""The command that lists the bundled texts and writes them to a file: `secondary-sinks texts`.

secondary-sinks texts
secondary-sinks texts --kind prose --kind code --out texts.jsonl
secondary-sinks detect smollm2-135m --jsonl texts.jsonl --out out/texts
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secondary_sinks.cli.shared import handled, out_console, say_written
from secondary_sinks.errors import InputError
from secondary_sinks.texts import KINDS, BundledText, bundled_texts


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(handled(texts))


def texts(
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(KINDS)}; may be repeated. By default all."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="A sample of so many, balanced over kinds.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which sample is drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A file for the texts, as detect --jsonl reads them.")
    ] = None,
) -> None:
    """List the bundled texts, and write them to a file."""
    chosen = bundled_texts(kind or None, n=n, seed=seed)
    if out is not None:
        if out.is_dir():
            raise InputError(f"{out} is a folder; give a file, such as {out / 'texts.jsonl'}")
        _write(chosen, out)
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("id", "kind", "language"):
        table.add_column(name, no_wrap=True)
    table.add_column("characters", justify="right", no_wrap=True)
    for text in chosen:
        table.add_row(text.id, text.kind, text.language, str(text.n_characters))
    out_console().print(table)
    say_written(out)


def _write(chosen: Sequence[BundledText], path: Path) -> None:
    from secondary_sinks.storage import write_atomically

    lines = "".join(f"{text.to_json()}\n" for text in chosen)
    write_atomically(path, lambda part: part.write_text(lines, encoding="utf-8", newline="\n"))
