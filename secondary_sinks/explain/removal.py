"""A text with its secondary sinks, without them, and with as many other tokens edited.

The result of `remove_sinks`: sink scores, losses and divergences of the runs, and what follows from
them. Nothing here touches a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.explain.sinks import Sink
from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SinkRemoval(Result):
    """The text with its secondary sinks, without them, and with as many other tokens edited.

    `where` axes run over the edits; `control` axes over the seeded control runs.
    """

    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`models.host.HostInfo`)."""
    token_strings: tuple[str, ...]
    primary_position: int
    sinks: tuple[Sink, ...]
    """The secondary sinks that were removed, or that were copied (without their evidence)."""
    where: tuple[tuple[int, int], ...]
    """(position, layer) of each edited MLP output."""
    control_where: tuple[tuple[tuple[int, int], ...], ...]
    """The same of each control run."""
    donors: tuple[int, ...]
    """With `reverse`, the sink whose write each edited token got; empty otherwise."""
    edit: str
    """What was done, in words."""
    seed: int
    clean_score: Float[Tensor, "layer head token"]
    """Sink scores of the clean text; NaN for the last token."""
    edited_score: Float[Tensor, "layer head token"]
    """The same after the edit."""
    control_score: Float[Tensor, "control layer head"]
    """The primary's sink scores in each control run."""
    edited_norm: Float[Tensor, "layer where"]
    """Residual norm of each edited token after the edit."""
    is_sink: Bool[Tensor, "where layer"]
    """Whether each edited token is a sink after the edit, judged as the clean text was."""
    clean_loss: Float[Tensor, "token-1"]
    """Cross-entropy of each next token in the clean text, nats."""
    edited_loss: Float[Tensor, "token-1"]
    """The same after the edit."""
    control_loss: Float[Tensor, "control token-1"]
    """The same in each control run."""
    kl: Float[Tensor, "1+control"]
    """Mean KL(clean || edited) of the next-token distributions, nats: the edit's, then each
    control's."""
    top1_changed: Float[Tensor, "1+control"]
    """Share of positions whose most likely next token is another, in the same order."""

    @property
    def reverse(self) -> bool:
        """Whether sinks were added, not removed."""
        return bool(self.donors)

    @property
    def live_layers(self) -> list[int]:
        """Layers whose attention saw the sinks of the clean text that were removed or copied: those
        after each layer in which one of them lives. The edit's own outcome has no say in it."""
        n_layers = self.clean_score.shape[0]
        alive = {layer for sink in self.sinks for layer in sink.layers}
        return sorted(layer + 1 for layer in alive if layer + 1 < n_layers)

    @property
    def primary_clean(self) -> float:
        """The primary's sink score in the clean text, mean over heads and `live_layers`."""
        return self._live(self.clean_score[:, :, self.primary_position])

    @property
    def primary_edited(self) -> float:
        """The same after the edit."""
        return self._live(self.edited_score[:, :, self.primary_position])

    @property
    def primary_control(self) -> Float[Tensor, "control"]:
        """The same in each control run."""
        return torch.tensor([self._live(one) for one in self.control_score])

    @property
    def p_value(self) -> float:
        """Permutation p-value: the share of runs, the edit's own among them, whose primary changed
        at least as much. With n controls it cannot fall below 1 / (n + 1)."""
        change = abs(self.primary_edited - self.primary_clean)
        others = (self.primary_control - self.primary_clean).abs()
        return (1 + int((others >= change).sum())) / (1 + len(others))

    def __repr__(self) -> str:
        done = "added" if self.reverse else "removed"
        alive = self.is_sink.any(dim=1)
        count = int(alive.sum()) if self.reverse else int((~alive).sum())
        return (
            f"SinkRemoval({count} of {len(self.where)} sinks {done}: primary "
            f"{self.primary_clean:.3f} -> {self.primary_edited:.3f}, loss "
            f"{self.clean_loss.mean():.3f} -> {self.edited_loss.mean():.3f}, "
            f"{len(self.control_where)} controls)"
        )

    def _notebook_frame(self) -> pd.DataFrame:
        return self.summary()

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer: the primary's sink score, mean over heads, in every condition.

        `control`, `control_low`, `control_high` are mean and extremes over control runs (NaN
        without); `live` says whether the layer is one of `live_layers`.
        """
        import pandas as pd

        primary = self.primary_position
        control = self.control_score.mean(dim=2)
        if not len(control):
            control = torch.full((1, self.clean_score.shape[0]), torch.nan)
        frame = pd.DataFrame(
            {
                "layer": range(self.clean_score.shape[0]),
                "clean": self.clean_score[:, :, primary].mean(dim=1).numpy(),
                "edited": self.edited_score[:, :, primary].mean(dim=1).numpy(),
                "control": control.mean(dim=0).numpy(),
                "control_low": control.amin(dim=0).numpy(),
                "control_high": control.amax(dim=0).numpy(),
            }
        )
        frame["change"] = frame["edited"] - frame["clean"]
        frame["live"] = frame["layer"].isin(self.live_layers)
        return frame

    def heads(self) -> pd.DataFrame:
        """One row for each layer and head: the primary's sink score, clean and edited."""
        import pandas as pd

        primary = self.primary_position
        n_layers, n_heads = self.clean_score.shape[:2]
        layer, head = torch.meshgrid(torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
        clean = self.clean_score[:, :, primary].flatten()
        edited = self.edited_score[:, :, primary].flatten()
        return pd.DataFrame(
            {
                "layer": layer.flatten().numpy(),
                "head": head.flatten().numpy(),
                "clean": clean.numpy(),
                "edited": edited.numpy(),
                "change": (edited - clean).numpy(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row for each run (clean, edited, every control): primary, loss, output."""
        import pandas as pd

        names = ["clean", "edited", *(f"control {n}" for n in range(len(self.control_where)))]
        losses = torch.cat([self.clean_loss[None], self.edited_loss[None], self.control_loss])
        return pd.DataFrame(
            {
                "run": names,
                "primary": [
                    self.primary_clean,
                    self.primary_edited,
                    *self.primary_control.tolist(),
                ],
                "loss": losses.mean(dim=1).tolist(),
                "kl": [0.0, *self.kl.tolist()],
                "top1_changed": [0.0, *self.top1_changed.tolist()],
            }
        )

    def plot(self, **kwargs: Any) -> Figure:
        """Figure; see `secondary_sinks.report.removal.plot_removal`."""
        from secondary_sinks.report.removal import plot_removal

        return plot_removal(self, **kwargs)

    def _live(self, score: Float[Tensor, "layer head"]) -> float:
        return float(score[self.live_layers].mean())


def _pairs(listed: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(position), int(layer)) for position, layer in listed)
