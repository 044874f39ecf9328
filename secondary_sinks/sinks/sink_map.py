"""What a detection returns: sinks with their evidence, and the map of a text that holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["primary", "secondary", "noise"]


@dataclass(frozen=True)
class Evidence:
    """Why a token was called a sink. Each tuple has one entry for each layer in `Sink.layers`."""

    alignment: tuple[float, ...]
    """Cosine of its residual with the primary's."""
    centered_alignment: tuple[float, ...]
    """The same after the mean residual of the ordinary tokens was taken off both."""
    norm: tuple[float, ...]
    """Norm of its residual."""
    norm_ratio: tuple[float, ...]
    """That norm over the median ordinary token's."""
    centered_norm_ratio: tuple[float, ...]
    """The same after the common component was taken off every token: what `min_norm_ratio` asks."""
    sink_score: tuple[float, ...]
    """Attention drawn in the next layer: its sink score there, averaged over heads. NaN where there
    is no next layer or no later query."""
    attention_ratio: float
    """Attention drawn over the whole life, over what ordinary tokens nearby draw in the same
    layers (`sinks.attention_baseline`). NaN where nothing could look at the token."""
    n_queries: int
    """How many later tokens could look at it. Few make the attention weak evidence."""


@dataclass(frozen=True)
class Sink:
    """One life of one sink: an unbroken run of layers (in the published criterion: all layers)."""

    position: int
    token: str
    token_id: int
    kind: Kind
    layers: tuple[int, ...]
    """0-based blocks after which the residual is a sink's; block l + 1 shows the attention."""
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


@dataclass(frozen=True, eq=False)
class SinkMap(Result):
    """The sinks of one text in one model.

    Arrays are None in maps that were read from published records, which hold none.
    """

    tokens: Int[Tensor, "token"] | None
    token_strings: tuple[str, ...]
    n_tokens: int
    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.HostInfo`)."""
    criterion: str
    thresholds: dict[str, float | int]
    """What the criterion was run with."""
    primary_position: int
    """The token whose residual defines the sink direction."""
    phases: tuple[tuple[int, int], ...]
    """Primary phases: runs [start, end) of layers in which that token is massive."""
    sinks: tuple[Sink, ...]
    alignment: Float[Tensor, "layer token"] | None = None
    """Cosine of each token's residual with the primary's."""
    centered_alignment: Float[Tensor, "layer token"] | None = None
    """The same after the mean residual of the ordinary tokens was taken off both."""
    norm: Float[Tensor, "layer token"] | None = None
    """Residual norms."""
    centered_norm: Float[Tensor, "layer token"] | None = None
    """Residual norms after the mean residual of the ordinary tokens was taken off."""
    ordinary_norm: Float[Tensor, "layer"] | None = None
    """Median residual norm of the ordinary tokens."""
    ordinary_centered_norm: Float[Tensor, "layer"] | None = None
    """The same after their mean residual was taken off."""
    sink_score: Float[Tensor, "layer head token"] | None = None
    """Mean attention from later queries; NaN for tokens that too few of them can see."""
    attention_ratio: Float[Tensor, "layer token"] | None = None
    """Attention drawn over that of ordinary tokens nearby (`sinks.attention_baseline`)."""
    notes: tuple[str, ...] = ()
    """What a reader of the result must know: processed weights, a text without primary sink."""
    record: dict[str, Any] = field(default_factory=dict, repr=False)
    """Whatever else a published record holds."""

    @property
    def primary(self) -> list[Sink]:
        """Primary sinks, one entry for each life (a primary with two phases has two)."""
        return [sink for sink in self.sinks if sink.kind == "primary"]

    @property
    def secondary(self) -> list[Sink]:
        """Secondary sinks, by onset and position."""
        return [sink for sink in self.sinks if sink.kind == "secondary"]

    @property
    def n_layers(self) -> int | None:
        """Depth of the model, where it is known."""
        return self.model.get("n_layers")

    def __repr__(self) -> str:
        name = self.model.get("name", "?")
        phases = " and ".join(f"{start}-{end - 1}" for start, end in self.phases) or "none"
        processed = ", processed weights" if self.model.get("processing") else ""
        return (
            f"SinkMap({name!r}, {self.n_tokens} tokens: {len(self.secondary)} secondary sinks, "
            f"primary at {self.primary_position} in layers {phases}{processed})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: who, when, how strong."""
        import pandas as pd

        rows = [
            {
                "position": sink.position,
                "token": sink.token,
                "token_id": sink.token_id,
                "kind": sink.kind,
                "onset": sink.l_start,
                "lifetime": sink.lifetime,
                "last_layer": sink.layers[-1],
                "norm": sink.norm,
                "norm_ratio": sink.evidence.norm_ratio[0] if sink.evidence else math.nan,
                "alignment": _mean(sink.evidence.alignment) if sink.evidence else math.nan,
                "sink_score": sink.sink_score,
                "attention_ratio": sink.evidence.attention_ratio if sink.evidence else math.nan,
                "n_queries": sink.evidence.n_queries if sink.evidence else -1,
            }
            for sink in self.sinks
        ]
        columns = (
            "position token token_id kind onset lifetime last_layer norm norm_ratio alignment "
            "sink_score attention_ratio n_queries"
        )
        return pd.DataFrame(rows, columns=columns.split())

    def margins(self, n: int | None = 10) -> pd.DataFrame:
        """The tokens that came nearest to being called sinks and were not, nearest first.

        For every other token: the layer in which it came nearest, its three measures there, each
        divided by its threshold (1 or more passes), and the test that it failed most clearly.
        `closeness` is the smallest of the three. It says how the result depends on the thresholds:
        a closeness near 1 is a token on the border, and "no secondary sinks" with nothing above 0.3
        is a clear answer. Attention is taken layer by layer here and over a whole life in the
        detection, so on the very border a token with a closeness of 1 may still not be a sink.

        Raises:
            InputError: the map holds no measurements (it was read from a published record) or was
                made with the published criterion, which looks at alignment alone.
        """
        from secondary_sinks.sinks.criterion import margins

        if self.criterion != "evidence" or self.centered_alignment is None:
            raise InputError("margins are known only of maps made with criterion='evidence'")
        return margins(self, n)


def _sink_from(entry: dict[str, Any]) -> Sink:
    evidence = entry.pop("evidence")
    if evidence is not None:
        as_tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in evidence.items()
        }
        evidence = Evidence(**as_tuples)
    return Sink(**(entry | {"layers": tuple(entry["layers"])}), evidence=evidence)


def _mean(values: tuple[float, ...]) -> float:
    return float(torch.tensor(values).mean())
