"""What does the writer's MLP write for inputs along the principal components of its inputs?

If one direction of the MLP's input makes sinks, the output along that component must turn into a
large vector along the sink direction, and the output along the others must not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.analyses.mlp_records import counted_kinds, record_mlps
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError
from secondary_sinks.host.mlp import run_mlp
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result
from secondary_sinks.sinks.direct_writes import sink_directions
from secondary_sinks.sinks.selection import check_maps
from secondary_sinks.sinks.sink import Kind, Sink
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers

if TYPE_CHECKING:
    import pandas as pd

N_ALPHAS = 41
"""Default number of inputs along each component; an odd number includes 0."""


def mlp_response(
    model: Model,
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    sinks: SinkChoice = "secondary",
    writer: int | None = None,
    n_components: int = 6,
    alphas: Sequence[float] | None = None,
    n_controls: int = 8,
    seed: int = 0,
    fwd_hooks: Sequence[UserHook] = (),
) -> MlpResponse:
    """What does the writer's MLP write for multiples of the principal components of its inputs?

    The inputs (what the MLP reads, after the norm before it) of all sinks that it wrote and of
    ordinary tokens near them, over all texts, are decomposed by PCA. Each component `u`, of length
    1, goes through the MLP by itself as `alpha * u`, for alphas of both signs, without the mean of
    the inputs (arXiv 2512.22213). Measured are the norm of what is written, and its cosine with the
    sink direction: the unit vector of `r - c`, with `r` the primary's residual and `c` the common
    component after this layer. At `alpha = 0` it is what the MLP's biases alone write.

    >>> response = mlp_response(model, [detect_sinks(model, text) for text in texts])
    >>> response.components_frame()
    >>> response.plot()

    Not evidence for: that tokens have such inputs. They contain several components at once, and the
    MLP is not linear; a norm before it fixes the length of what it reads. That a component
    separates sinks from ordinary tokens does not show that the MLP uses it: look for one that also
    makes it write along the sink direction at the sinks' projection. Components of a few tokens are
    those tokens; pool texts.

    Args:
        model: any TransformerLens model.
        sink_maps: one or several, from `detect_sinks` in this model.
        sinks: which tokens; see `SinkMap.select`. With several maps "secondary", "primary" or
            "all", because a position is another token in each text.
        writer: layer of the MLP; then all selected sinks whose onset is this layer or a later one
            count. None takes the layer with the largest write for most sinks
            (`sinks.writers.resolve_writers`), and those sinks.
        n_components: how many; fewer where there are not as many tokens.
        alphas: the same multiples for each component. None covers, for each component, the largest
            projection of any of the tokens, with both signs.
        n_controls: at most how many ordinary tokens each sink contributes.
        seed: of their choice; recorded with the result.
        fwd_hooks: the hooks with which the maps were made, in force here as well.

    Raises:
        InputError: nothing selected, a layer out of range or after all onsets, unusable alphas, or
            a sink map that does not belong to this model.
        ModelError: the MLP cannot be run alone.
    """
    if n_components < 1 or n_controls < 1:
        raise InputError(f"n_components is {n_components}, n_controls {n_controls}; 1 at least")
    if alphas is not None and (not len(alphas) or not all(map(math.isfinite, alphas))):
        raise InputError("alphas must be finite numbers, at least one of them")
    maps = check_maps(model, sink_maps, fwd_hooks=fwd_hooks)
    layer, rule, written = _written_by_one(model, maps, _selected(maps, sinks), writer, fwd_hooks)
    tokens = _read(model, maps, written, layer, n_controls, seed, fwd_hooks)
    selected = torch.tensor([kind != "ordinary" for kind in tokens.kinds])
    if bool(selected.all()):
        raise InputError("there is no ordinary token to compare the sinks with; use a longer text")
    # A mean of n tokens leaves n - 1 directions.
    n_components = min(n_components, len(tokens.inputs) - 1, tokens.inputs.shape[1])
    pca = input_components(tokens.inputs, selected, n_components)
    grid = _grid(pca.projection, alphas)
    direction = torch.nn.functional.normalize(tokens.directions.mean(dim=0), dim=-1)
    points = grid[:, :, None] * pca.components[:, None]
    points = rearrange(points, "component alpha d_model -> (component alpha) d_model")
    points = torch.cat([points, torch.zeros(1, points.shape[1])])
    norm, cosine = norm_and_cosine(run_mlp(model, layer, points)["written"], direction)
    token_norm, token_cosine = norm_and_cosine(tokens.written, direction)
    return MlpResponse(
        writer=layer,
        writer_rule=rule,
        alphas=grid,
        norm=norm[:-1].reshape(grid.shape),
        cosine=cosine[:-1].reshape(grid.shape),
        zero_norm=float(norm[-1]),
        zero_cosine=float(cosine[-1]),
        kinds=tokens.kinds,
        text=tokens.text,
        position=tokens.position,
        token_norm=token_norm,
        token_cosine=token_cosine,
        direction=direction,
        agreement=float((tokens.directions @ direction).min()),
        provenance=maps[0].provenance.extended(seed=seed),
        **pca._asdict(),
    )


@dataclass(frozen=True, eq=False)
class MlpResponse(Result):
    """Output of one MLP along the components of its inputs; see `mlp_response`."""

    writer: int
    """Layer of the MLP."""
    writer_rule: WriterRule
    alphas: Float[Tensor, " component alpha"]
    """The inputs were `alphas[i, j] * components[i]`."""
    norm: Float[Tensor, " component alpha"]
    """Norm of what the MLP writes for that input."""
    cosine: Float[Tensor, " component alpha"]
    """Its cosine with the sink direction after this layer; NaN where it writes zeros."""
    zero_norm: float
    """Norm of what the MLP writes for an input of zeros: 0 unless it has biases."""
    zero_cosine: float
    """Cosine of that; NaN where it is zero."""
    components: Float[Tensor, " component d_model"]
    """Unit vectors; selected tokens lie on the positive side of ordinary ones."""
    variance_ratio: Float[Tensor, " component"]
    """Share of the inputs' variance along each component."""
    separation: Float[Tensor, " component"]
    """Area under the ROC curve: how often a selected token's projection is above an ordinary
    token's. 0.5 is chance, 1 a clean cut."""
    projection: Float[Tensor, " token component"]
    """Of the inputs that the components were computed from, not of their deviations from the
    mean."""
    kinds: tuple[Kind | Literal["ordinary"], ...]
    """Kind of each of these tokens."""
    text: Int[Tensor, " token"]
    """Index of the text that holds each token."""
    position: Int[Tensor, " token"]
    token_norm: Float[Tensor, " token"]
    """Norm of what the MLP wrote at each of them in its text."""
    token_cosine: Float[Tensor, " token"]
    """Cosine of that with the sink direction."""
    direction: Float[Tensor, " d_model"]
    """The sink direction after this layer, mean over the texts."""
    agreement: float
    """Smallest cosine of a text's sink direction with that mean."""
    provenance: Provenance

    def __repr__(self) -> str:
        best = int(self.separation.argmax())
        return (
            f"MlpResponse({self.provenance.model.name!r}, MLP {self.writer}, "
            f"{counted_kinds(self.kinds)}: component {best + 1} separates them best, "
            f"{self.separation[best]:.2f})"
        )

    @property
    def selected(self) -> Bool[Tensor, " token"]:
        """Which tokens were selected; the others are ordinary tokens near them."""
        return torch.tensor([kind != "ordinary" for kind in self.kinds])

    @property
    def selected_projection(self) -> Float[Tensor, " component"]:
        """Mean projection of the selected tokens."""
        return self.projection[self.selected].mean(dim=0)

    @property
    def at_selected(self) -> tuple[Float[Tensor, " component"], Float[Tensor, " component"]]:
        """Norm and cosine of each component's output at the alpha nearest to the selected tokens'
        mean projection."""
        distance = (self.alphas - self.selected_projection[:, None]).abs()
        nearest = distance.argmin(dim=1, keepdim=True)
        return self.norm.gather(1, nearest)[:, 0], self.cosine.gather(1, nearest)[:, 0]

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

        norm, cosine = self.at_selected
        return pd.DataFrame(
            {
                "component": range(1, len(self.components) + 1),
                "variance_ratio": self.variance_ratio.tolist(),
                "separation": self.separation.tolist(),
                "selected_projection": self.selected_projection.tolist(),
                "ordinary_projection": self.projection[~self.selected].mean(dim=0).tolist(),
                "largest_norm": self.norm.amax(dim=1).tolist(),
                "norm_at_selected": norm.tolist(),
                "cosine_at_selected": cosine.tolist(),
            }
        )


def _selected(maps: Sequence[SinkMap], sinks: SinkChoice) -> list[list[Sink]]:
    """The selected sinks of each text; texts without any are allowed among several."""
    if len(maps) == 1:
        return [maps[0].select(sinks)]
    if not isinstance(sinks, str):
        raise InputError(
            f"sinks={sinks!r} with {len(maps)} sink maps; a position is another token in each "
            "text, so use 'secondary', 'primary' or 'all', or pass one map"
        )
    chosen = [[s for s in sink_map.sinks if sinks in ("all", s.kind)] for sink_map in maps]
    if not any(chosen):
        maps[0].select(sinks)  # raises, and says what to do
    return chosen


def _written_by_one(
    model: Model,
    maps: Sequence[SinkMap],
    chosen: Sequence[Sequence[Sink]],
    writer: int | None,
    fwd_hooks: Sequence[UserHook],
) -> tuple[int, WriterRule, list[list[Sink]]]:
    """The layer, how it was chosen, and the sinks of each text that it can have written."""
    resolved = [
        resolve_writers(model, sink_map, sinks, writer, fwd_hooks=fwd_hooks) if sinks else None
        for sink_map, sinks in zip(maps, chosen, strict=True)
    ]
    layers = [writers.layers if writers else () for writers in resolved]
    layer = Counter(layer for of_text in layers for layer in of_text).most_common(1)[0][0]
    written = [
        [sink for sink, own in zip(sinks, of_text, strict=True) if own == layer <= sink.l_start]
        for sinks, of_text in zip(chosen, layers, strict=True)
    ]
    if not any(written):
        onsets = sorted({sink.l_start for sinks in chosen for sink in sinks})
        raise InputError(
            f"MLP {layer} comes after the onset of every selected sink (onsets: {onsets}), so it "
            "wrote none of them"
        )
    return layer, "largest_write" if writer is None else "given", written


@dataclass(frozen=True)
class _Tokens:
    """What the MLP read and wrote at the selected and ordinary tokens of all texts."""

    kinds: tuple[Kind | Literal["ordinary"], ...]
    text: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    inputs: Float[Tensor, " token d_model"]
    written: Float[Tensor, " token d_model"]
    directions: Float[Tensor, " text d_model"]
    """The sink direction after the layer, in each text with selected tokens."""


def _read(
    model: Model,
    maps: Sequence[SinkMap],
    written: Sequence[Sequence[Sink]],
    layer: int,
    n_controls: int,
    seed: int,
    fwd_hooks: Sequence[UserHook],
) -> _Tokens:
    kinds: list[Kind | Literal["ordinary"]] = []
    texts: list[int] = []
    positions: list[int] = []
    records, directions = [], []
    for number, (sink_map, sinks) in enumerate(zip(maps, written, strict=True)):
        if not sinks:
            continue
        targets = [Target.of(sink_map, sink, n_controls=n_controls, seed=seed) for sink in sinks]
        kind_at: dict[int, Kind | Literal["ordinary"]] = {
            sink.position: sink.kind for sink in sinks
        }
        matched = {position for target in targets for position in target.matched}
        at = {layer: [*sorted(kind_at), *sorted(matched)]}
        record = record_mlps(model, sink_map, at, fwd_hooks=fwd_hooks)[layer]
        kinds.extend(kind_at.get(position, "ordinary") for position in record.positions)
        texts += [number] * len(record.positions)
        positions += record.positions
        records.append(record)
        directions.append(sink_directions(sink_map, [layer])[0])
    return _Tokens(
        kinds=tuple(kinds),
        text=torch.tensor(texts),
        position=torch.tensor(positions),
        inputs=torch.cat([record.stages["input"] for record in records]),
        written=torch.cat([record.stages["written"] for record in records]),
        directions=torch.stack(directions),
    )


def _grid(
    projection: Float[Tensor, " token component"], alphas: Sequence[float] | None
) -> Float[Tensor, " component alpha"]:
    n = projection.shape[1]
    if alphas is not None:
        return torch.tensor([float(alpha) for alpha in alphas]).expand(n, -1).clone()
    span = projection.abs().amax(dim=0)
    half = N_ALPHAS // 2
    return span[:, None] * torch.arange(-half, half + 1) / half  # exactly 0 in the middle


class InputComponents(NamedTuple):
    """Principal components of the inputs of some tokens; see the same fields of `MlpResponse`."""

    components: Float[Tensor, " component d_model"]
    variance_ratio: Float[Tensor, " component"]
    separation: Float[Tensor, " component"]
    projection: Float[Tensor, " token component"]


def input_components(
    inputs: Float[Tensor, " token d_model"], selected: Bool[Tensor, " token"], n_components: int
) -> InputComponents:
    """PCA of the inputs of selected and ordinary tokens together (scikit-learn)."""
    from sklearn.decomposition import PCA
    from sklearn.metrics import roc_auc_score

    pca: Any = PCA(n_components, svd_solver="full").fit(inputs.double().numpy())
    components = torch.from_numpy(pca.components_)
    projection = inputs.double() @ components.T
    gap = projection[selected].mean(dim=0) - projection[~selected].mean(dim=0)
    sign = torch.where(gap < 0, -1.0, 1.0).double()
    components, projection = components * sign[:, None], projection * sign
    areas = [roc_auc_score(selected.numpy(), column.numpy()) for column in projection.T]
    return InputComponents(
        components=components.float(),
        variance_ratio=torch.from_numpy(pca.explained_variance_ratio_).float(),
        separation=torch.tensor(areas),
        projection=projection.float(),
    )


def norm_and_cosine(
    vectors: Float[Tensor, " *point d_model"], direction: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " *point"], Float[Tensor, " *point"]]:
    """Norm of each vector and its cosine with a direction; NaN for vectors of length 0."""
    norm = vectors.norm(dim=-1)
    along = vectors @ torch.nn.functional.normalize(direction, dim=-1)
    return norm, torch.where(norm > 0, along / norm, torch.nan).clamp(-1, 1)
