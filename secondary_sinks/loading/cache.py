"""The folder in which downloaded and converted models are kept.

Layout below `cache_folder()`:

    downloads/NAME.gguf     a verified checkpoint before its conversion, deleted afterwards
    models/NAME-DIGEST/     the converted model: safetensors, configuration, tokenizer, and a record
                            of its source (see `convert`)
    */.staging-*/           work in progress; a killed process can leave one, which can be deleted

Every result is written in a staging folder and moved to its final name by one rename. So an
interrupted download or conversion leaves nothing under a final name, and two processes that do
the same work at once cannot damage each other's result.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secondary_sinks.errors import LoadError

CHUNK_BYTES = 1 << 20
"""Number of bytes that files are read in at a time."""


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder in which downloaded and converted models are kept.

    Args:
        cache_dir: The folder itself. None: the environment variable `SECONDARY_SINKS_CACHE`, or
            else the user's cache folder of the operating system.

    Returns:
        The absolute path. The folder is not created here.
    """
    if cache_dir is None:
        cache_dir = os.environ.get("SECONDARY_SINKS_CACHE") or None
    if cache_dir is None:
        from platformdirs import user_cache_dir

        cache_dir = user_cache_dir("secondary_sinks")
    return Path(cache_dir).expanduser().absolute()


@contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, on the same file system, removed when the block ends.

    Raises:
        LoadError: the folder, or what the block writes, cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".staging-", dir=final.parent, ignore_cleanup_errors=True
        ) as staging:
            yield Path(staging)
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(
            f"The cache folder {final.parent} cannot be written: {error}. Free some space, or name "
            "another folder with cache_dir= or the environment variable SECONDARY_SINKS_CACHE."
        ) from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
