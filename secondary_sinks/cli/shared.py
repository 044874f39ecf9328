"""What all commands share: errors as one line, loading a model, where output goes.

Nothing heavy is imported at the top: `secondary-sinks --help` reads this.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from secondary_sinks.cli.outputs import one_line
from secondary_sinks.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., None])


class Dtype(str, Enum):
    """Number format of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kind(str, Enum):
    """TransformerLens class to load into."""

    bridge = "bridge"
    hooked = "hooked"


def handled(command: Command) -> Command:
    """The command with errors as one line and the right exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if os.environ.get("SECONDARY_SINKS_DEBUG", "") not in ("", "0"):
                raise
            # Not through rich, which would break the line to the width of the terminal.
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from None

    return run  # type: ignore[return-value]


def load(
    model: str,
    *,
    device: str | None = None,
    dtype: str = "float32",
    kind: str = "bridge",
    **options: Any,
) -> Any:
    """The model, loaded with a word on standard error.

    Raises:
        InputError: the device cannot be used.
        LoadError, ModelError: as `load_model`.
    """
    err = err_console()
    typer.echo(f"loading {model}", err=True)
    import torch

    from secondary_sinks.loading.load_model import load_model

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device {device!r} cannot be used: {reason}") from error
    return load_model(
        model,
        device=device,
        dtype=getattr(torch, dtype),
        kind=kind,  # type: ignore[arg-type]
        progress=err.is_terminal,
        **options,
    )


def say_written(folder: Path | None) -> None:
    """Say where results are, if they were written."""
    if folder is not None:
        typer.echo(f"written to {folder}", err=True)


def out_console() -> Console:
    """Where results go."""
    from rich.console import Console

    return Console(highlight=False)


def err_console() -> Console:
    """Where everything else goes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
