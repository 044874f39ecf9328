"""A sink's residual along its direction, taken apart into everything that was ever written there.

The residual stream is a sum: the embedding, every MLP, and every attention block, which is itself a
sum over heads and a bias. So is its projection on one direction, exactly. The parts before a
sink's onset show who made it (`attribute_to_mlps` asks that), those after it who keeps it, and the
negative ones after its last layer who *ends* it. The verdict on that is told in `analyses.decomposition.erasers`;
here is the result that holds the numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.analyses.decomposition.erasers import BlockRemoved, EraserVerdict
from secondary_sinks.result import Result
from secondary_sinks.sinks.direct_writes import DirectWrite

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class HeadWrite:
    """What each attention head contributes to a token's residual along the sink direction.

    `heads.sum(-1) + bias` is the attention's write. Where a norm follows the attention, its scale
    at the token is that of the clean run, so the parts are exact and add up, but say nothing of
    what the norm would do without one of them.
    """

    heads: Float[Tensor, "sink layer head"]
    bias: Float[Tensor, "sink layer"]
    """Of the attention's output bias, which is the same for all tokens but for such a norm."""
    ordinary_heads: Float[Tensor, "sink layer head"]
    """Mean over ordinary tokens along the same direction."""
    error: float
    """Largest deviation of a token's attention output from the sum of its heads, over its norm."""

    @property
    def excess(self) -> Float[Tensor, "sink layer head"]:
        """What each head writes beyond what ordinary tokens get."""
        return self.heads - self.ordinary_heads


@dataclass(frozen=True)
class DecomposedSink:
    """One sink, and the block that ended it."""

    position: int
    token: str
    token_id: int
    kind: str
    onset: int
    lifetime: int
    last_layer: int
    direction_layer: int
    """The layer after which the primary's direction was taken."""
    verdict: EraserVerdict

    @property
    def eraser(self) -> str | None:
        """The block that ended the sink; None where the tests disagree or nothing did."""
        return self.verdict.eraser


@dataclass(frozen=True)
class SinkDecomposition(Result):
    """Everything written along each sink's direction, by block and head; see
    `sink_decomposition`."""

    sinks: tuple[DecomposedSink, ...]
    n_layers: int
    n_heads: int
    direction: str
    """Which direction: "onset", "last" or a layer's number."""
    write: DirectWrite
    """Of the embedding, every MLP and every attention block, at the sink's token."""
    head_write: HeadWrite
    """Of every attention head there."""
    primary_write: DirectWrite
    """The same as `write` at the *primary's* token, along the same direction."""
    rotation: Float[Tensor, "sink layer"]
    """Cosine of the direction with the sink direction after each layer. Where it is far from 1, a
    write along the one says little about the other."""
    removed: tuple[BlockRemoved, ...]
    """What became of each sink without its candidate, and without each control."""
    engine: str
    """Which engine ran the rows; empty with `verify=False`."""
    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""
    primary_position: int

    def __repr__(self) -> str:
        erasers = Counter(sink.eraser for sink in self.sinks)
        named = ", ".join(
            f"{'none' if name is None else name} of {count}"
            for name, count in sorted(erasers.items(), key=lambda item: (-item[1], str(item[0])))
        )
        name, count = self.model.get("name", "?"), len(self.sinks)
        plural = "" if count == 1 else "s"
        return f"SinkDecomposition({name!r}, {count} sink{plural}, erasers: {named})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: who ended it, and how the tests came out."""
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            verdict = sink.verdict
            rows.append(
                {
                    "position": sink.position,
                    "token": sink.token,
                    "kind": sink.kind,
                    "onset": sink.onset,
                    "last_layer": sink.last_layer,
                    "eraser": verdict.eraser,
                    "co_erasers": verdict.co_erasers,
                    "candidate": verdict.candidate,
                    "share": verdict.share,
                    "runner_up": verdict.runner_up,
                    "runner_up_share": verdict.runner_up_share,
                    "primary_share": verdict.primary_share,
                    "length": float(self.write.excess_projection[index, sink.last_layer]),
                    "lifetime": sink.lifetime,
                    "lifetime_without": verdict.lifetime_without,
                    "left": verdict.left,
                    "left_without": verdict.left_without,
                    "percentile": verdict.percentile,
                    "reason": verdict.reason,
                }
            )
        return pd.DataFrame(rows)

    def parts_frame(self) -> pd.DataFrame:
        """One row for each part of each sink: embedding, MLPs, heads, and the attentions' biases.

        The parts of a sink up to a layer add up to the residual's projection after it. `excess` is
        what goes beyond ordinary tokens (NaN for embedding and bias).
        """
        import pandas as pd

        heads, n_layers, n_heads = self.head_write, self.n_layers, self.n_heads
        frames = []
        for index, sink in enumerate(self.sinks):
            layers = list(range(n_layers))
            columns: dict[str, list[Any]] = {
                "part": ["embedding"] + ["mlp"] * n_layers + ["attention bias"] * n_layers,
                "layer": [-1, *layers, *layers],
                "head": [-1] * (1 + 2 * n_layers),
                "along": [
                    float(self.write.embedding[index]),
                    *self.write.mlp[index].tolist(),
                    *heads.bias[index].tolist(),
                ],
                "excess": [
                    float("nan"),
                    *self.write.excess[index].tolist(),
                    *[float("nan")] * n_layers,
                ],
            }
            columns["part"] += ["head"] * (n_layers * n_heads)
            columns["layer"] += [layer for layer in layers for _ in range(n_heads)]
            columns["head"] += list(range(n_heads)) * n_layers
            columns["along"] += heads.heads[index].flatten().tolist()
            columns["excess"] += heads.excess[index].flatten().tolist()
            frames.append(pd.DataFrame({"position": sink.position} | columns))
        return pd.concat(frames, ignore_index=True)

    def removed_frame(self) -> pd.DataFrame:
        """One row for each block that was zeroed, candidates and controls."""
        import pandas as pd

        return pd.DataFrame(self.removed, columns=BlockRemoved._fields)

    def shares(
        self, written: Float[Tensor, "sink layer *head"]
    ) -> Float[Tensor, "sink layer *head"]:
        """Writes over the length of each sink after its last layer, beyond ordinary tokens."""
        last = [sink.last_layer for sink in self.sinks]
        whole = self.write.excess_projection[torch.arange(len(last)), last]
        return written / whole.reshape(-1, *[1] * (written.ndim - 1))
