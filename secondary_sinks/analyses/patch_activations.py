"""Which activation of one text makes another text's token a sink, or unmakes it?

Activation patching runs one text with a single activation taken from another. It is known from
questions about logits; here the metric is that of a sink: the attention that a token draws.

>>> patched = ss.patch_activations(model, clean, corrupted, layers=range(4, 8))
>>> patched.normalized                 # [site, layer, token]: 0 as before, 1 as in the other run

*Denoising* puts clean activations into the corrupted run and finds what suffices to restore the
sink; *noising* puts corrupted ones into the clean run and finds what it needs. The two need not
agree: where either of two paths suffices, noising one of them shows nothing.
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
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import Replace
from secondary_sinks.intervene.gradients import metric_gradients
from secondary_sinks.intervene.interventions import SITES, Intervention, check_rows
from secondary_sinks.intervene.whole_text import MEMORY_BUDGET, TextState, run_whole_texts
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import sink_map_of
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

Metric: TypeAlias = "str | Callable[[TextState], Tensor]"

METRICS = ("sink_score", "norm", "alignment")

"""Metrics by name, each of the token of interest, averaged over its layers (and heads)."""

Cell: TypeAlias = tuple[int, int, int]

Pair: TypeAlias = tuple[int, int]

Direction = Literal["denoising", "noising"]

Scan = Literal["exact", "attribution"]


def patch_activations(
    model: Any,
    clean: Text | SinkMap,
    corrupted: Text | SinkMap,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    *,
    metric: Metric = "sink_score",
    position: int | None = None,
    positions: Sequence[Pair] | None = None,
    direction: Direction = "denoising",
    layers: Iterable[int] | None = None,
    token_positions: Iterable[int] | None = None,
    metric_layers: Iterable[int] | None = None,
    scan: Scan = "exact",
    n_checked: int = 16,
    logits: bool = False,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> PatchResult:
    """Patch every site, layer and token by itself, and measure a sink.

    A large effect says that the activation carries what the two texts differ in, for this pair of
    texts; it does not say that the component computes it (the residual stream carries everything).

    Args:
        model: any TransformerLens model.
        clean: the text with the sink (see `detect_sinks`), or its sink map.
        corrupted: the text to compare with, or its sink map.
        sites: any of `intervene.interventions.SITES` but `resid_mid`.
        metric: "sink_score" (mean over heads and over the layers that see the token's residual
            while it is a sink), "norm" or "alignment" of its residual in those layers (cosine with
            the clean text's primary), or a function of a `TextState` that returns one number; it
            must be differentiable for `scan="attribution"`.
        position: token that the metric is about, in the clean text; by default its strongest
            secondary sink, or its primary.
        positions: pairs (clean position, corrupted position) of tokens that correspond. Needed for
            texts of unequal length; by default each token corresponds to the one in its place.
        direction: "denoising" or "noising".
        layers: layers to patch; by default all.
        token_positions: tokens to patch, by position in the clean text; by default all paired.
        metric_layers: layers over which a named metric is averaged; by default those of the sink's
            life (one later for "sink_score"), of the primary phases for a token that is no sink.
        scan: "exact" runs the text once a cell; "attribution" estimates all cells by gradient times
            difference from one forward and one backward pass.
        n_checked: cells, those with the largest estimates, that are run exactly after an
            attribution scan; `PatchResult.error` is measured on them.
        logits: let a metric of your own see the logits.
        chat: the strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every run.
        memory_budget: bytes that attention and logits of one pass may take.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        InputError: unequal lengths without `positions`, a wrong pairing, a token of interest that
            is not paired or that no later token can see, indices out of range, an unknown option,
            a sink map of another model.
        ModelError: a model that cannot be measured, or a metric without gradient.
    """
    _check_options(sites, metric, direction, scan, n_checked)
    maps = [
        sink_map_of(model, text, None, chat=chat, fwd_hooks=fwd_hooks)
        for text in (clean, corrupted)
    ]
    pairs = _pairs(maps, positions)
    kept = pairs if token_positions is None else _only(pairs, token_positions)
    at = _position(maps, pairs, position, metric)
    averaged = _metric_layers(maps[0], at[0], metric, metric_layers)
    depth = tuple(range(describe(model).n_layers) if layers is None else layers)
    if not depth:
        raise InputError("layers is empty: nothing to patch")
    runs = [CleanRun.of(model, one, fwd_hooks=fwd_hooks) for one in maps]
    # Both runs are measured against the same direction, so that an alignment means one thing.
    runs[1] = dataclasses.replace(runs[1], primary=runs[0].primary, common=runs[0].common)
    base, source = (1, 0) if direction == "denoising" else (0, 1)
    scanner = _Scanner(
        model=model,
        base=runs[base],
        source=runs[source],
        sites=tuple(sites),
        layers=depth,
        columns=[(pair[base], pair[source]) for pair in kept],
        metric=_function(metric, at[base], averaged),
        logits=logits,
        fwd_hooks=fwd_hooks,
        memory_budget=memory_budget,
        progress=progress,
    )
    before, after = scanner.baselines(_function(metric, at[source], averaged))
    value, checked, exact = _scanned(scanner, scan, n_checked, before)
    strings = maps[base].token_strings
    return PatchResult(
        model=maps[0].model,
        sites=tuple(sites),
        layers=depth,
        pairs=tuple(kept),
        tokens=tuple(strings[pair[base]] for pair in kept),
        direction=direction,
        scan=scan,
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric)),
        position=at,
        metric_layers=averaged,
        base=before,
        source=after,
        value=value,
        checked=checked,
        checked_value=exact,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scanner:
    """Everything that the cells of one scan share."""

    model: Any
    base: CleanRun
    source: CleanRun
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    columns: list[Pair]
    """(base position, source position) of each column."""
    metric: Callable[[TextState], Tensor]
    logits: bool
    fwd_hooks: Sequence[UserHook]
    memory_budget: int
    progress: bool | None

    def baselines(self, source_metric: Callable[[TextState], Tensor]) -> tuple[float, float]:
        """The metric of the unpatched base run, and of the source run."""
        found = []
        for run, metric in ((self.base, self.metric), (self.source, source_metric)):
            state, _ = run_whole_texts(
                self.model, run, [], output=False, logits=self.logits, fwd_hooks=self.fwd_hooks
            )
            found.append(_number(metric, state))
        return found[0], found[1]

    def cells(self) -> list[Cell]:
        """All cells, as indices (site, layer, column)."""
        shape = (len(self.sites), len(self.layers), len(self.columns))
        return [tuple(cell) for cell in torch.ones(shape).nonzero().tolist()]

    def exact(self, cells: Sequence[Cell], before: float) -> Float[Tensor, "cell"]:
        """Run each cell; those that cannot change anything are known without."""
        # An activation at or before the first token in which the texts differ is the same in both.
        same = 0 if self.fwd_hooks else _common_prefix(self.base.tokens, self.source.tokens)
        moved = [i for i, (_, _, c) in enumerate(cells) if not _is_same(self.columns[c], same)]
        activations = self._source_activations()
        texts = []
        for index in moved:
            site, layer, column = cells[index]
            name, at = self.sites[site], self.layers[layer]
            edit = Replace(activations[Site(name, at)][column])
            texts.append([Intervention(name, at, self.columns[column][0], edit)])  # type: ignore[arg-type]
        value = torch.full((len(cells),), before)
        if texts:
            _, numbers = run_whole_texts(
                self.model,
                self.base,
                texts,
                output=False,
                logits=self.logits,
                reduce=lambda state: _number(self.metric, state),
                fwd_hooks=self.fwd_hooks,
                memory_budget=self.memory_budget,
                progress=self.progress,
            )
            value[moved] = torch.tensor(numbers)
        return value

    def estimated(self, before: float) -> Float[Tensor, "site layer column"]:
        """First-order estimate of every cell."""
        activations = self._source_activations()
        found = metric_gradients(
            self.model,
            self.base,
            self.metric,
            list(activations),
            logits=self.logits,
            fwd_hooks=self.fwd_hooks,
        )
        at = [position for position, _ in self.columns]
        effects = []
        for site, there in activations.items():
            here, slope = found[site]
            difference = there.float() - here[at].float().cpu()
            effects.append((difference * slope[at].float().cpu()).flatten(1).sum(dim=1))
        shape = (len(self.sites), len(self.layers), len(self.columns))
        return before + torch.stack(effects).reshape(shape)

    def _source_activations(self) -> dict[Site, Float[Tensor, "column *shape"]]:
        """What the source run has at every site, at the columns' tokens; by site, then layer."""
        at = [position for _, position in self.columns]
        wanted = [Site(name, layer) for name in self.sites for layer in self.layers]
        found: dict[Site, Tensor] = {}

        def keep(site: Site) -> Editor:
            def read(activation: Tensor) -> None:
                found[site] = activation[0, at].cpu()

            return read

        tokens = self.source.tokens[None]
        editors = [(site, keep(site)) for site in wanted]
        mask = torch.ones_like(tokens)
        forward(self.model, tokens, editors, fwd_hooks=self.fwd_hooks, attention_mask=mask)
        return {site: found[site] for site in wanted}


def _scanned(
    scanner: _Scanner, scan: Scan, n_checked: int, before: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of all cells, and which of them were checked, with their exact values."""
    cells = scanner.cells()
    for name in scanner.sites:
        for layer in scanner.layers:
            one = Intervention(name, layer, 0, Replace(torch.zeros(0)))  # type: ignore[arg-type]
            check_rows(scanner.model, [(one,)], len(scanner.base.tokens))
    if scan == "exact":
        shape = (len(scanner.sites), len(scanner.layers), len(scanner.columns))
        value = scanner.exact(cells, before).reshape(shape)
        return value, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0)
    value = scanner.estimated(before)
    largest = (value - before).abs().flatten().topk(min(n_checked, value.numel())).indices
    chosen = [cells[index] for index in largest.tolist()]
    exact = scanner.exact(chosen, before) if chosen else torch.zeros(0)
    return value, torch.tensor(chosen, dtype=torch.long).reshape(-1, 3), exact


def _check_options(
    sites: Sequence[str], metric: Metric, direction: str, scan: str, n_checked: int
) -> None:
    allowed = [name for name in SITES if name != "resid_mid"]
    strange = [name for name in sites if name not in allowed]
    if isinstance(sites, str) or not sites or strange:
        raise InputError(f"sites={sites!r}; give some of {', '.join(allowed)}")
    if isinstance(metric, str) and metric not in METRICS:
        raise InputError(f"no metric {metric!r}; use {', '.join(METRICS)} or a function")
    if direction not in get_args(Direction):
        raise InputError(f"direction={direction!r}; use 'denoising' or 'noising'")
    if scan not in get_args(Scan):
        raise InputError(f"scan={scan!r}; use 'exact' or 'attribution'")
    if n_checked < 0:
        raise InputError(f"n_checked is {n_checked}; 0 or more are meant")


def _pairs(maps: Sequence[SinkMap], positions: Sequence[Pair] | None) -> list[Pair]:
    lengths = [one.n_tokens for one in maps]
    if positions is None:
        if lengths[0] != lengths[1]:
            raise InputError(
                f"the clean text has {lengths[0]} tokens, the corrupted one {lengths[1]}: which "
                "token corresponds to which is not known, and patching the wrong ones would look "
                "like a result; pass positions=[(clean, corrupted), ...], or texts of equal length"
            )
        return [(place, place) for place in range(lengths[0])]
    pairs = [(int(one), int(other)) for one, other in positions]
    if not pairs:
        raise InputError("positions is empty: no token corresponds to any other")
    for side, name in enumerate(("clean", "corrupted")):
        listed = [pair[side] for pair in pairs]
        outside = [place for place in listed if not 0 <= place < lengths[side]]
        if outside:
            raise InputError(f"{name} position {outside[0]} is outside 0 .. {lengths[side] - 1}")
        if len(set(listed)) < len(listed):
            raise InputError(f"positions pairs a {name} position twice")
    return pairs


def _only(pairs: list[Pair], token_positions: Iterable[int]) -> list[Pair]:
    by_clean = dict(pairs)
    wanted = list(token_positions)
    missing = [place for place in wanted if place not in by_clean]
    if missing or not wanted:
        raise InputError(f"token_positions {missing or wanted} are not paired clean positions")
    return [(place, by_clean[place]) for place in wanted]


def _position(
    maps: Sequence[SinkMap], pairs: list[Pair], position: int | None, metric: Metric
) -> Pair:
    by_clean = dict(pairs)
    if position is None:
        paired = [sink for sink in maps[0].secondary if sink.position in by_clean]
        strongest = max(paired, key=lambda sink: sink.norm, default=None)
        position = strongest.position if strongest else maps[0].primary_position
    if position not in by_clean:
        raise InputError(f"position {position}, which the metric is about, is not paired")
    at = (position, by_clean[position])
    for place, one in zip(at, maps, strict=True):
        if metric == "sink_score" and place == one.n_tokens - 1:
            raise InputError(f"no later token can look at position {place}, the last of its text")
    return at


def _metric_layers(
    sinks: SinkMap, position: int, metric: Metric, given: Iterable[int] | None
) -> tuple[int, ...]:
    depth = sinks.n_layers or 0
    if given is not None:
        layers = tuple(given)
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if wrong or not layers:
            raise InputError(f"metric_layers {wrong or layers} are not in 0 .. {depth - 1}")
        return layers
    alive = {x for sink in sinks.sinks if sink.position == position for x in sink.layers}
    alive = alive or {x for start, end in sinks.phases for x in range(start, end)}
    # The residual after block l is what block l + 1 attends to.
    shift = int(metric == "sink_score")
    shown = tuple(sorted(layer + shift for layer in alive if layer + shift < depth))
    return shown or tuple(range(depth))


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
        raise InputError(f"the metric returned {list(value.shape)}; one number is meant")
    return float(value)


def _common_prefix(one: Tensor, other: Tensor) -> int:
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


def _is_same(column: Pair, prefix: int) -> bool:
    return column[0] == column[1] < prefix


@dataclass(frozen=True)
class PatchResult(Result):
    """A metric of one run (the *base*) with single activations taken from another (the *source*).

    Denoising patches clean activations into the corrupted run, noising the other way round.
    """

    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""
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
    value: Float[Tensor, "site layer pair"]
    """The metric of the patched run; with `scan="attribution"` a first-order estimate of it."""
    checked: Int[Tensor, "check 3"]
    """Indices (site, layer, pair) of the estimated cells that were run exactly as well."""
    checked_value: Float[Tensor, "check"]
    """The exact metric of those cells."""

    @property
    def effect(self) -> Float[Tensor, "site layer pair"]:
        """Change of the metric against the base run, in the metric's own unit."""
        return self.value - self.base

    @property
    def normalized(self) -> Float[Tensor, "site layer pair"]:
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
            f", error {self.error:.2g} in {len(self.checked)} cells" if self.checked.numel() else ""
        )
        return (
            f"PatchResult({self.direction}, {self.scan}{checked}: {self.metric} {self.base:.4g} -> "
            f"{self.source:.4g}, {' '.join(self.sites)} x {len(self.layers)} layers x "
            f"{len(self.pairs)} tokens, {self._best()})"
        )

    def _best(self) -> str:
        index = int(self.effect.abs().argmax())
        n_layers, n_pairs = self.value.shape[1:]
        site, layer, pair = (
            index // (n_layers * n_pairs),
            index // n_pairs % n_layers,
            index % n_pairs,
        )
        clean, corrupted = self.pairs[pair]
        at = corrupted if self.direction == "denoising" else clean
        return f"largest at {self.sites[site]} {self.layers[layer]} token {at}"

    def _notebook_frame(self) -> pd.DataFrame:
        frame = self.to_frame()
        order = frame["effect"].abs().sort_values(ascending=False).index
        return frame.loc[order].head(10)

    def to_frame(self) -> pd.DataFrame:
        """One row for each cell; `exact` holds the exact metric where it is known."""
        import pandas as pd

        site, layer, pair = torch.meshgrid(
            *(torch.arange(size) for size in self.value.shape), indexing="ij"
        )
        exact = (
            self.value.clone() if self.scan == "exact" else torch.full_like(self.value, torch.nan)
        )
        exact[tuple(self.checked.T)] = self.checked_value
        columns = pair.flatten().tolist()
        return pd.DataFrame(
            {
                "site": [self.sites[i] for i in site.flatten().tolist()],
                "layer": [self.layers[i] for i in layer.flatten().tolist()],
                "clean_position": [self.pairs[i][0] for i in columns],
                "corrupted_position": [self.pairs[i][1] for i in columns],
                "token": [self.tokens[i] for i in columns],
                "value": self.value.flatten().numpy(),
                "effect": self.effect.flatten().numpy(),
                "normalized": self.normalized.flatten().numpy(),
                "exact": exact.flatten().numpy(),
            }
        )
