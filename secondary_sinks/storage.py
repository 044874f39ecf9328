"""Results on disk: one safetensors file, with everything that is not a tensor in its header.

A file is written to a temporary name in its folder and then renamed, so that a reader never sees a
partial file, also after a crash.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secondary_sinks.errors import InputError, LoadError

FORMAT = 1


def save_record(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> Path:
    """Write tensors and a JSON-able record to one file.

    Raises:
        InputError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    from secondary_sinks import __version__

    header = {
        "kind": kind,
        "format": str(FORMAT),
        "secondary_sinks": __version__,
        "record": json.dumps(record),
    }
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return write_atomically(path, lambda part: save_file(copies, part, metadata=header))


def load_record(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_record` wrote.

    Raises:
        LoadError: the file does not exist, holds something else, or has a newer format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoadError(f"cannot read {path}: {error}") from error
    if header.get("kind") != kind:
        raise LoadError(f"{path} holds {header.get('kind') or 'something else'}, not a {kind}")
    if int(header["format"]) > FORMAT:
        raise LoadError(
            f"{path} was written by secondary_sinks {header['secondary_sinks']}; update to read it"
        )
    return tensors, json.loads(header["record"])


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
