"""What was measured on one text, before any criterion judges it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secondary_sinks.observe.attention_collectors import Visible
from secondary_sinks.observe.residual_geometry import Geometry


@dataclass(frozen=True)
class Measurements:
    """Residuals and attention of one text."""

    tokens: tuple[int, ...]
    token_strings: tuple[str, ...]
    geometry: Geometry
    """Norms of residuals, and alignments with each candidate for the primary."""
    score: Float[Tensor, " layer head token"]
    """Mean attention from the later queries that see a token, however few; NaN if none does."""
    visible: Visible
    """How many queries those are, and the score under uniform attention."""
    beginnings: frozenset[int]
    """Positions at the beginning of the text, or of a document in it."""

    @property
    def n_tokens(self) -> int:
        """Length of the text."""
        return len(self.tokens)
