"""`secondary-sinks levels`: questions to sink maps that are there already, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondary_sinks.cli.command import Out, out_console, say_written
from secondary_sinks.cli.outputs import without_arrays, writable_folder, write_levels
from secondary_sinks.errors import InputError

if TYPE_CHECKING:
    from secondary_sinks.sinks.sink_map import SinkMap


def levels(
    files: Annotated[
        list[Path],
        typer.Argument(help="Saved sink maps (.safetensors) or published records (.jsonl)."),
    ],
    out: Out = None,
    max_spread: Annotated[
        int, typer.Option(min=0, help="Lifetimes this close are one level (in layers).")
    ] = 2,
) -> None:
    """Count sinks by onset and lifetime, one table for each model."""
    folder = writable_folder(out)
    from secondary_sinks.cli.sink_table import levels_table
    from secondary_sinks.sinks.levels import sink_levels

    by_model = [sink_levels(maps, max_spread=max_spread) for maps in read_maps(files).values()]
    out_console().print(levels_table(by_model))
    if folder is not None:
        write_levels(folder, by_model)
    say_written(folder)


def read_maps(files: Sequence[Path]) -> dict[tuple[str, str | None], list[SinkMap]]:
    """Saved and published maps, by name and weights of the model.

    Raises:
        LoadError: a file cannot be read or does not hold a sink map.
        InputError: an ending that says neither, a line that is no record, or no maps at all.
    """
    from secondary_sinks.sinks.published_files import read_published
    from secondary_sinks.sinks.sink_map import SinkMap

    by_model: dict[tuple[str, str | None], list[SinkMap]] = {}
    for path in files:
        if path.suffix not in (".safetensors", ".jsonl"):
            raise InputError(
                f"{path} is neither a saved sink map (.safetensors) nor published records (.jsonl)"
            )
        maps = read_published(path) if path.suffix == ".jsonl" else [SinkMap.load(path)]
        for sink_map in maps:
            model = (sink_map.model_name, sink_map.provenance.weights)
            by_model.setdefault(model, []).append(without_arrays(sink_map))
    if not by_model:
        raise InputError(f"{', '.join(map(str, files))}: no records")
    return by_model
