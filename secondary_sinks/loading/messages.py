"""What transformers reports: its errors on one line, its progress bars and advice switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def one_line(error: BaseException) -> str:
    """An error's message on one line, without its full stop, cut after 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + " ...").rstrip(".")


@contextmanager
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Silence transformers' advice in the block, and its progress bars unless `progress`.

    The user's own settings are restored afterwards.
    """
    from transformers.utils import logging

    bars_enabled = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    if not progress:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars_enabled and not progress:
            logging.enable_progress_bar()
