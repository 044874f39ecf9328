"""What does the writer's MLP write for inputs along the principal components of its inputs?

If sinks are made by one direction of the MLP's input, the output along that component must turn
into a large vector along the sink direction, and along the others it must not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.analyses.mlp_records import record_mlps
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.mlp import run_mlp
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.result import Result
from secondary_sinks.sinks.detect_sinks import detect_sinks
from secondary_sinks.sinks.direct_writes import direct_writes
from secondary_sinks.sinks.selection import sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import candidates

if TYPE_CHECKING:
    import pandas as pd

N_ALPHAS = 41

"""Default number of inputs along each component; an odd one has 0 among them."""


def mlp_response(
    model: Any,
    text: Text | SinkMap | Sequence[SinkMap],
    *,
    layer: int | None = None,
    n_components: int = 6,
    alphas: Sequence[float] | None = None,
    n_controls: int = 8,
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> MlpResponse:
    """Feed an MLP multiples of the principal components of its inputs, and see what it writes.

    The inputs (what the MLP reads, after the norm before it) of all sinks that it wrote and of
    ordinary tokens near them, over all texts, are decomposed by PCA. Each component `u`, of length
    1, goes through the MLP by itself as `alpha * u`, for alphas of both signs, without the mean of
    the inputs (arXiv 2512.22213). Norm of what is written, and its cosine with the sink direction:
    the unit vector of `r - c`, with `r` the primary's residual and `c` the common component after
    this layer. At `alpha = 0` it is what the MLP's biases write alone.

    What it is not evidence for: that tokens have such inputs. They hold several components at once,
    and the MLP is not linear; a norm before it fixes the length of what it reads. That a component
    separates sinks from ordinary tokens does not say that the MLP uses it: look for one that also
    makes it write along the sink direction at the sinks' projection. Components of a few tokens are
    those tokens; pool texts.

    Args:
        model: any TransformerLens model.
        text: one text or several (see `detect_sinks`), a sink map, or several sink maps.
        layer: of the MLP, and then all secondary sinks whose onset is this layer or later count;
            None takes the layer that is the candidate writer of most sinks, and those sinks.
        n_components: how many; fewer where there are not as many tokens.
        alphas: the same multiples for each component. None spans, for each, the largest projection
            of any of the tokens, with both signs.
        n_controls: how many ordinary tokens each sink brings with it at most.
        seed: of their choice; recorded with the result.
        chat: strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every pass over a text.

    Raises:
        InputError: no secondary sinks in any text, a layer out of range or that wrote none,
            unusable alphas, or a sink map of another model or criterion.
        ModelError: the MLP cannot be run on vectors of its own.
    """
    if n_components < 1 or n_controls < 1:
        raise InputError(f"n_components is {n_components}, n_controls {n_controls}; 1 at least")
    if alphas is not None and (not len(alphas) or not all(map(math.isfinite, alphas))):
        raise InputError("alphas must be finite numbers, at least one of them")
    n_layers = describe(model).n_layers
    if layer is not None and not 0 <= layer < n_layers:
        raise InputError(f"layer {layer} is out of range: there are {n_layers}, counted from 0")
    maps = _maps(model, text, chat, fwd_hooks)
    if not any(one.secondary for one in maps):
        raise InputError(
            "no secondary sinks in any of the texts, so no MLP is known to write any: see "
            "detect_sinks(...).margins() for the tokens that came nearest"
        )
    cleans = [
        CleanRun.of(model, one, fwd_hooks=fwd_hooks) if one.secondary else None for one in maps
    ]
    layer, written = _sinks_of(model, maps, cleans, layer, fwd_hooks)
    texts = []
    for number, (clean, chosen) in enumerate(zip(cleans, written, strict=True)):
        if clean is not None and chosen:
            texts.append(_read(model, number, clean, chosen, layer, n_controls, seed, fwd_hooks))
    inputs = torch.cat([one.inputs for one in texts])
    is_sink = torch.cat([one.is_sink for one in texts])
    if bool(is_sink.all()):
        raise InputError("there is no ordinary token to compare the sinks with; use a longer text")
    # A mean of n tokens leaves n - 1 directions.
    n_components = min(n_components, len(inputs) - 1, inputs.shape[1])
    found = input_components(inputs, is_sink, n_components)
    grid = _grid(found.projection, alphas)
    directions = torch.stack([one.direction for one in texts])
    direction = torch.nn.functional.normalize(directions.mean(dim=0), dim=-1)
    points = (grid[:, :, None] * found.components[:, None]).flatten(0, 1)
    points = torch.cat([points, torch.zeros(1, points.shape[1])])
    norm, cosine = norm_and_cosine(run_mlp(model, layer, points)["written"], direction)
    token_norm, token_cosine = norm_and_cosine(torch.cat([one.written for one in texts]), direction)
    return MlpResponse(
        layer=layer,
        alphas=grid,
        norm=norm[:-1].reshape(grid.shape),
        cosine=cosine[:-1].reshape(grid.shape),
        zero_norm=float(norm[-1]),
        zero_cosine=float(cosine[-1]),
        components=found.components,
        variance_ratio=found.variance_ratio,
        separation=found.separation,
        projection=found.projection,
        is_sink=is_sink,
        text=torch.cat([torch.full((len(one.inputs),), one.number) for one in texts]),
        position=torch.cat([torch.tensor(one.positions) for one in texts]),
        token_norm=token_norm,
        token_cosine=token_cosine,
        direction=direction,
        agreement=float((directions @ direction).min()),
        seed=seed,
        model=maps[0].model,
    )


@dataclass(frozen=True)
class _TextInputs:
    """What the MLP read and wrote at the sinks and at matched tokens of one text."""

    number: int
    positions: tuple[int, ...]
    inputs: Float[Tensor, "token d_model"]
    written: Float[Tensor, "token d_model"]
    is_sink: Tensor
    direction: Float[Tensor, "d_model"]


def _maps(
    model: Any,
    text: Text | SinkMap | Sequence[SinkMap],
    chat: bool,
    fwd_hooks: Sequence[UserHook],
) -> list[SinkMap]:
    if isinstance(text, SinkMap):
        return [sink_map_of(model, text)]
    if isinstance(text, Sequence) and text and all(isinstance(one, SinkMap) for one in text):
        return [sink_map_of(model, one) for one in text if isinstance(one, SinkMap)]
    found: Any = detect_sinks(model, text, chat=chat, fwd_hooks=fwd_hooks)  # type: ignore[arg-type]
    return [found] if isinstance(found, SinkMap) else list(found)


def _sinks_of(
    model: Any,
    maps: Sequence[SinkMap],
    cleans: Sequence[CleanRun | None],
    layer: int | None,
    fwd_hooks: Sequence[UserHook],
) -> tuple[int, list[list[Sink]]]:
    """The layer, and the sinks of each text that it can have written."""
    if layer is not None:
        since = [[s for s in one.secondary if s.l_start >= layer] for one in maps]
        if not any(since):
            onsets = sorted({s.l_start for one in maps for s in one.secondary})
            raise InputError(
                f"every secondary sink is there before layer {layer}: their onsets are {onsets}"
            )
        return layer, since
    writers: list[list[int]] = []
    for one, clean in zip(maps, cleans, strict=True):
        chosen = one.secondary
        if clean is None or not chosen:
            writers.append([])
            continue
        writes = direct_writes(model, one, chosen, clean=clean, fwd_hooks=fwd_hooks)
        writers.append(candidates(writes, chosen))
    most = Counter(writer for own in writers for writer in own).most_common(1)[0][0]
    return most, [
        [s for s, writer in zip(one.secondary, own, strict=True) if writer == most]
        for one, own in zip(maps, writers, strict=True)
    ]


def _read(
    model: Any,
    number: int,
    clean: CleanRun,
    chosen: Sequence[Sink],
    layer: int,
    n_controls: int,
    seed: int,
    fwd_hooks: Sequence[UserHook],
) -> _TextInputs:
    targets = [Target.of(clean.sink_map, s, n_controls=n_controls, seed=seed) for s in chosen]
    sinks = sorted({target.sink.position for target in targets})
    matched = sorted({position for target in targets for position in target.matched})
    record = record_mlps(model, clean.sink_map, {layer: [*sinks, *matched]}, fwd_hooks=fwd_hooks)[
        layer
    ]
    centered = clean.primary[layer] - clean.common[layer]
    return _TextInputs(
        number=number,
        positions=record.positions,
        inputs=record.stages["input"],
        written=record.stages["written"],
        is_sink=torch.tensor([position in sinks for position in record.positions]),
        direction=torch.nn.functional.normalize(centered, dim=-1),
    )


def _grid(
    projection: Float[Tensor, "token component"], alphas: Sequence[float] | None
) -> Float[Tensor, "component alpha"]:
    n = projection.shape[1]
    if alphas is not None:
        return torch.tensor([float(alpha) for alpha in alphas]).expand(n, -1).clone()
    span = projection.abs().amax(dim=0)
    half = N_ALPHAS // 2
    return span[:, None] * torch.arange(-half, half + 1) / half  # exactly 0 in the middle


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
