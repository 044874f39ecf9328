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

from secondary_sinks.errors import InputError

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


def write_map(folder: Path, name: str, sink_map: SinkMap) -> list[Path]:
    """Write a map as data, as a table and as a picture; the paths written."""
    from secondary_sinks.plots.style import save_figure

    return [
        sink_map.save(folder / f"{name}.safetensors"),
        write_csv(folder / f"{name}.csv", sink_map.to_frame()),
        save_figure(sink_map.plot(), folder / f"{name}.png"),
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
        frame.insert(0, "model", own.provenance.model.name)
        frames.append(frame)
    return [
        write_csv(folder / "levels.csv", pd.concat(frames, ignore_index=True)),
        save_figure(plot_sink_levels(list(levels)), folder / "levels.png"),
    ]


def write_texts(folder: Path, maps: Sequence[SinkMap], names: Sequence[str]) -> Path:
    """Write the sinks of all texts as one table, with the text they are in."""
    import pandas as pd

    frames = []
    for sink_map, name in zip(maps, names, strict=True):
        frame = sink_map.to_frame()
        frame.insert(0, "text", name)
        frames.append(frame)
    return write_csv(folder / "sinks.csv", pd.concat(frames, ignore_index=True))


def json_record(name: str, sink_map: SinkMap) -> dict[str, Any]:
    """A map without its arrays, of what JSON can hold; what is not known is null."""
    rows = json.loads(sink_map.to_frame().to_json(orient="records", double_precision=6))
    for row, sink in zip(rows, sink_map.sinks, strict=True):
        row["layers"] = list(sink.layers)
    return {
        "text": name,
        "model": dataclasses.asdict(sink_map.provenance.model),
        "weights": sink_map.provenance.weights,
        "n_tokens": sink_map.n_tokens,
        "criterion": sink_map.criterion,
        "thresholds": sink_map.thresholds,
        "primary_position": sink_map.primary_position,
        "phases": sink_map.phases,
        "sinks": rows,
        "notes": sink_map.notes,
    }


def without_arrays(sink_map: SinkMap) -> SinkMap:
    """The map with its sinks only: of a long text the arrays are most of the memory."""
    import torch

    arrays: dict[str, Any] = {
        field.name: None
        for field in dataclasses.fields(sink_map)
        if isinstance(getattr(sink_map, field.name), torch.Tensor) and field.name != "tokens"
    }
    return dataclasses.replace(sink_map, judge=None, **arrays)
