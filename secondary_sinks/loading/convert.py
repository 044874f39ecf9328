"""Convert a GGUF checkpoint into a safetensors folder that loads in a second.

transformers reads `.gguf` files, but it dequantizes the weights every time (10 to 20 seconds for
half a billion parameters), and it refuses to save the model that it returns. Here the weights are
dequantized once and written as float32 safetensors, which are memory-mapped when they are loaded.
The numbers do not change: logits of the folder equal those of the `.gguf` file bit for bit.

The folder takes more disk space than the checkpoint (2.5 GB for 0.5B parameters). A `.gguf` file
that this library downloaded is therefore deleted after its conversion. A user's own file is only
read. Its folder in the cache is named after the file and its SHA-256, so a changed file is
converted again, and a copy under the same name is not.

A folder appears under its final name by one rename, complete with its record
`secondary_sinks.json` (SHA-256 and size of the source, sizes of the files written, versions of the
libraries that wrote them). A folder without a record, or with files of other sizes, is damaged.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secondary_sinks import __version__
from secondary_sinks.errors import LoadError
from secondary_sinks.loading.cache import staging_folder
from secondary_sinks.loading.messages import one_line, quiet_transformers

RECORD = "secondary_sinks.json"
"""Name of the record inside a converted folder."""


def target_folder(root: Path, name: str, digest: str) -> Path:
    """Where the cache `root` keeps the conversion of checkpoint `name` with SHA-256 `digest`."""
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return root / "models" / f"{safe_name}-{digest[:16]}"


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion.

    Raises:
        LoadError: the folder has no record, or one of its files is missing or has another size
            than recorded.
    """
    record = folder / RECORD
    if not record.is_file():
        if folder.exists():
            raise _damaged(folder, f"has no {RECORD}")
        return False
    try:
        sizes: dict[str, int] = json.loads(record.read_text())["files"]
    except (ValueError, KeyError) as error:
        raise _damaged(folder, f"has an unreadable {RECORD}") from error
    for name, expected in sizes.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise _damaged(folder, f"has a {name} of {size:,} bytes, expected {expected:,}")
    return True


def _damaged(folder: Path, damage: str) -> LoadError:
    return LoadError(
        f"The cached model {folder} {damage}. Delete that folder and load the model again."
    )


def convert_gguf(gguf: Path, folder: Path, *, digest: str, progress: bool) -> None:
    """Convert a GGUF file into the safetensors folder `folder`, unless that exists already.

    Args:
        gguf: The checkpoint. It is only read.
        folder: Where the result belongs, see `target_folder`.
        digest: SHA-256 of the checkpoint, in hexadecimal.
        progress: Whether transformers may show its progress bars.

    Raises:
        LoadError: the package `gguf` is missing; the file is not a GGUF file, is truncated, or
            holds an architecture that transformers cannot read; the cache cannot be written.
    """
    if is_converted(folder):
        return
    with staging_folder(folder) as staging:
        # A folder inside the staging folder, which other users of the machine cannot read.
        finished = staging / "model"
        finished.mkdir()
        _write_folder(gguf, finished, digest, progress)
        try:
            os.replace(finished, folder)
        except OSError:
            # Another process may have finished the same conversion first; its result is as good.
            if not is_converted(folder):
                raise


def _write_folder(gguf: Path, folder: Path, digest: str, progress: bool) -> None:
    """Write model, tokenizer and record of `gguf` into the existing empty `folder`."""
    with quiet_transformers(progress):
        # The progress bar over dequantized tensors ignores transformers' own switch.
        with nullcontext() if progress else redirect_stderr(io.StringIO()):
            model, tokenizer = _read_gguf(gguf)
        model.save_pretrained(folder)
        _save_tokenizer(tokenizer, folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    libraries = {package: version(package) for package in ("transformers", "torch", "gguf")}
    record = {
        "source": {"sha256": digest, "bytes": gguf.stat().st_size, "name": gguf.name},
        "files": sizes,
        "versions": {"secondary-sinks": __version__, **libraries},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for name in sizes:  # safetensors writes files that only their owner can read
        (folder / name).chmod((folder / RECORD).stat().st_mode)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer, with the normalizer of its class where that class is the right one.

    A GGUF file names a pre-tokenizer but no normalizer. Where the class that transformers picks
    for the model has the same pre-tokenizer, the model was trained with that class, and so with
    its normalizer (Qwen2 composes accents, which the file alone would not).
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    usual = AutoTokenizer.from_pretrained(folder)
    same_rule = _component(usual, "pre_tokenizer") == _component(tokenizer, "pre_tokenizer")
    if same_rule and _component(tokenizer, "normalizer") is None:
        usual.save_pretrained(folder)


def _component(tokenizer: Any, name: str) -> bytes | None:
    """One component of a fast tokenizer, as JSON; None if it has no such component."""
    component = getattr(tokenizer.backend_tokenizer, name) if tokenizer.is_fast else None
    # Not read from the whole tokenizer as JSON, which takes seconds with 262,000 words.
    state: bytes | None = None if component is None else component.__getstate__()
    return state


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """Read a GGUF file as a float32 model that can be saved, and its tokenizer."""
    try:
        import gguf as _gguf_package  # noqa: F401
    except ImportError as error:
        raise LoadError(
            'Reading a .gguf file needs the package gguf: pip install "secondary_sinks[gguf]".'
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Read through a link in an empty folder, so that transformers does not also read
    # configuration or tokenizer files that lie beside the user's file.
    with tempfile.TemporaryDirectory() as empty:
        link = Path(empty) / "model.gguf"
        try:
            link.symlink_to(gguf.resolve())
        except OSError:
            shutil.copyfile(gguf, link)
        try:
            with _metadata_read_once():
                dequantized = AutoModelForCausalLM.from_pretrained(
                    empty, gguf_file=link.name, dtype=torch.float32
                )
                tokenizer = AutoTokenizer.from_pretrained(empty, gguf_file=link.name)
        except Exception as error:
            # The reader has no error class: a truncated file raises struct.error, a failed
            # reshape, IndexError or UnicodeDecodeError, depending on where it ends.
            raise LoadError(
                f"{gguf} could not be read as a GGUF checkpoint: {one_line(error)}. Is it "
                "truncated, or of an architecture that transformers cannot read from GGUF?"
            ) from error
    return _savable(dequantized), tokenizer


@contextmanager
def _metadata_read_once() -> Iterator[None]:
    """Within the context transformers reads the metadata of a GGUF file once, and faster.

    It reads most architectures with the reader of the package gguf: for the configuration, for the
    weights, and for the tokenizer. Each time the reader slices a memory map for every word of the
    vocabulary, and NumPy slices a memory map four times slower than a plain array over the same
    memory. With the 262,144 words of Gemma 3, two minutes of four become ten seconds.
    """
    import gguf
    import numpy as np

    stock = gguf.GGUFReader

    class Reader(stock):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, memory_map: Any) -> None:
            self._data = memory_map.view(np.ndarray)

    gguf.GGUFReader = functools.cache(Reader)
    try:
        yield
    finally:
        gguf.GGUFReader = stock


def _savable(dequantized: Any) -> Any:
    """The same weights in a model that transformers agrees to save.

    A model read from GGUF keeps its quantizer, which forbids saving. The new model is built
    without memory for weights and takes over the tensors, so that no weight is copied.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = dequantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(dequantized).__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict(), assign=True)
    model.tie_weights()
    return model
