"""Models and texts that are at hand: `secondary-sinks models`, `fetch` and `texts`.

secondary-sinks texts --kind prose --kind code --out texts.jsonl
secondary-sinks detect smollm2-135m --jsonl texts.jsonl --out out/texts
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secondary_sinks.cli.command import err_console, out_console, say_written
from secondary_sinks.errors import InputError
from secondary_sinks.texts import KINDS, bundled_texts


def models() -> None:
    """List the short names of models."""
    from rich.table import Table

    from secondary_sinks.loading.aliases import list_models

    table = Table(box=None, pad_edge=False)
    for name in ("alias", "source", "family", "layers", "needs hub"):
        table.add_column(name, no_wrap=name == "alias", overflow="fold")
    for alias in list_models():
        table.add_row(
            alias.name,
            alias.source if alias.needs_hub else "package index",
            alias.family,
            str(alias.layers or "?"),
            "yes" if alias.needs_hub else "no",
        )
    out_console().print(table, "")
    for alias in list_models():
        if not alias.needs_hub:
            typer.echo(f"{alias.name}: {alias.note}; license {alias.license}")


def fetch(
    alias: Annotated[str, typer.Argument(help="A name that `secondary-sinks models` lists.")],
) -> None:
    """Download a model and convert it, so that loading it needs no network."""
    from secondary_sinks.loading.fetch import fetch as fetch_model

    typer.echo(str(fetch_model(alias, progress=err_console().is_terminal)))


def texts(
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(KINDS)}; may be repeated. By default all."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Draw a sample of this size, balanced by kind.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A file for the texts, as detect --jsonl reads them.")
    ] = None,
) -> None:
    """List the bundled texts, and write them to a file."""
    chosen = bundled_texts(kind or None, n=n, seed=seed)
    if out is not None:
        if out.is_dir():
            raise InputError(f"{out} is a folder; give a file, such as {out / 'texts.jsonl'}")
        from secondary_sinks.storage import write_atomically

        lines = "".join(f"{text.to_json()}\n" for text in chosen)
        write_atomically(out, lambda part: part.write_text(lines, encoding="utf-8", newline="\n"))
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("id", "kind", "language"):
        table.add_column(name, no_wrap=True)
    table.add_column("characters", justify="right", no_wrap=True)
    for text in chosen:
        table.add_row(text.id, text.kind, text.language, str(text.n_characters))
    out_console().print(table)
    say_written(out)
