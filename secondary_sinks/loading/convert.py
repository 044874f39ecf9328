"""Convert a GGUF checkpoint into a folder that loads in a second.

transformers can read a `.gguf` file, but it dequantizes the weights every time (10 to 20 seconds
for half a billion parameters), and the model it returns refuses to be saved. Here that is done
once: the dequantized float32 weights are written as safetensors, which are memory-mapped when
they are loaded. The numbers do not change: logits of the folder equal those of the `.gguf` file
bit for bit.

The price is disk space (2.5 GB for 0.5B parameters), so what can be deleted is deleted: a `.gguf`
that this library downloaded goes once its folder is there. A user's own file is only read; its
folder in the cache is named after the file and its SHA-256, so a changed file is converted anew
and a copy under the same name is not.

A folder appears under its final name by one rename, complete with its record
`secondary_sinks.json` (SHA-256 and size of the source, sizes of the files written, versions of the
libraries that wrote them). A folder without a record, or with other sizes, is damaged.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secondary_sinks.errors import LoadError

RECORD = "secondary_sinks.json"
"""Name of the record inside a converted folder."""


def target_folder(root: Path, name: str, digest: str) -> Path:
    """Where the conversion of a checkpoint called `name` with SHA-256 `digest` belongs."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return root / "models" / f"{plain}-{digest[:16]}"


def is_converted(folder: Path) -> bool:
    """Whether a finished conversion lies at `folder`.

    Raises:
        LoadError: there is one, but a file of it is missing or has another size than recorded.
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
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise _damaged(folder, f"has a {name} of {found:,} bytes where {size:,} were written")
    return True


def _damaged(folder: Path, what: str) -> LoadError:
    return LoadError(
        f"The cached model {folder} {what}. Delete that folder, and the next load makes it anew."
    )


def converted_folder(gguf: Path, root: Path, *, name: str, digest: str, progress: bool) -> Path:
    """The safetensors folder of a GGUF file, converted into the cache below `root` if need be.

    Args:
        gguf: The checkpoint. It is only read.
        root: The cache folder.
        name: Beginning of the folder's name.
        digest: SHA-256 of the checkpoint, hexadecimal.
        progress: Whether transformers may show its progress bars.

    Raises:
        LoadError: the package `gguf` is missing; the file is not a GGUF file, is truncated, or
            holds an architecture that transformers cannot read; the cache cannot be written.
    """
    folder = target_folder(root, name, digest)
    if is_converted(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        # A folder inside: the temporary one itself is closed to the other users of the machine.
        finished = staging / "model"
        finished.mkdir()
        _write_folder(gguf, finished, digest, progress)
        try:
            os.replace(finished, folder)
        except OSError:
            # Another process finished the same conversion first: its folder is as good as ours.
            if not is_converted(folder):
                raise
    except LoadError:
        raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _unwritable(folder: Path, error: OSError) -> LoadError:
    return LoadError(
        f"Could not write the converted model to {folder.parent}: {error}. Free some space, or "
        "name another folder with cache_dir= or the environment variable SECONDARY_SINKS_CACHE."
    )


def discard(path: Path) -> None:
    """Delete a file; one that is not there any more is no error."""
    with suppress(FileNotFoundError):
        path.unlink()


def _write_folder(gguf: Path, folder: Path, digest: str, progress: bool) -> None:
    """Write model, tokenizer and record of `gguf` into the existing empty `folder`."""
    with quiet_transformers(progress):
        # The bar over dequantized tensors does not listen to transformers' own switch.
        with nullcontext() if progress else redirect_stderr(io.StringIO()):
            model, tokenizer = _read_gguf(gguf)
        model.save_pretrained(folder)
        _save_tokenizer(tokenizer, folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {
        "source": {"sha256": digest, "bytes": gguf.stat().st_size, "name": gguf.name},
        "files": files,
        "versions": {
            package: version(package)
            for package in ("secondary-sinks", "transformers", "torch", "gguf")
            if _is_installed(package)
        },
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for name in files:  # safetensors writes files that nobody else can read
        (folder / name).chmod((folder / RECORD).stat().st_mode)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer, with the normalizer of its class where that class is the right one.

    A GGUF file names a rule for cutting text but no normalizer. When the class that transformers
    picks for the model cuts by the same rule, the tokenizer is that class's, and so is its
    normalizer (Qwen2 composes accents, which the file alone would not).
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    usual = AutoTokenizer.from_pretrained(folder)
    if _rules(usual, "pre_tokenizer") == _rules(tokenizer, "pre_tokenizer") and not _rules(
        tokenizer, "normalizer"
    ):
        usual.save_pretrained(folder)


def _rules(tokenizer: Any, part: str) -> Any:
    if not tokenizer.is_fast:
        return None
    return json.loads(tokenizer.backend_tokenizer.to_str())[part]


def _is_installed(package: str) -> bool:
    with suppress(ImportError):
        version(package)
        return True
    return False


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model, in float32 and free of its quantisation marks, and the tokenizer of a file."""
    try:
        import gguf as _gguf_package  # noqa: F401
    except ImportError as error:
        raise LoadError(
            'Reading a .gguf file needs the package gguf: pip install "secondary_sinks[gguf]".'
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Read through a link in an empty folder: configuration or tokenizer files that happen to lie
    # beside the user's file would otherwise be mixed with what the file itself says.
    with tempfile.TemporaryDirectory() as alone:
        link = Path(alone) / "model.gguf"
        try:
            link.symlink_to(gguf.resolve())
        except OSError:
            shutil.copyfile(gguf, link)
        try:
            dequantized = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=link.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=link.name)
        except Exception as error:
            # The reader has no error of its own: a truncated file shows as struct.error, a
            # failed reshape, an IndexError or a UnicodeDecodeError, depending on where it ends.
            raise LoadError(
                f"{gguf} could not be read as a GGUF checkpoint: {one_line(error)}. Is it "
                "truncated, or of an architecture that transformers cannot read from GGUF?"
            ) from error
    return _without_quantisation(dequantized), tokenizer


def _without_quantisation(model: Any) -> Any:
    """The same weights in a model that transformers agrees to save.

    A model read from GGUF keeps its quantiser, which forbids saving. A new one is built without
    memory of its own and takes over the tensors, so no weight exists twice.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def one_line(error: BaseException) -> str:
    """An error's message in one line, without a full stop, cut to a length that can be read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + " ...").rstrip(".")


@contextmanager
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Within the block transformers shows no progress bar unless `progress`, and no advice.

    The user's own settings are back afterwards.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    if not progress:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and not progress:
            logging.enable_progress_bar()
