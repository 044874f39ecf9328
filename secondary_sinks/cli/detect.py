"""`secondary-sinks detect` and `secondary-sinks demo`: the sinks of one text or of many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from secondary_sinks.cli.command import (
    Chat,
    Device,
    Dtype,
    File,
    Jsonl,
    Kind,
    MaxTokens,
    ModelName,
    Out,
    Revision,
    Text,
    TrustRemoteCode,
    err_console,
    load,
    out_console,
    say_written,
)
from secondary_sinks.cli.inputs import Source, as_model_input, read_sources
from secondary_sinks.cli.outputs import (
    json_record,
    without_arrays,
    writable_folder,
    write_levels,
    write_map,
    write_texts,
)
from secondary_sinks.errors import InputError

if TYPE_CHECKING:
    from secondary_sinks.host.protocol import Model
    from secondary_sinks.sinks.sink_map import SinkMap

DEMO_MODEL = "qwen2.5-coder-0.5b"
DEMO_TOKENS = 400


def detect(
    model: ModelName,
    text: Text = None,
    file: File = None,
    jsonl: Jsonl = None,
    chat: Chat = False,
    criterion: Annotated[
        Literal["evidence", "published"], typer.Option(help="What counts as a sink.")
    ] = "evidence",
    out: Out = None,
    max_tokens: MaxTokens = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one forward pass.")] = 1,
    device: Device = None,
    dtype: Dtype = "float32",
    kind: Kind = "bridge",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    min_alignment: Annotated[float | None, typer.Option(help="Least cosine.")] = None,
    min_norm_ratio: Annotated[float | None, typer.Option(help="Least norm over median.")] = None,
    min_attention_ratio: Annotated[
        float | None, typer.Option(help="Least attention over that of tokens nearby.")
    ] = None,
    min_strength: Annotated[
        float | None,
        typer.Option(help="Least attention, in a unit that does not depend on the text's length."),
    ] = None,
    min_lifetime: Annotated[int | None, typer.Option(help="Least number of layers.")] = None,
    min_primary_ratio: Annotated[
        float | None, typer.Option(help="Least norm over median of the primary sink.")
    ] = None,
    min_queries: Annotated[
        int | None,
        typer.Option(help="Least number of later tokens of a token in the attention baseline."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a text, nothing else.")
    ] = False,
) -> None:
    """Find the attention sinks of one text or of many."""
    given = {
        "min_alignment": min_alignment,
        "min_norm_ratio": min_norm_ratio,
        "min_attention_ratio": min_attention_ratio,
        "min_strength": min_strength,
        "min_lifetime": min_lifetime,
        "min_primary_ratio": min_primary_ratio,
        "min_queries": min_queries,
    }
    thresholds = {name: value for name, value in given.items() if value is not None}
    sources = read_sources(text, file, jsonl)
    _check_thresholds(criterion, thresholds)
    folder = writable_folder(out)
    loaded = load(
        model,
        device=device,
        dtype=dtype,
        kind=kind,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    options = {"criterion": criterion, "max_tokens": max_tokens, **thresholds}
    maps, lengths = [], []
    for source, sink_map, length in detect_all(
        loaded, sources, chat=chat, batch_size=batch_size, folder=folder, options=options
    ):
        if as_json:
            typer.echo(json.dumps(json_record(source.name, sink_map)))
        elif jsonl is None:
            _print_report(sink_map)
        maps.append(without_arrays(sink_map))
        lengths.append(sink_map.n_tokens if length is None else min(length, sink_map.n_tokens))
    if jsonl is not None:
        _finish_many(maps, [source.name for source in sources], folder, printed=not as_json)
        if folder is not None and criterion == "published":
            from secondary_sinks.sinks.published_files import write_published

            write_published(folder / "sink_detection.jsonl", maps, prompt_lengths=lengths)
    say_written(folder)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help="Another model to try it on.")] = DEMO_MODEL,
) -> None:
    """Find the sinks of a bundled conversation, and write them as data and as a picture."""
    folder = writable_folder(out)
    loaded = load(model)
    from secondary_sinks.plots.style import save_figure
    from secondary_sinks.sinks.detect_sinks import detect_sinks

    sink_map = detect_sinks(loaded, [demo_messages()], max_tokens=DEMO_TOKENS, progress=False)[0]
    _print_report(sink_map)
    if folder is None:
        return
    written = write_map(folder, "sinks", sink_map)
    written.append(save_figure(sink_map.plot(), folder / "sinks.pdf"))
    for path in written:
        typer.echo(f"wrote {path}")


def demo_messages() -> list[dict[str, str]]:
    """The bundled conversation: a word problem, solved in steps."""
    from importlib.resources import files

    bundled = files("secondary_sinks") / "data" / "demo_prompt.json"
    messages: list[dict[str, str]] = json.loads(bundled.read_text(encoding="utf-8"))["messages"]
    return messages


def detect_all(
    model: Model,
    sources: Sequence[Source],
    *,
    chat: bool,
    batch_size: int = 1,
    folder: Path | None = None,
    options: dict[str, Any],
) -> Iterator[tuple[Source, SinkMap, int | None]]:
    """Sink map and prompt length of each text, written as soon as it is there.

    One batch at a time: a map of a long text holds megabytes, and a stop half way should leave
    what was finished.
    """
    from rich.progress import track

    from secondary_sinks.sinks.detect_sinks import detect_sinks
    from secondary_sinks.sinks.selection import listed

    batches = [sources[i : i + batch_size] for i in range(0, len(sources), batch_size)]
    hidden = len(batches) == 1 or not err_console().is_terminal
    for batch in track(batches, "detecting sinks", console=err_console(), disable=hidden):
        try:
            inputs = [as_model_input(model, source, chat=chat) for source in batch]
            maps: SinkMap | list[SinkMap] = detect_sinks(
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
        for source, sink_map, (_, length) in zip(batch, listed(maps), inputs, strict=True):
            if folder is not None:
                write_map(folder, source.name, sink_map)
            yield source, sink_map, length


def _check_thresholds(criterion: str, thresholds: dict[str, float | int]) -> None:
    if criterion == "published" and thresholds:
        name = sorted(thresholds)[0].replace("_", "-")
        raise InputError(f"--{name} goes with --criterion evidence; the published one has none")
    from secondary_sinks.sinks.criterion import check_thresholds

    check_thresholds(thresholds)


def _print_report(sink_map: SinkMap) -> None:
    from secondary_sinks.cli.sink_table import sink_report

    out_console().print(sink_report(sink_map))


def _finish_many(
    maps: Sequence[SinkMap], names: Sequence[str], folder: Path | None, *, printed: bool
) -> None:
    """Print and write the tables over all texts."""
    from secondary_sinks.cli.sink_table import levels_table, texts_table
    from secondary_sinks.sinks.levels import sink_levels

    levels = sink_levels(maps)
    if printed:
        out_console().print(texts_table(maps, names))
        out_console().print(levels_table([levels]))
    if folder is not None:
        write_texts(folder, maps, names)
        write_levels(folder, [levels])
