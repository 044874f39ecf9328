"""What does the writer's MLP write for inputs along the principal components of its inputs?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.explain.mlp_response import MlpResponse, input_components, norm_and_cosine
from secondary_sinks.explain.sinks import Sink, SinkMap
from secondary_sinks.intervene.clean import CleanRun
from secondary_sinks.models.host import UserHook, describe
from secondary_sinks.models.mlp import run_mlp
from secondary_sinks.models.text import Text
from secondary_sinks.questions.attribution_rows import Target
from secondary_sinks.questions.detect_sinks import detect_sinks
from secondary_sinks.questions.direct_writes import direct_writes
from secondary_sinks.questions.given import sink_map_of
from secondary_sinks.questions.mlp_records import record_mlps
from secondary_sinks.questions.writers import candidates

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
    targets = [Target.of(clean.sinks, s, n_controls=n_controls, seed=seed) for s in chosen]
    sinks = sorted({target.sink.position for target in targets})
    matched = sorted({position for target in targets for position in target.matched})
    record = record_mlps(model, clean.sinks, {layer: [*sinks, *matched]}, fwd_hooks=fwd_hooks)[
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
