"""One sink with what its rows are measured by, and the tokens that it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.intervene.counterfactuals import CounterfactualRows
from secondary_sinks.sinks.controls import matched_controls, phase_of, same_token_controls
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


@dataclass(frozen=True)
class Target:
    """A sink with what its rows are measured by, and the tokens that it is compared with."""

    sink: Sink
    sink_map: SinkMap
    phase: slice
    """The primary phase that it lives in."""
    matched: tuple[int, ...]
    """Ordinary tokens nearby."""
    same_token: tuple[int, ...]
    """The same token id where it is no sink."""

    @classmethod
    def of(cls, sink_map: SinkMap, sink: Sink, *, n_controls: int = 8, seed: int = 0) -> Target:
        """Choose the tokens to compare with; the choice depends on the seed and on the sink."""
        return cls(
            sink=sink,
            sink_map=sink_map,
            phase=phase_of(sink_map, sink),
            matched=matched_controls(sink_map, sink, n_controls, seed=[seed]),
            same_token=same_token_controls(sink_map, sink, n_controls, seed=[seed]),
        )

    @property
    def life(self) -> list[int]:
        """Layers of the clean sink's life."""
        return list(self.sink.layers)

    @property
    def shown(self) -> list[int]:
        """Layers whose attention shows that life."""
        depth = int(self.sink_map.n_layers or 0)
        return [layer + 1 for layer in self.sink.layers if layer + 1 < depth]

    @property
    def clean_lifetime(self) -> int:
        """Layers of the phase after which the unedited token is a sink."""
        own = [s for s in self.sink_map.sinks if s.position == self.sink.position]
        return sum(s.lifetime for s in own if self.phase.start <= s.l_start < self.phase.stop)

    def lifetime(self, rows: CounterfactualRows) -> Int[Tensor, " row"]:
        """Layers of the phase after which each row's token is a sink."""
        return rows.is_sink[:, self.phase].sum(dim=1)

    def score(self, rows: CounterfactualRows) -> Float[Tensor, " row"]:
        """Direct sink score over heads and the layers that show the life."""
        return rows.direct_score[:, self.shown].mean(dim=(1, 2))

    def clean_score(self) -> float:
        """The same of the unedited token; NaN where the map has none."""
        score = self.sink_map.sink_score
        if score is None or not self.shown:
            return math.nan
        return float(score[self.shown, :, self.sink.position].mean())

    def along(self, rows: CounterfactualRows, row: int) -> float:
        """Length of a row's residual along the sink direction after the onset layer."""
        onset = self.sink.l_start
        return float(rows.centered_norm[row, onset] * rows.centered_alignment[row, onset])

    def clean_norm(self) -> float:
        """Residual norm of the unedited token, mean over the life."""
        return _life_mean(self.sink_map.norm, self.life, self.sink.position)

    def clean_alignment(self) -> float:
        """Centered alignment of the unedited token, mean over the life."""
        return _life_mean(self.sink_map.centered_alignment, self.life, self.sink.position)

    def clean_length(self) -> float:
        """Length of the unedited token along the sink direction, mean over the life."""
        norm, alignment = self.sink_map.centered_norm, self.sink_map.centered_alignment
        if norm is None or alignment is None:
            return math.nan
        return _life_mean(norm * alignment, self.life, self.sink.position)

    def clean_along(self, position: int) -> float:
        """The same of any unedited token."""
        norm, alignment = self.sink_map.centered_norm, self.sink_map.centered_alignment
        if norm is None or alignment is None:
            return math.nan
        onset = self.sink.l_start
        return float(norm[onset, position] * alignment[onset, position])


def _life_mean(values: Float[Tensor, " layer token"] | None, life: list[int], token: int) -> float:
    return math.nan if values is None else float(values[life, token].mean())
