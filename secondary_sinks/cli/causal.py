"""The commands that intervene: `secondary-sinks attribute`, `dose`, `patch`, `remove`.

Each asks one question about one text, prints a table, and with `--out` writes the result as data,
as a table and as a picture. PyTorch and TransformerLens are imported inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondary_sinks.cli.inputs import as_model_input, read_sources
from secondary_sinks.cli.outputs import writable_folder, write_csv
from secondary_sinks.cli.shared import Dtype, err_console, handled, load, out_console, say_written
from secondary_sinks.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Model = Annotated[
    str, typer.Argument(help="An alias, a hub id, a folder with safetensors or a .gguf file.")
]
Text = Annotated[str | None, typer.Option(help="The text itself.")]
File = Annotated[Path | None, typer.Option(help="A text file; - is standard input.")]
Chat = Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")]
Out = Annotated[Path | None, typer.Option(help="Folder for data, table and figure.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Cut the text here.")]
Device = Annotated[str | None, typer.Option(help="For example cpu or cuda.")]
Weights = Annotated[Dtype, typer.Option("--dtype", help="Of the weights.")]
Position = Annotated[
    int | None, typer.Option(min=0, help="The sink's token; by default the strongest.")
]
Seed = Annotated[int, typer.Option(help="Decides which controls are drawn.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (attribute, dose, patch, remove):
        app.command()(handled(command))


def attribute(
    model: Model,
    text: Text = None,
    file: File = None,
    chat: Chat = False,
    max_tokens: MaxTokens = None,
    controls: Annotated[int, typer.Option(min=1, help="Control tokens for each sink.")] = 8,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    dtype: Weights = Dtype.float32,
) -> None:
    """Name the MLP that wrote each secondary sink, and those that it needs."""
    folder = writable_folder(out)
    loaded, sinks = _sinks(model, text, file, chat, max_tokens, device, dtype)
    from secondary_sinks.analyses.attribution.attribute_to_mlps import attribute_to_mlps

    result = attribute_to_mlps(
        loaded, sinks, n_controls=controls, seed=seed, progress=err_console().is_terminal
    )
    _finish(result, "attribution", folder)


def dose(
    model: Model,
    text: Text = None,
    file: File = None,
    chat: Chat = False,
    max_tokens: MaxTokens = None,
    position: Position = None,
    writer: Annotated[int | None, typer.Option(min=0, help="Layer of the MLP to scale.")] = None,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    dtype: Weights = Dtype.float32,
) -> None:
    """Scale a sink's writer, and see what the written norm does to score and lifetime."""
    folder = writable_folder(out)
    loaded, sinks = _sinks(model, text, file, chat, max_tokens, device, dtype)
    from secondary_sinks.analyses.dose_response import dose_response

    result = dose_response(
        loaded,
        sinks,
        _strongest(sinks) if position is None else position,
        writer=writer,
        seed=seed,
        progress=err_console().is_terminal,
    )
    _finish(result, "dose", folder)


def patch(
    model: Model,
    clean: Annotated[str, typer.Option(help="The text with the sink.")],
    corrupted: Annotated[str, typer.Option(help="The text to compare with, of equal length.")],
    chat: Chat = False,
    position: Position = None,
    noising: Annotated[
        bool, typer.Option("--noising", help="Patch the clean run with the corrupted one's.")
    ] = False,
    scan: Annotated[
        bool, typer.Option("--scan", help="Estimate by gradients; check the largest exactly.")
    ] = False,
    out: Out = None,
    device: Device = None,
    dtype: Weights = Dtype.float32,
) -> None:
    """Patch activations between two texts, layer by position, and measure a sink."""
    folder = writable_folder(out)
    loaded = load(model, device=device, dtype=dtype.value)
    from secondary_sinks.analyses.patch_activations import patch_activations

    result = patch_activations(
        loaded,
        clean,
        corrupted,
        position=position,
        direction="noising" if noising else "denoising",
        scan="attribution" if scan else "exact",
        chat=chat,
        progress=err_console().is_terminal,
    )
    _finish(result, "patching", folder)


def remove(
    model: Model,
    text: Text = None,
    file: File = None,
    chat: Chat = False,
    max_tokens: MaxTokens = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Add sinks to ordinary tokens instead.")
    ] = False,
    controls: Annotated[int, typer.Option(min=0, help="Runs with ordinary tokens edited.")] = 5,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    dtype: Weights = Dtype.float32,
) -> None:
    """Silence all secondary sinks at their writers: primary, loss and output of the text."""
    folder = writable_folder(out)
    loaded, sinks = _sinks(model, text, file, chat, max_tokens, device, dtype)
    from secondary_sinks.analyses.remove_sinks import remove_sinks

    result = remove_sinks(
        loaded,
        sinks,
        reverse=reverse,
        n_controls=controls,
        seed=seed,
        progress=err_console().is_terminal,
    )
    _finish(result, "removal", folder)


def _sinks(
    model: str,
    text: str | None,
    file: Path | None,
    chat: bool,
    max_tokens: int | None,
    device: str | None,
    dtype: Dtype,
) -> tuple[Any, Any]:
    """The loaded model and the sink map of the text."""
    (source,) = read_sources(text, file, None)
    loaded = load(model, device=device, dtype=dtype.value)
    from secondary_sinks.sinks.detect_sinks import detect_sinks

    given, _ = as_model_input(loaded, source, chat=chat)
    sinks = detect_sinks(loaded, given, chat=chat, max_tokens=max_tokens)
    typer.echo(repr(sinks), err=True)
    return loaded, sinks


def _strongest(sinks: Any) -> Any:
    if not sinks.secondary:
        raise InputError("no secondary sinks in this text; name a token with --position")
    return max(sinks.secondary, key=lambda sink: sink.sink_score)


def _finish(result: Any, name: str, folder: Path | None) -> None:
    """Print the table, and write data, table and picture."""
    frame: pd.DataFrame = result.to_frame()
    typer.echo(repr(result), err=True)
    out_console().print(frame.to_string(index=False), soft_wrap=True, markup=False)
    if folder is not None:
        from secondary_sinks.plots.style import save_figure

        result.save(folder / f"{name}.safetensors")
        write_csv(folder / f"{name}.csv", frame)
        save_figure(result.plot(), folder / f"{name}.png")
    say_written(folder)
