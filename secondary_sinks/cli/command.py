"""What every command shares: its parameters, loading a model, errors as one line, exit codes.

Nothing heavy is imported at the top: `secondary-sinks --help` reads this.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

import typer

from secondary_sinks.errors import InputError, SecondarySinksError

if TYPE_CHECKING:
    from rich.console import Console

    from secondary_sinks.host.protocol import Model

Command = TypeVar("Command", bound=Callable[..., None])

ModelName: TypeAlias = Annotated[
    str, typer.Argument(help="An alias, a hub id, a folder with safetensors or a .gguf file.")
]
Text: TypeAlias = Annotated[str | None, typer.Option(help="The text itself.")]
File: TypeAlias = Annotated[Path | None, typer.Option(help="A text file; - is standard input.")]
Jsonl: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="One text a line: a JSON string, or an object with text, with messages, or with "
        "prompt and output."
    ),
]
Chat: TypeAlias = Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")]
MaxTokens: TypeAlias = Annotated[int | None, typer.Option(min=2, help="Cut each text here.")]
Out: TypeAlias = Annotated[Path | None, typer.Option(help="Folder for data, tables and figures.")]
Device: TypeAlias = Annotated[str | None, typer.Option(help="For example cpu or cuda.")]
Dtype: TypeAlias = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the weights.")
]
Kind: TypeAlias = Annotated[
    Literal["bridge", "hooked"], typer.Option(help="TransformerLens class to load into.")
]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TrustRemoteCode: TypeAlias = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a repository run its own code.")
]


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


def one_line(error: Exception) -> str:
    """An error as a person can act on it, on one line."""
    message = str(error)
    if not isinstance(error, SecondarySinksError):
        message = (
            f"unexpected {type(error).__name__}: {message} "
            "(SECONDARY_SINKS_DEBUG=1 shows where it happened)"
        )
    return " ".join(message.split())


def load(
    model: str,
    *,
    device: str | None = None,
    dtype: str = "float32",
    kind: Literal["bridge", "hooked"] = "bridge",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load the model; say so on standard error.

    Raises:
        InputError: the device cannot be used.
        LoadError, ModelError: as `load_model`.
    """
    typer.echo(f"loading {model}", err=True)
    import torch

    from secondary_sinks.loading.load_model import load_model

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device {device!r} cannot be used: {reason}") from error
    loaded: Model = load_model(
        model,
        device=device,
        dtype=getattr(torch, dtype),
        kind=kind,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=err_console().is_terminal,
    )
    return loaded


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
