"""Reach the Hugging Face hub: options of a request, downloads, and errors that name a way out."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from secondary_sinks.errors import LoadError
from secondary_sinks.loading.aliases import INDEX_FILES, did_you_mean
from secondary_sinks.loading.messages import one_line, quiet_transformers

_WITHOUT_A_HUB = (
    f"These sources need no hub: the aliases {', '.join(INDEX_FILES)}, a local folder, "
    "a .gguf file, and a model in memory."
)


def hub_options(revision: str | None) -> dict[str, Any]:
    """Options for `from_pretrained`; without a network, only the hub's cache is searched.

    The hub's own client retries an unreachable server for half a minute.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not offline and not urllib.request.getproxies():
        address = urlsplit(constants.ENDPOINT)
        try:
            socket.getaddrinfo(address.hostname, address.port or 443)
        except OSError:
            offline = True
    return {"revision": revision, "local_files_only": offline}


def fetch_from_hub(source: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """Download safetensors, configuration and tokenizer of a hub repository into the hub's cache.

    Raises:
        LoadError: no network, no such repository, or no access to it.
    """
    from huggingface_hub import snapshot_download

    options = hub_options(revision)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    # Some repositories hold the weights a second time, in another layout.
    duplicates = ["consolidated*", "original/*", "metal/*"]
    with quiet_transformers(progress), explained_errors(source, options):
        folder = snapshot_download(
            source, allow_patterns=patterns, ignore_patterns=duplicates, **options
        )
    return Path(folder)


@contextmanager
def explained_errors(source: str, options: dict[str, Any]) -> Iterator[None]:
    """Turn errors of the block about a folder or hub id into a `LoadError` with a way out."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise LoadError(_explanation(source, error, options)) from error


def _explanation(source: str, error: Exception, options: dict[str, Any]) -> str:
    """The cause of `error` and the way out, in one or two sentences."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    types = {type(cause).__name__ for cause in causes}
    text = one_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"{source!r} needs modeling code from its own repository. If you have read that code "
            "and trust it, pass trust_remote_code=True."
        )
    if os.path.isdir(source):
        return f"The model in {source} could not be read: {text}"
    if "GatedRepoError" in types:
        return (
            f"{source!r} is gated: accept its license on the hub and log in with `hf auth login`."
        )
    if "RevisionNotFoundError" in types:
        return f"{source!r} has no revision {options.get('revision')!r} on the hub."
    if "RepositoryNotFoundError" in types:
        return f"The hub has no repository {source!r}, or it is private.{did_you_mean(source)}"
    offline = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"}
    if options.get("local_files_only") or types & offline:
        return (
            f"{source!r} is not in the hub's cache on this machine, and the hub cannot be reached "
            f"(no network, or offline mode).{did_you_mean(source)} {_WITHOUT_A_HUB}"
        )
    if "safetensors" in text:
        return (
            f"{source!r} offers no safetensors. Pickled weights can run code when they are opened "
            f"and are not read. ({text})"
        )
    return f"{source!r} could not be loaded: {text}"
