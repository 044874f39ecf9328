"""The errors of the library.

Each names its cause and the way out. They derive from the built-in error that a caller would
expect (`ValueError` for bad input, `OSError` for what could not be fetched or read), so code that
knows nothing of this library still catches them.
"""

from __future__ import annotations


class SecondarySinksError(Exception):
    """Base of every error that the library raises on purpose."""


class InputError(SecondarySinksError, ValueError):
    """A text, a token tensor, a threshold or a file that cannot be used as given."""


class ModelError(SecondarySinksError, ValueError):
    """A model whose activations cannot be measured, or should not be trusted."""


class LoadError(SecondarySinksError, OSError):
    """Weights or a tokenizer that could not be found, fetched, verified or read."""
