"""Attention sinks in language models: which tokens, which MLP made them, what changes without."""

__version__ = "0.1.0"
