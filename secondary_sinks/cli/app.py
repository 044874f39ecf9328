"""The command line: `secondary-sinks detect`, `attribute-to-mlps`, `remove-sinks`, ... and `demo`.

    secondary-sinks demo
    secondary-sinks detect smollm2-135m --text "Once upon a time ..." --out out/tale
    secondary-sinks attribute-to-mlps smollm2-135m --file tale.txt --out out/tale
    secondary-sinks norm-law ./my-finetune --jsonl answers.jsonl --chat --out out/answers
    secondary-sinks levels out/answers/*.safetensors --out out/levels

`detect` and `demo` are in `cli.detect`; every analysis is a command made from the table in
`cli.analyses`; `check` is in `cli.check`; `models`, `fetch` and `texts` are in `cli.catalog`,
`levels` is in `cli.saved_maps`.

Results go to standard output, everything else (progress, what was written where, errors) to
standard error. Exit codes: 0, 1 for a model or file that cannot be loaded and for a failed `check`,
2 for bad input, 130 after Ctrl-C. An error is one line; with `SECONDARY_SINKS_DEBUG=1` in the
environment it is a traceback.

PyTorch and TransformerLens are imported inside the commands that need them, so that `--help`
answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from secondary_sinks import __version__
from secondary_sinks.cli.analyses import ANALYSES, command_of
from secondary_sinks.cli.catalog import fetch, models, texts
from secondary_sinks.cli.check import check
from secondary_sinks.cli.command import handled
from secondary_sinks.cli.detect import demo, detect
from secondary_sinks.cli.saved_maps import levels

app = typer.Typer(
    name="secondary-sinks",
    help="Attention sinks of a language model: which tokens, which MLP made them, what they do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"secondary-sinks {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Hold the options that belong to no command."""


for _first in (demo, detect, levels):
    app.command()(handled(_first))
for _analysis in ANALYSES:
    app.command(_analysis.name, help=_analysis.help)(handled(command_of(_analysis)))
for _last in (check, models, fetch, texts):
    app.command()(handled(_last))


def main() -> None:
    """Entry point of the `secondary-sinks` command."""
    app()
