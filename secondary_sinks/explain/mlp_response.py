"""What an MLP writes for inputs along the principal components of what it reads.

If sinks are made by one direction of the MLP's input, the output along that component must turn
into a large vector along the sink direction, and along the others it must not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class InputComponents:
    """Principal components of the inputs of some tokens."""

    components: Float[Tensor, "component d_model"]
    """Unit vectors, turned so that sinks lie on the positive side of ordinary tokens."""
    mean: Float[Tensor, "d_model"]
    variance_ratio: Float[Tensor, "component"]
    """Share of the inputs' variance along each."""
    projection: Float[Tensor, "token component"]
    """Of the inputs themselves, not of their deviations from the mean."""
    separation: Float[Tensor, "component"]
    """Area under the ROC curve: how often a sink's projection is above an ordinary token's. 0.5 is
    chance, 1 a clean cut."""


def input_components(
    inputs: Float[Tensor, "token d_model"], is_sink: Bool[Tensor, "token"], n_components: int
) -> InputComponents:
    """PCA of the inputs of sinks and ordinary tokens together (scikit-learn)."""
    from sklearn.decomposition import PCA
    from sklearn.metrics import roc_auc_score

    pca = PCA(n_components, svd_solver="full").fit(inputs.double().numpy())
    components = torch.from_numpy(pca.components_)
    projection = inputs.double() @ components.T
    gap = projection[is_sink].mean(dim=0) - projection[~is_sink].mean(dim=0)
    sign = torch.where(gap < 0, -1.0, 1.0).double()
    components, projection = components * sign[:, None], projection * sign
    areas = [roc_auc_score(is_sink.numpy(), column.numpy()) for column in projection.T]
    return InputComponents(
        components=components.float(),
        mean=torch.from_numpy(pca.mean_).float(),
        variance_ratio=torch.from_numpy(pca.explained_variance_ratio_).float(),
        projection=projection.float(),
        separation=torch.tensor(areas),
    )


def norm_and_cosine(
    vectors: Float[Tensor, "*point d_model"], direction: Float[Tensor, "d_model"]
) -> tuple[Float[Tensor, "*point"], Float[Tensor, "*point"]]:
    """Norm of each vector and its cosine with a direction; NaN for vectors of no length."""
    norm = vectors.norm(dim=-1)
    along = vectors @ torch.nn.functional.normalize(direction, dim=-1)
    return norm, torch.where(norm > 0, along / norm, torch.nan).clamp(-1, 1)


@dataclass(frozen=True, eq=False)
class MlpResponse(Result):
    """Output of one MLP along the components of its inputs; see `mlp_response`."""

    layer: int
    alphas: Float[Tensor, "component alpha"]
    """The inputs were `alphas[i, j] * components[i]`."""
    norm: Float[Tensor, "component alpha"]
    """Norm of what the MLP writes for that input."""
    cosine: Float[Tensor, "component alpha"]
    """Its cosine with the sink direction after this layer; NaN where it writes nothing."""
    zero_norm: float
    """Norm of what the MLP writes for an input of zeros: 0 unless it has biases."""
    zero_cosine: float
    """Cosine of that; NaN where it is nothing."""
    components: Float[Tensor, "component d_model"]
    variance_ratio: Float[Tensor, "component"]
    """Share of the inputs' variance along each component."""
    separation: Float[Tensor, "component"]
    """How often a sink's projection is above an ordinary token's (area under the ROC curve)."""
    projection: Float[Tensor, "token component"]
    """Of the inputs that the components were computed from."""
    is_sink: Bool[Tensor, "token"]
    text: Int[Tensor, "token"]
    """In which of the texts each of these tokens stands."""
    position: Int[Tensor, "token"]
    token_norm: Float[Tensor, "token"]
    """Norm of what the MLP wrote at each of them in its text."""
    token_cosine: Float[Tensor, "token"]
    """Cosine of that with the sink direction."""
    direction: Float[Tensor, "d_model"]
    """The sink direction after this layer, mean over the texts."""
    agreement: float
    """Least cosine of a text's own sink direction with that mean."""
    seed: int
    model: dict[str, Any]

    def __repr__(self) -> str:
        n = int(self.is_sink.sum())
        best = int(self.separation.argmax())
        return (
            f"MlpResponse({self.model.get('name', '?')!r}, MLP {self.layer}, {n} sinks and "
            f"{len(self.is_sink) - n} ordinary tokens: component {best + 1} separates them best, "
            f"{self.separation[best]:.2f})"
        )

    @property
    def input_along(self) -> Float[Tensor, "component"]:
        """Mean projection of the sinks."""
        return self.projection[self.is_sink].mean(dim=0)

    @property
    def at_sinks(self) -> tuple[Float[Tensor, "component"], Float[Tensor, "component"]]:
        """Norm and cosine of each component's output at the alpha nearest to the sinks' mean
        projection."""
        near = (self.alphas - self.input_along[:, None]).abs().argmin(dim=1, keepdim=True)
        return self.norm.gather(1, near)[:, 0], self.cosine.gather(1, near)[:, 0]

    def to_frame(self) -> pd.DataFrame:
        """One row for each component and alpha; components are counted from 1."""
        import pandas as pd

        n, m = self.alphas.shape
        return pd.DataFrame(
            {
                "component": torch.arange(1, n + 1).repeat_interleave(m).numpy(),
                "alpha": self.alphas.flatten().numpy(),
                "norm": self.norm.flatten().numpy(),
                "cosine": self.cosine.flatten().numpy(),
            }
        )

    def components_frame(self) -> pd.DataFrame:
        """One row for each component: what it explains, separates, and makes the MLP write."""
        import pandas as pd

        norm, cosine = self.at_sinks
        return pd.DataFrame(
            {
                "component": range(1, len(self.components) + 1),
                "variance_ratio": self.variance_ratio.tolist(),
                "separation": self.separation.tolist(),
                "sinks_projection": self.input_along.tolist(),
                "ordinary_projection": self.projection[~self.is_sink].mean(dim=0).tolist(),
                "largest_norm": self.norm.amax(dim=1).tolist(),
                "norm_at_sinks": norm.tolist(),
                "cosine_at_sinks": cosine.tolist(),
            }
        )

    def plot(self, **kwargs: Any) -> Figure:
        """Curves; see `secondary_sinks.report.mlp_response.plot_mlp_response`."""
        from secondary_sinks.report.mlp_response import plot_mlp_response

        return plot_mlp_response(self, **kwargs)
