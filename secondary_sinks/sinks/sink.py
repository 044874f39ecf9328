"""A sink: which token, after which layers, and the evidence for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

MIN_COSINE = 0.9
"""The paper's threshold of a token's |cosine| with the primary."""

Kind = Literal["primary", "secondary", "noise", "chosen", "undecided"]
"""What a sink is.

* "primary": a token at the beginning that is a sink from the start of a primary phase on;
* "secondary": any other sink;
* "noise": a label of the published criterion alone;
* "chosen": a token that is no sink, named by its position for an analysis (`SinkMap.select`);
* "undecided": a token with the residual of a sink that no later query sees, so that no attention
  can show whether it is one (`SinkMap.undecided`).
"""


@dataclass(frozen=True)
class Evidence:
    """Why a token was called a sink. Each tuple has one entry for each layer in `Sink.layers`."""

    alignment: tuple[float, ...]
    """Cosine of its residual with the primary's."""
    centered_alignment: tuple[float, ...]
    """The same after the common component was subtracted from both."""
    norm: tuple[float, ...]
    """Norm of its residual."""
    norm_ratio: tuple[float, ...]
    """That norm over the median background token's."""
    centered_norm_ratio: tuple[float, ...]
    """The same without the common component: compared with `min_norm_ratio`."""
    sink_score: tuple[float, ...]
    """Attention drawn in the next layer: its sink score there, averaged over heads. NaN where there
    is no next layer or no later query."""
    attention_ratio: float
    """Attention drawn over the whole life, over what ordinary tokens nearby draw in the same
    layers (`sinks.attention_baseline`). NaN where no later token could attend to it."""
    strength: float
    """Attention drawn over the whole life in a unit that does not depend on the length of the text
    (`sinks.attention_baseline`): compared with `min_strength`."""
    n_queries: int
    """How many later tokens could attend to it. With few of them attention is weak evidence."""
    delay: int
    """Onset, in layers after the start of the primary phase: 0 for a token that rises with it."""
    published_kind: Kind
    """The paper's label, which goes by the number of layers of the primary phases in which the
    token's |cosine| with the primary exceeds 0.9 (`kind_by_lifetime`)."""


@dataclass(frozen=True)
class Sink:
    """One life of one sink: an unbroken run of layers (in the published criterion: all layers)."""

    position: int
    token: str
    token_id: int
    kind: Kind
    layers: tuple[int, ...]
    """0-based blocks after which it is a sink; block l + 1 shows the attention."""
    evidence: Evidence | None = field(default=None, repr=False)

    @property
    def l_start(self) -> int:
        """Onset: the first of `layers`."""
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def level(self) -> tuple[int, int]:
        """(onset, lifetime)."""
        return self.l_start, self.lifetime

    @property
    def sink_score(self) -> float:
        """Mean over the life of the attention drawn in the next layer; NaN if it was not seen."""
        scores = [s for s in (self.evidence.sink_score if self.evidence else ()) if s == s]
        return sum(scores) / len(scores) if scores else math.nan

    @property
    def norm(self) -> float:
        """Residual norm in the onset layer; NaN without evidence."""
        return self.evidence.norm[0] if self.evidence else math.nan

    @property
    def strength(self) -> float:
        """Attention drawn, in a unit that does not depend on the length of the text; NaN without
        evidence."""
        return self.evidence.strength if self.evidence else math.nan


def kind_by_lifetime(n_alive: int, n_layers: int) -> Kind:
    """The paper's label of a token that is aligned in `n_alive` of `n_layers` layers."""
    if n_alive >= n_layers - 15:
        return "primary"
    return "secondary" if n_alive > 4 else "noise"
