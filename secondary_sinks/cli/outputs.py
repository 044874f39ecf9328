"""What the command line writes: files, one JSON object a text, and the summary of many texts.

Nothing outside the standard library is imported at the top: `secondary-sinks --help` reads this.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondary_sinks.errors import InputError, SecondarySinksError

if TYPE_CHECKING:
    import pandas as pd

    from secondary_sinks.sinks.levels import SinkLevels
    from secondary_sinks.sinks.sink_map import SinkMap


def writable_folder(folder: Path | None) -> Path | None:
    """The folder, made if it is not there; tried now, and not after minutes of work.

    Raises:
        InputError: it cannot be made or written.
    """
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def write_map(folder: Path, name: str, sinks: SinkMap) -> list[Path]:
    """Write a map as data, as a table and as a picture; the paths written."""
    from secondary_sinks.plots.style import save_figure

    return [
        sinks.save(folder / f"{name}.safetensors"),
        write_csv(folder / f"{name}.csv", sinks.to_frame()),
        save_figure(sinks.plot(), folder / f"{name}.png"),
    ]


def write_csv(path: Path, frame: pd.DataFrame) -> Path:
    """Write a table, in place only when it is whole."""
    from secondary_sinks.storage import write_atomically

    return write_atomically(path, lambda part: frame.to_csv(part, index=False))


def write_levels(folder: Path, levels: Sequence[SinkLevels]) -> list[Path]:
    """Write the levels of one or several models as a table and as a picture."""
    import pandas as pd

    from secondary_sinks.plots.plot_sink_levels import plot_sink_levels
    from secondary_sinks.plots.style import save_figure

    frames = []
    for own in levels:
        frame = own.to_frame()
        frame.insert(0, "model", own.model)
        frames.append(frame)
    return [
        write_csv(folder / "levels.csv", pd.concat(frames, ignore_index=True)),
        save_figure(plot_sink_levels(list(levels)), folder / "levels.png"),
    ]


def write_texts(folder: Path, maps: Sequence[SinkMap], names: Sequence[str]) -> Path:
    """Write the sinks of all texts as one table, with the text they are in."""
    import pandas as pd

    frames = []
    for sinks, name in zip(maps, names, strict=True):
        frame = sinks.to_frame()
        frame.insert(0, "text", name)
        frames.append(frame)
    return write_csv(folder / "sinks.csv", pd.concat(frames, ignore_index=True))


def json_record(name: str, sinks: SinkMap) -> dict[str, Any]:
    """A map without its arrays, of what JSON can hold; what is not known is null."""
    rows = json.loads(sinks.to_frame().to_json(orient="records", double_precision=6))
    for row, sink in zip(rows, sinks.sinks, strict=True):
        row["layers"] = list(sink.layers)
    return {
        "text": name,
        "model": sinks.model,
        "n_tokens": sinks.n_tokens,
        "criterion": sinks.criterion,
        "thresholds": sinks.thresholds,
        "primary_position": sinks.primary_position,
        "phases": sinks.phases,
        "sinks": rows,
        "notes": sinks.notes,
    }


def without_arrays(sinks: SinkMap) -> SinkMap:
    """The map with its sinks only: of a long text the arrays are most of the memory."""
    return dataclasses.replace(
        sinks,
        alignment=None,
        centered_alignment=None,
        norm=None,
        centered_norm=None,
        ordinary_norm=None,
        background_centered_norm=None,
        sink_score=None,
        attention_ratio=None,
    )


def read_maps(files: Sequence[Path]) -> dict[str, list[SinkMap]]:
    """Saved and published maps, by model.

    Raises:
        LoadError: a file cannot be read or is no sink map.
        InputError: an ending that says neither, a line that is no record, or no maps at all.
    """
    from secondary_sinks.sinks.published_files import read_published
    from secondary_sinks.sinks.sink_map import SinkMap

    found: dict[str, list[SinkMap]] = {}
    for path in files:
        if path.suffix not in (".safetensors", ".jsonl"):
            raise InputError(
                f"{path} is neither a saved sink map (.safetensors) nor reference records (.jsonl)"
            )
        maps = read_published(path) if path.suffix == ".jsonl" else [SinkMap.load(path)]
        for sinks in maps:
            own = found.setdefault(str(sinks.model.get("name", "?")), [])
            own.append(without_arrays(sinks))
    if not found:
        raise InputError(f"{', '.join(map(str, files))}: no records")
    return found


def one_line(error: Exception) -> str:
    """An error as a person can act on it, on one line."""
    message = str(error)
    if not isinstance(error, SecondarySinksError):
        message = (
            f"unexpected {type(error).__name__}: {message} "
            "(SECONDARY_SINKS_DEBUG=1 shows where it happened)"
        )
    return " ".join(message.split())
