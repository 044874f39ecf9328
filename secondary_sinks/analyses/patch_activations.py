"""Which activation of one text makes another text's token a sink, or removes the sink?

Activation patching runs one text with a single activation taken from another. It is usually applied
to logits; here the metric is that of a sink: the attention that a token draws.

>>> patched = ss.patch_activations(model, clean, corrupted, layers=range(4, 8))
>>> patched.normalized                 # [site, layer, token]: 0 as before, 1 as in the other run

*Denoising* puts clean activations into the corrupted run and shows what suffices to restore the
sink; *noising* puts corrupted ones into the clean run and shows what the sink needs. The two need
not agree: where either of two paths suffices, noising one of them shows nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.memory import MEMORY_BUDGET
from secondary_sinks.host.model_info import n_layers_of
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import Replace
from secondary_sinks.intervene.gradients import metric_gradients
from secondary_sinks.intervene.interventions import SITES, Intervention, check_rows
from secondary_sinks.intervene.whole_text import TextState, run_whole_texts
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("sink_score", "norm", "alignment")
"""Metrics by name, each of one token, averaged over layers (and heads)."""

Metric: TypeAlias = "str | Callable[[TextState], Tensor]"
Pair: TypeAlias = tuple[int, int]
Direction = Literal["denoising", "noising"]
Scan = Literal["exact", "attribution"]


def patch_activations(
    model: Model,
    clean: SinkMap,
    corrupted: SinkMap,
    sink: Sink | int | None = None,
    *,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    metric: Metric = "sink_score",
    positions: Sequence[Pair] | None = None,
    direction: Direction = "denoising",
    layers: Iterable[int] | None = None,
    token_positions: Iterable[int] | None = None,
    metric_layers: Iterable[int] | None = None,
    scan: Scan = "exact",
    n_checked: int = 16,
    logits: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> PatchResult:
    """Which single activation carries what makes a token of one text a sink, and not of another?

    Every site, layer and token is patched by itself.

    Not evidence for: that a component computes what it carries (the residual stream carries
    everything), or anything about texts that differ in something else than these two.

    >>> clean, corrupted = (ss.detect_sinks(model, text) for text in (with_sink, without_sink))
    >>> patched = ss.patch_activations(model, clean, corrupted, sites=["mlp_out"])
    >>> patched.plot()

    Args:
        model: any TransformerLens model.
        clean: the map of the text with the sink, from `detect_sinks` in this model.
        corrupted: the map of the text to compare with.
        sink: the token that the metric is about, a sink of the clean text or any of its positions;
            by default its strongest secondary sink, or its primary.
        sites: any of `intervene.interventions.SITES` but `resid_mid`.
        metric: "sink_score" (mean over heads and over the layers that see the token's residual
            while it is a sink), "norm" or "alignment" of its residual in those layers (cosine with
            the clean text's primary), or a function of a `TextState` that returns one number; it
            must be differentiable for `scan="attribution"`.
        positions: pairs (clean position, corrupted position) of tokens that correspond. Needed for
            texts of unequal length; by default each token corresponds to the one at its position.
        direction: "denoising" or "noising".
        layers: layers to patch; by default all.
        token_positions: tokens to patch, by position in the clean text; by default all paired.
        metric_layers: layers over which a named metric is averaged; by default those of the sink's
            life (one later for "sink_score"), for another token those of `SinkMap.select`, and all
            in a text without a primary sink.
        scan: "exact" runs the text once for each cell; "attribution" estimates all cells by
            gradient times difference from one forward and one backward pass.
        n_checked: how many cells, those with the largest estimates, are also run exactly after an
            attribution scan; `PatchResult.error` is measured on them.
        logits: let a metric given as a function see the logits.
        fwd_hooks: the hooks with which the maps were made, in force here as well.
        memory_budget: bytes that attention and logits of one pass may take.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        InputError: unequal lengths without `positions`, a wrong pairing, a `sink` that is not
            paired or that no later token can see, indices out of range, an unknown option, a sink
            map of another model.
        ModelError: a model that cannot be measured, or a metric without gradient.
    """
    maps = [check_map(model, sink_map, fwd_hooks=fwd_hooks) for sink_map in (clean, corrupted)]
    _check_options(sites, metric, direction, scan, n_checked)
    pairs = _pairs(maps, positions)
    columns = pairs if token_positions is None else _only(pairs, token_positions)
    token = _token(maps, dict(pairs), sink, metric)
    averaged = _metric_layers(clean, token[0] if sink is None else sink, metric, metric_layers)
    depth = tuple(range(n_layers_of(model)) if layers is None else layers)
    if not depth:
        raise InputError("layers is empty: nothing to patch")
    # Both runs are measured along the clean text's direction, so that alignments are comparable.
    along = {name: getattr(clean, name) for name in ("primary_residual", "common_residual")}
    runs = [CleanRun(clean), CleanRun(dataclasses.replace(corrupted, **along))]
    base, source = (1, 0) if direction == "denoising" else (0, 1)
    cells = _Cells(
        model=model,
        base=runs[base],
        source=runs[source],
        places=[Site(name, layer) for name in sites for layer in depth],
        columns=[(pair[base], pair[source]) for pair in columns],
        metric=_function(metric, token[base], averaged),
        options={"logits": logits, "fwd_hooks": fwd_hooks},
    )
    rows = [(cells.patch(place, 0, torch.zeros(0)),) for place in range(len(cells.places))]
    check_rows(model, rows, maps[base].n_tokens)
    before = cells.unpatched(runs[base], cells.metric)
    after = cells.unpatched(runs[source], _function(metric, token[source], averaged))
    budget = {"memory_budget": memory_budget, "progress": progress}
    shape = (len(sites), len(depth), len(columns))
    checked, checked_value = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    if scan == "exact":
        value = cells.exact(range(math.prod(shape)), before, **budget)
    else:
        value = before + cells.estimated_effects()
        checked = (value - before).abs().topk(min(n_checked, len(value))).indices
        checked_value = cells.exact(checked.tolist(), before, **budget)
    return PatchResult(
        sites=tuple(sites),
        layers=depth,
        pairs=tuple(columns),
        tokens=tuple(maps[base].token_strings[pair[base]] for pair in columns),
        direction=direction,
        scan=scan,
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric)),
        position=token,
        metric_layers=averaged,
        base=before,
        source=after,
        value=value.reshape(shape),
        checked=torch.stack(torch.unravel_index(checked, shape), dim=1),
        checked_value=checked_value,
        provenance=clean.provenance,
    )


@dataclass(frozen=True)
class PatchResult(Result):
    """A metric of one run (the *base*) with single activations taken from another (the *source*).

    Denoising patches clean activations into the corrupted run, noising the other way round.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    """(clean position, corrupted position) of each column."""
    tokens: tuple[str, ...]
    """The base run's token of each column."""
    direction: Direction
    scan: Scan
    metric: str
    """Name of the metric."""
    position: tuple[int, int]
    """(clean position, corrupted position) of the token that the metric is about."""
    metric_layers: tuple[int, ...]
    """Layers over which the metric is averaged."""
    base: float
    """The metric with nothing patched."""
    source: float
    """The metric of the run that the activations come from."""
    value: Float[Tensor, " site layer pair"]
    """The metric of the patched run; with `scan="attribution"` a first-order estimate of it."""
    checked: Int[Tensor, " check 3"]
    """Indices (site, layer, pair) of the estimated cells that were run exactly as well."""
    checked_value: Float[Tensor, " check"]
    """The exact metric of those cells."""
    provenance: Provenance

    @property
    def effect(self) -> Float[Tensor, " site layer pair"]:
        """Change of the metric against the base run, in the metric's unit."""
        return self.value - self.base

    @property
    def normalized(self) -> Float[Tensor, " site layer pair"]:
        """Effect over the difference of the two runs: 0 is the base run, 1 the source.

        Not confined to [0, 1]. NaN where the two runs have the same metric.
        """
        gap = self.source - self.base
        return self.effect / (gap if abs(gap) > 1e-12 else math.nan)

    @property
    def error(self) -> float:
        """Root mean square error of the estimates over the checked cells, relative to that of the
        exact effects there; NaN where nothing was estimated or checked.

        The cells with the largest estimates were checked: a cell whose effect the gradient misses
        altogether is not among them.
        """
        if not len(self.checked):
            return math.nan
        estimated = self.value[tuple(self.checked.T)]
        exact = self.checked_value - self.base
        size = exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return float((estimated - self.checked_value).square().mean().sqrt() / size)

    def __repr__(self) -> str:
        checked = (
            f", error {self.error:.2g} in {len(self.checked)} cells" if len(self.checked) else ""
        )
        largest = self.effect.abs().argmax()
        site, layer, pair = (int(i) for i in torch.unravel_index(largest, self.value.shape))
        at = self.pairs[pair][self.direction == "denoising"]
        return (
            f"PatchResult({self.direction}, {self.scan}{checked}: {self.metric} {self.base:.4g} to "
            f"{self.source:.4g}, {' '.join(self.sites)} x {len(self.layers)} layers x "
            f"{len(self.pairs)} tokens, largest at {self.sites[site]} {self.layers[layer]} token "
            f"{at})"
        )

    def _notebook_frame(self) -> pd.DataFrame:
        frame = self.to_frame()
        order = frame["effect"].abs().sort_values(ascending=False).index
        return frame.loc[order].head(10)

    def to_frame(self) -> pd.DataFrame:
        """One row for each cell; `exact` holds the exact metric where it is known."""
        import pandas as pd

        columns = range(len(self.pairs))
        product = [(site, x, c) for site in self.sites for x in self.layers for c in columns]
        exact = self.value.clone()
        if self.scan != "exact":
            exact.fill_(torch.nan)[tuple(self.checked.T)] = self.checked_value
        return pd.DataFrame(
            {
                "site": [site for site, _, _ in product],
                "layer": [layer for _, layer, _ in product],
                "clean_position": [self.pairs[column][0] for _, _, column in product],
                "corrupted_position": [self.pairs[column][1] for _, _, column in product],
                "token": [self.tokens[column] for _, _, column in product],
                "value": self.value.flatten().numpy(),
                "effect": self.effect.flatten().numpy(),
                "normalized": self.normalized.flatten().numpy(),
                "exact": exact.flatten().numpy(),
            }
        )


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """The cells of one scan. Cell `i` is the place `i // len(columns)` and the column
    `i % len(columns)`."""

    model: Model
    base: CleanRun
    source: CleanRun
    places: list[Site]
    """Sites and layers, by site."""
    columns: list[Pair]
    """(base position, source position) of each column."""
    metric: Callable[[TextState], Tensor]
    options: dict[str, Any]
    """Of every pass that measures the metric."""

    def patch(self, place: int, column: int, value: Tensor) -> Intervention:
        """A value in the place of one activation of the base run."""
        site: Any = self.places[place]
        return Intervention(site.name, site.layer, self.columns[column][0], Replace(value))

    def unpatched(self, run: CleanRun, metric: Callable[[TextState], Tensor]) -> float:
        """The metric of a run as it is."""
        state, _ = run_whole_texts(self.model, run, [], output=False, **self.options)
        return _number(metric, state)

    def exact(self, cells: Sequence[int], before: float, **budget: Any) -> Float[Tensor, " cell"]:
        """Run each cell, except those that cannot change anything."""
        # An activation before the first token in which the texts differ is the same in both.
        same = _common_prefix(self.base.tokens, self.source.tokens)
        same = 0 if self.options["fwd_hooks"] else same
        activations = self._source_activations()
        moved, texts = [], []
        for index, cell in enumerate(cells):
            place, column = divmod(cell, len(self.columns))
            at, source_at = self.columns[column]
            if not at == source_at < same:
                moved.append(index)
                texts.append([self.patch(place, column, activations[self.places[place]][column])])
        value = torch.full((len(cells),), before)
        if texts:
            _, numbers = run_whole_texts(
                self.model,
                self.base,
                texts,
                output=False,
                reduce=lambda state: _number(self.metric, state),
                **self.options,
                **budget,
            )
            value[moved] = torch.tensor(numbers)
        return value

    def estimated_effects(self) -> Float[Tensor, " cell"]:
        """First-order estimate of every cell's effect: gradient times difference."""
        activations = self._source_activations()
        gradients = metric_gradients(
            self.model, self.base, self.metric, self.places, **self.options
        )
        at = [position for position, _ in self.columns]
        effects = []
        for site in self.places:
            value, slope = (part[at].float().cpu() for part in gradients[site])
            difference = activations[site].float() - value
            effects.append((difference * slope).flatten(1).sum(dim=1))
        return torch.cat(effects)

    def _source_activations(self) -> dict[Site, Float[Tensor, " column *shape"]]:
        """The source run's activations at every place, at the columns' tokens."""
        at = [position for _, position in self.columns]
        activations: dict[Site, Tensor] = {}

        def reader(site: Site) -> Editor:
            def read(activation: Tensor) -> None:
                activations[site] = activation[0, at].cpu()

            return read

        tokens = self.source.tokens[None]
        forward(
            self.model,
            tokens,
            [(site, reader(site)) for site in self.places],
            fwd_hooks=self.options["fwd_hooks"],
            attention_mask=torch.ones_like(tokens),
        )
        return activations


def _check_options(
    sites: Sequence[str], metric: Metric, direction: str, scan: str, n_checked: int
) -> None:
    allowed = [name for name in SITES if name != "resid_mid"]
    if isinstance(sites, str) or not sites or set(sites) - set(allowed):
        raise InputError(f"sites={sites!r}; use some of {', '.join(allowed)}")
    if isinstance(metric, str) and metric not in METRICS:
        raise InputError(f"metric={metric!r}; use {', '.join(METRICS)} or a function")
    if direction not in get_args(Direction):
        raise InputError(f"direction={direction!r}; use 'denoising' or 'noising'")
    if scan not in get_args(Scan):
        raise InputError(f"scan={scan!r}; use 'exact' or 'attribution'")
    if n_checked < 0:
        raise InputError(f"n_checked must be 0 or more, got {n_checked}")


def _pairs(maps: Sequence[SinkMap], positions: Sequence[Pair] | None) -> list[Pair]:
    lengths = [sink_map.n_tokens for sink_map in maps]
    if positions is None:
        if lengths[0] != lengths[1]:
            raise InputError(
                f"the clean text has {lengths[0]} tokens, the corrupted one {lengths[1]}, so it is "
                "not known which tokens correspond: pass positions=[(clean, corrupted), ...], or "
                "texts of equal length"
            )
        return [(position, position) for position in range(lengths[0])]
    pairs = [(int(one), int(other)) for one, other in positions]
    if not pairs:
        raise InputError("positions is empty: no token corresponds to any other")
    for name, length, listed in zip(
        ("clean", "corrupted"), lengths, zip(*pairs, strict=True), strict=True
    ):
        outside = [position for position in listed if not 0 <= position < length]
        if outside:
            raise InputError(f"{name} position {outside[0]} is outside 0 .. {length - 1}")
        if len(set(listed)) < len(listed):
            raise InputError(f"positions pairs a {name} position twice")
    return pairs


def _only(pairs: list[Pair], token_positions: Iterable[int]) -> list[Pair]:
    by_clean = dict(pairs)
    wanted = list(token_positions)
    missing = [position for position in wanted if position not in by_clean]
    if missing or not wanted:
        raise InputError(f"token_positions {missing or wanted} are not paired clean positions")
    return [(position, by_clean[position]) for position in wanted]


def _token(
    maps: Sequence[SinkMap], by_clean: dict[int, int], sink: Sink | int | None, metric: Metric
) -> Pair:
    """The token that the metric is about, in both texts."""
    if sink is None:
        paired = [one for one in maps[0].secondary if one.position in by_clean]
        strongest = max(paired, key=lambda one: one.norm, default=None)
        position = strongest.position if strongest else maps[0].primary_position
    else:
        position = maps[0].select(sink)[0].position if isinstance(sink, Sink) else int(sink)
    if position not in by_clean:
        raise InputError(f"position {position}, which the metric is about, is not paired")
    token = (position, by_clean[position])
    for place, sink_map in zip(token, maps, strict=True):
        if metric == "sink_score" and place == sink_map.n_tokens - 1:
            raise InputError(f"no later token can look at position {place}, the last of its text")
    return token


def _metric_layers(
    sink_map: SinkMap, sink: Sink | int, metric: Metric, given: Iterable[int] | None
) -> tuple[int, ...]:
    depth = int(sink_map.n_layers or 0)
    if given is not None:
        layers = tuple(given)
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if wrong or not layers:
            raise InputError(f"metric_layers {wrong or layers} are not in 0 .. {depth - 1}")
        return layers
    if not sink_map.phases:
        return tuple(range(depth))
    alive = {layer for life in sink_map.select([sink]) for layer in life.layers}
    # The residual after block l is what block l + 1 attends to.
    shift = int(metric == "sink_score")
    return tuple(sorted(x + shift for x in alive if x + shift < depth)) or tuple(range(depth))


def _function(
    metric: Metric, position: int, layers: tuple[int, ...]
) -> Callable[[TextState], Tensor]:
    if not isinstance(metric, str):
        return metric
    name, at = metric, list(layers)

    def measure(state: TextState) -> Tensor:
        values: Tensor = getattr(state, name)[at]
        return values[..., position].mean()

    return measure


def _number(metric: Callable[[TextState], Tensor], state: TextState) -> float:
    value = torch.as_tensor(metric(state))
    if value.numel() != 1:
        raise InputError(f"the metric must return one number, got shape {list(value.shape)}")
    return float(value)


def _common_prefix(one: Tensor, other: Tensor) -> int:
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
