"""One sink, its controls, and the measures that compare its edited rows with the clean token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from secondary_sinks.intervene.counterfactuals import CounterfactualRows
from secondary_sinks.sinks.controls import matched_controls, phase_of, same_token_controls
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


@dataclass(frozen=True)
class Target:
    """A sink, or a chosen token, and the ordinary tokens that it is compared with.

    *The life* is that of the clean sink, or the layers that `SinkMap.select` gave a chosen token. A
    *length* is that of a residual along the sink direction: centered norm times centered alignment.
    """

    sink: Sink
    sink_map: SinkMap
    phase: slice
    """The primary phase in which the sink lives."""
    matched: tuple[int, ...]
    """Ordinary tokens nearby."""
    same_token: tuple[int, ...]
    """Ordinary tokens with the same token id."""

    @classmethod
    def of(cls, sink_map: SinkMap, sink: Sink, *, n_controls: int = 8, seed: int = 0) -> Target:
        """Draw the controls of a sink; the draw depends on the seed and on the sink alone."""
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
        """Layers whose attention shows that life: each the next one."""
        depth = int(self.sink_map.n_layers or 0)
        return [layer + 1 for layer in self.sink.layers if layer + 1 < depth]

    def measure(
        self, rows: CounterfactualRows, index: Int[Tensor, " *rows"]
    ) -> dict[str, Shaped[Tensor, " *rows"]]:
        """Alignment, norm, length, lifetime and score of some of the rows.

        The lifetime counts layers of the phase after which the token is a sink; the score is the
        mean direct score over heads and the layers that show the life; the others are means over
        the life.
        """
        norm, alignment = rows.centered_norm[index], rows.centered_alignment[index]
        return {
            "alignment": alignment[..., self.life].mean(dim=-1),
            "norm": rows.norm[index][..., self.life].mean(dim=-1),
            "length": (norm * alignment)[..., self.life].mean(dim=-1),
            "lifetime": rows.is_sink[index][..., self.phase].sum(dim=-1),
            "score": rows.direct_score[index][..., self.shown, :].nanmean(dim=(-2, -1)),
        }

    @property
    def clean_lifetime(self) -> int:
        """Number of layers of the phase after which the unedited token is a sink."""
        phase, position = self.phase, self.sink.position
        lives = [sink for sink in self.sink_map.sinks if sink.position == position]
        return sum(life.lifetime for life in lives if phase.start <= life.l_start < phase.stop)

    def clean_score(self) -> float:
        """Sink score of the unedited token; NaN where no layer shows it, or too few queries."""
        score = self.sink_map.sink_score
        if score is None or not self.shown:
            return math.nan
        return float(score[self.shown, :, self.sink.position].nanmean())

    def clean_norm(self) -> float:
        """Residual norm of the unedited token, mean over the life."""
        return self._life_mean(self.sink_map.array("norm"))

    def clean_alignment(self) -> float:
        """Centered alignment of the unedited token, mean over the life."""
        return self._life_mean(self.sink_map.array("centered_alignment"))

    def clean_length(self) -> float:
        """Length of the unedited token, mean over the life."""
        norm = self.sink_map.array("centered_norm")
        return self._life_mean(norm * self.sink_map.array("centered_alignment"))

    def _life_mean(self, values: Float[Tensor, " layer token"]) -> float:
        return float(values[self.life, self.sink.position].mean())
