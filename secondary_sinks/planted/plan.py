"""What can be planted in a planted model, and what is refused.

A plan is refused where its truth would not be honest: a sink that no later block can attend to,
one that outlives its primary phase, one too small beside the ordinary tokens or beside the common
component. See `planted` for the models and `planted_weights` for how their weights do it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from secondary_sinks.errors import InputError

Architecture = Literal["llama", "qwen2"]

SPECIAL_WORDS = ("<bos>", "<bos2>", "<unk>", "<eos>")
"""The first tokens of every planted vocabulary; token `i` from 4 on is the word `t<i>`."""
SINK_LOGIT = 5.5
"""Attention logit of a massive sink in a sink head, where an ordinary token has 0."""
LEAST_LOGIT = 2.3
"""A planted sink's logit stays above this, so that it draws ten times what an ordinary token does,
even where a common component takes its share of the norm."""


@dataclass(frozen=True, kw_only=True)
class PlantedSink:
    """A secondary sink to plant: wherever `token` occurs, it becomes a sink."""

    token: int
    """Token id (4 or more) whose feature triggers the writer."""
    writer: int
    """Layer whose MLP writes the sink. The residual after this block is the first that is one."""
    norm: float
    """Norm of the written vector."""
    lifetime: int
    """Number of layers. The MLP of layer `writer + lifetime` erases the vector, if there is one
    (or the last of it; see `fades`)."""
    feeders: tuple[int, ...] = ()
    """Earlier layers whose MLPs must each write a part of the feature that the writer reads."""
    fades: bool = False
    """Not erased at once, whatever its length: every MLP after the writer takes off `norm /
    lifetime`, as long as there is any. So a longer vector lives longer."""

    @property
    def end(self) -> int:
        """First layer whose residual is no sink any more."""
        return self.writer + self.lifetime


@dataclass(frozen=True, kw_only=True)
class PlantedPhase:
    """A primary phase: the primary tokens are massive after blocks `start` to `end - 1`."""

    start: int
    """Layer whose MLP writes the primary."""
    end: int
    """Layer whose MLP erases it; the number of layers for a phase that never ends."""
    norm: float
    """Norm of the written vector."""


@dataclass(frozen=True, kw_only=True)
class PlantedPlan:
    """The arguments of `planted_model`, complete and checked."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    vocab: int
    phases: tuple[PlantedPhase, ...]
    secondary: tuple[PlantedSink, ...]
    primary_positions: int
    common: float
    common_alignment: float
    aligned_decoys: tuple[int, ...]
    large_decoys: tuple[int, ...]
    aligned_decoy_norm: float
    large_decoy_norm: float
    noise: float
    seed: int
    architecture: Architecture

    @property
    def primary_tokens(self) -> tuple[int, ...]:
        """Token ids of the primary tokens, which every text begins with."""
        return tuple(range(self.primary_positions))

    @property
    def planted_tokens(self) -> tuple[int, ...]:
        """Token ids of secondary sinks and decoys."""
        return (*(s.token for s in self.secondary), *self.aligned_decoys, *self.large_decoys)

    @property
    def n_sink_heads(self) -> int:
        """In every layer, heads `0 .. n_sink_heads - 1` attend to sinks."""
        return (self.n_heads + 1) // 2

    @property
    def ordinary_norm(self) -> float:
        """Norm of an ordinary token's residual without the common component, at the last layer."""
        return math.sqrt(2 + self.noise**2)


def check(plan: PlantedPlan) -> None:
    """Raise `InputError` where `plan` contradicts itself or plants what is not honestly a sink."""
    _check_shape(plan)
    _check_tokens(plan)
    _check_phases(plan)
    for sink in plan.secondary:
        _check_sink(plan, sink)


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise InputError(message)


def _check_shape(plan: PlantedPlan) -> None:
    _refuse(plan.architecture not in ("llama", "qwen2"), f"architecture={plan.architecture!r}")
    _refuse(plan.n_layers < 3, f"n_layers={plan.n_layers}; at least 3")
    _refuse(plan.n_heads < 1 or plan.d_model % plan.n_heads != 0, "n_heads must divide d_model")
    width = plan.d_model // plan.n_heads
    _refuse(width < 4 or width % 2 == 1, f"d_model / n_heads = {width}; an even number from 4 on")
    _refuse(
        plan.n_kv_heads < 1 or plan.n_heads % plan.n_kv_heads != 0, "n_kv_heads must divide n_heads"
    )
    _refuse(not 0 <= plan.noise <= 2, f"noise={plan.noise}; between 0 and 2")
    _refuse(not 0 <= plan.common <= 100, f"common={plan.common}; between 0 and 100")
    _refuse(
        not 0 <= plan.common_alignment <= 0.95,
        f"common_alignment={plan.common_alignment}; between 0 and 0.95",
    )
    _refuse(plan.primary_positions not in (1, 2), f"primary_positions={plan.primary_positions}")


def _check_tokens(plan: PlantedPlan) -> None:
    first, planted = len(SPECIAL_WORDS), plan.planted_tokens
    outside = [t for t in planted if not first <= t < plan.vocab]
    _refuse(bool(outside), f"tokens {outside} are outside {first} .. vocab - 1 = {plan.vocab - 1}")
    twice = sorted({t for t in planted if planted.count(t) > 1})
    _refuse(bool(twice), f"tokens {twice} are planted more than once")
    left = plan.vocab - first - len(planted)
    _refuse(left < 8, f"vocab={plan.vocab} leaves {left} ordinary tokens; at least 8")


def _check_phases(plan: PlantedPlan) -> None:
    _refuse(not plan.phases, "a model needs at least one primary phase")
    before = -1
    for phase in plan.phases:
        _refuse(
            not before < phase.start < phase.end <= plan.n_layers,
            f"{phase} must lie after the previous phase's last layer {before}, within "
            f"0 .. n_layers = {plan.n_layers}",
        )
        _refuse(
            phase.start > plan.n_layers - 2, f"{phase} starts in the last layer: unseen by any head"
        )
        _check_norm(plan, phase.norm, repr(phase))
        before = phase.end
    for name in ("aligned", "large"):
        if getattr(plan, f"{name}_decoys"):
            norm = getattr(plan, f"{name}_decoy_norm")
            _check_norm(plan, norm, f"{name}_decoy_norm={norm}")


def _check_sink(plan: PlantedPlan, sink: PlantedSink) -> None:
    _refuse(sink.lifetime < 1, f"{sink} has no lifetime")
    home = [p for p in plan.phases if p.start < sink.writer < p.end]
    _refuse(not home, f"{sink}: the writer must lie inside a primary phase, after its start")
    _refuse(
        sink.end > home[0].end,
        f"{sink} outlives its primary phase, which ends at its layer {home[0].end}",
    )
    _refuse(sink.writer > plan.n_layers - 2, f"{sink} is written last: unseen by any head")
    wrong = [f for f in sink.feeders if not 0 <= f < sink.writer]
    _refuse(bool(wrong), f"{sink}: feeders {wrong} are not layers before the writer")
    _refuse(len(set(sink.feeders)) < len(sink.feeders), f"{sink} names a feeder twice")
    _check_norm(plan, sink.norm, repr(sink))
    if sink.fades:
        _check_norm(plan, sink.norm / sink.lifetime, f"{sink} in its last layer")
        _refuse(plan.common > 0, f"{sink} would not fade evenly beside a common component")


def _check_norm(plan: PlantedPlan, norm: float, name: str) -> None:
    least = 8 * plan.ordinary_norm
    _refuse(
        not least <= norm <= 4000,
        f"{name}: the norm must lie between 8 times an ordinary token's ({least:.1f}) and 4000",
    )
    alignment = plan.common_alignment if plan.common else 0.0
    total = math.sqrt(norm**2 + 2 * alignment * norm * plan.common + plan.common**2)
    logit = SINK_LOGIT * norm / total
    _refuse(
        logit < LEAST_LOGIT,
        f"{name}: beside a common component of norm {plan.common} it would draw hardly more "
        f"attention than an ordinary token; a norm of {plan.common} is enough",
    )
