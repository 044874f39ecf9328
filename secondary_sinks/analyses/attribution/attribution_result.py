"""Every layer's effect on every sink of a text, and the writers that follow from them.

The tests are told in `sinks.writers`, which names the writer; here is the result that holds their
numbers, [sink, layer] each, with its tables, figure and file.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.result import Result
from secondary_sinks.sinks.direct_writes import DirectWrite
from secondary_sinks.sinks.writers import Comparison, Control, Verdict

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Ablation:
    """What became of each sink when one block's output at its token was ablated.

    Each field is [sink, layer], the layer that of the ablated block.
    """

    alignment: Float[Tensor, "sink layer"]
    """Centered alignment with the primary, mean over the layers of the clean sink's life."""
    norm: Float[Tensor, "sink layer"]
    """Residual norm, mean over the same layers."""
    length: Float[Tensor, "sink layer"]
    """Length along the sink direction (centered norm times centered alignment), mean over the same
    layers."""
    lifetime: Int[Tensor, "sink layer"]
    """Number of layers of its primary phase after which the token is still a sink."""
    score: Float[Tensor, "sink layer"]
    """Direct sink score, mean over heads and the layers that show the clean sink's life."""


@dataclass(frozen=True)
class Transplant:
    """What became of ordinary tokens that were given each layer's MLP output of a sink's token.

    Each field is [sink, layer]; NaN where there was no ordinary token to be given it.
    """

    share: Float[Tensor, "sink layer"]
    """Share of them that became sinks."""
    lifetime: Float[Tensor, "sink layer"]
    """Mean number of layers for which they were."""
    score: Float[Tensor, "sink layer"]
    """Mean direct sink score, over heads and the layers that show the clean sink's life."""


@dataclass(frozen=True)
class SinkAttribution:
    """One sink, the MLP that made it, and how sure that is."""

    position: int
    token: str
    token_id: int
    onset: int
    lifetime: int
    norm: float
    """Residual norm, mean over the life."""
    alignment: float
    """Centered alignment, mean over the life."""
    length: float
    """Length along the sink direction (centered norm times centered alignment), mean over the
    life."""
    score: float
    """Sink score, mean over heads and the layers that show the life; NaN where nothing does."""
    verdict: Verdict
    attention_feeders: tuple[int, ...]
    """Attention blocks up to the onset without whose output at the token there is no sink."""
    comparison: Comparison

    @property
    def writer(self) -> int | None:
        """Layer of the MLP that wrote the sink; None where the tests disagree."""
        return self.verdict.writer

    @property
    def feeders(self) -> tuple[int, ...]:
        """Earlier layers whose MLPs the writer needs."""
        return self.verdict.feeders


@dataclass(frozen=True)
class MlpAttribution(Result):
    """Which MLP wrote each sink of a text, with every layer's effect; see `attribute_to_mlps`."""

    sinks: tuple[SinkAttribution, ...]
    n_layers: int
    mlp_zero: Ablation
    """Each MLP's output at the token set to zero."""
    mlp_mean: Ablation
    """Each MLP's output at the token set to its mean over ordinary tokens."""
    attention_zero: Ablation | None
    """The same for attention blocks; None with `attention=False`."""
    attention_mean: Ablation | None
    transplant: Transplant
    direct_write: DirectWrite
    controls: tuple[Control, ...]
    seed: int
    engine: str
    """Which engine ran the rows: "packed" or "full"."""
    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""
    primary_position: int

    def __repr__(self) -> str:
        writers = Counter(sink.writer for sink in self.sinks)
        named = ", ".join(
            f"{'no writer' if layer is None else f'MLP {layer}'} of {count}"
            for layer, count in sorted(writers.items(), key=lambda item: -item[1])
        )
        name, count = self.model.get("name", "?"), len(self.sinks)
        plural = "" if count == 1 else "s"
        return f"MlpAttribution({name!r}, {count} sink{plural}, writers: {named})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: its writer, its feeders, and how the tests came out."""
        import pandas as pd

        rows = []
        for index, sink in enumerate(self.sinks):
            verdict, comparison = sink.verdict, sink.comparison
            layer = verdict.candidate
            rows.append(
                {
                    "position": sink.position,
                    "token": sink.token,
                    "onset": sink.onset,
                    "lifetime": sink.lifetime,
                    "writer": sink.writer,
                    "feeders": sink.feeders,
                    "co_writers": verdict.co_writers,
                    "attention_feeders": sink.attention_feeders,
                    "write_share": verdict.write_share,
                    "runner_up": verdict.runner_up,
                    "runner_up_share": verdict.runner_up_share,
                    "norm": sink.norm,
                    "norm_without": float(self.mlp_zero.norm[index, layer]),
                    "length_left": float(self.mlp_zero.length[index, layer]) / sink.length,
                    "lifetime_without": int(self.mlp_zero.lifetime[index, layer]),
                    "transplant_share": float(self.transplant.share[index, layer]),
                    "transplant_lifetime": float(self.transplant.lifetime[index, layer]),
                    "necessity_percentile": comparison.necessity_percentile,
                    "sufficiency_percentile": comparison.sufficiency_percentile,
                    "p_value": comparison.p_value,
                    "reason": verdict.reason,
                }
            )
        frame = pd.DataFrame(rows)
        return frame.astype({"writer": "Int64", "runner_up": "Int64"})

    def layers_frame(self) -> pd.DataFrame:
        """One row for each sink and layer: every effect of that layer's MLP and attention."""
        import pandas as pd

        shape = (len(self.sinks), self.n_layers)
        index = torch.arange(shape[0])[:, None].expand(shape)
        columns: dict[str, Any] = {
            "position": torch.tensor([s.position for s in self.sinks])[index].flatten(),
            "layer": torch.arange(self.n_layers).expand(shape).flatten(),
        }
        for name, value in self._tensors().items():
            if value.shape == shape:
                columns[name] = value.flatten()
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()})

    def controls_frame(self) -> pd.DataFrame:
        """One row for each control, and for each row of the candidates themselves."""
        import pandas as pd

        return pd.DataFrame(self.controls, columns=Control._fields)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{group.name}.{entry.name}": value
            for group in dataclasses.fields(self)
            if dataclasses.is_dataclass(part := getattr(self, group.name))
            for entry in dataclasses.fields(part)
            if isinstance(value := getattr(part, entry.name), Tensor)
        }
