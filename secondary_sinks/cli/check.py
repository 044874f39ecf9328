"""`secondary-sinks check MODEL`: what works on a model, line by line."""

from __future__ import annotations

from typing import Annotated

import typer

from secondary_sinks.cli.command import (
    Device,
    Dtype,
    Kind,
    ModelName,
    Out,
    Revision,
    TrustRemoteCode,
    load,
    out_console,
    say_written,
)
from secondary_sinks.cli.outputs import writable_folder, write_csv

_COLORS = {"ok": "green", "refused": "yellow", "failed": "red"}


def check(
    model: ModelName,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the text for which memory is estimated.")
    ] = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = "float32",
    kind: Kind = "bridge",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what works on a model; exit code 1 if something fails."""
    folder = writable_folder(out)
    loaded = load(
        model,
        device=device,
        dtype=dtype,
        kind=kind,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    from rich.markup import escape
    from rich.table import Table

    from secondary_sinks.analyses.check_model import check_model

    result = check_model(loaded, n_tokens=tokens)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ("what", "outcome", "detail"):
        table.add_column(name, no_wrap=name != "detail", overflow="fold")
    for line in result.checks:
        color = _COLORS[line.outcome]
        table.add_row(line.what, f"[{color}]{line.outcome}[/]", escape(line.detail))
    out_console().print(table)
    if folder is not None:
        result.save(folder / "check.safetensors")
        write_csv(folder / "check.csv", result.to_frame())
        say_written(folder)
    if not result.passed:
        raise typer.Exit(1)
