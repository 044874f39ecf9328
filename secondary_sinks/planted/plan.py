"""What a planted model contains, and which plans are refused.

A plan is refused if something in it would not be a sink, or not the only one: a sink that no later
block can attend to, one that outlives its primary phase, one that is too small compared with
ordinary tokens or with the common component. See `planted_model` for the models, and `circuits`
and `weights` for how their weights are made.
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
"""Minimum logit of a planted sink, so that it draws ten times the attention of an ordinary token,
even where a common component takes a share of the norm."""


@dataclass(frozen=True, kw_only=True)
class PlantedSink:
    """A secondary sink to plant: `token` becomes a sink wherever it occurs."""

    token: int
    """Token id (4 or more) whose feature triggers the writer."""
    writer: int
    """Layer whose MLP writes the sink, and the onset: the first layer whose residual is a sink."""
    norm: float
    """Norm of the written vector."""
    lifetime: int
    """Number of layers. The MLP of layer `writer + lifetime`, if there is one, erases the vector
    (or the rest of it; see `fades`)."""
    feeders: tuple[int, ...] = ()
    """Earlier layers whose MLPs must each write a part of the feature that the writer reads."""
    fades: bool = False
    """Instead of one erasure of the whole vector, every MLP after the writer removes `norm /
    lifetime` while any of the vector is left. So a longer vector lives longer."""

    @property
    def end(self) -> int:
        """First layer after the onset whose residual is not a sink."""
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
        """Token ids of the primary tokens, with which every text begins."""
        return tuple(range(self.primary_positions))

    @property
    def planted_tokens(self) -> tuple[int, ...]:
        """Token ids of secondary sinks and decoys."""
        return (*(s.token for s in self.secondary), *self.aligned_decoys, *self.large_decoys)

    @property
    def least_tokens(self) -> int:
        """Minimum length of a text that holds every planted token."""
        return self.primary_positions + 3 * len(self.planted_tokens) + 8

    @property
    def n_sink_heads(self) -> int:
        """In every layer, heads `0 .. n_sink_heads - 1` attend to sinks."""
        return (self.n_heads + 1) // 2

    @property
    def ordinary_norm(self) -> float:
        """Norm of an ordinary token's residual at the last layer, without the common component."""
        return math.sqrt(2 + self.noise**2)


def check(plan: PlantedPlan) -> None:
    """Raise `InputError` if `plan` contradicts itself or plants something that is not a sink."""
    _check_shape(plan)
    _check_tokens(plan)
    _check_phases(plan)
    for sink in plan.secondary:
        _check_sink(plan, sink)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_shape(plan: PlantedPlan) -> None:
    _require(
        plan.architecture in ("llama", "qwen2"),
        f"architecture must be 'llama' or 'qwen2', got {plan.architecture!r}",
    )
    _require(plan.n_layers >= 3, f"n_layers must be at least 3, got {plan.n_layers}")
    _require(plan.n_heads >= 1 and plan.d_model % plan.n_heads == 0, "n_heads must divide d_model")
    d_head = plan.d_model // plan.n_heads
    _require(
        d_head >= 4 and d_head % 2 == 0,
        f"d_model / n_heads must be an even number of at least 4, got {d_head}",
    )
    _require(
        plan.n_kv_heads >= 1 and plan.n_heads % plan.n_kv_heads == 0,
        "n_kv_heads must divide n_heads",
    )
    for name, most in {"noise": 2, "common": 100, "common_alignment": 0.95}.items():
        value = getattr(plan, name)
        _require(0 <= value <= most, f"{name} must be between 0 and {most}, got {value}")
    _require(
        plan.primary_positions in (1, 2),
        f"primary_positions must be 1 or 2, got {plan.primary_positions}",
    )


def _check_tokens(plan: PlantedPlan) -> None:
    first, planted = len(SPECIAL_WORDS), plan.planted_tokens
    outside = [token for token in planted if not first <= token < plan.vocab]
    _require(not outside, f"tokens {outside} are outside {first} .. vocab - 1 = {plan.vocab - 1}")
    repeated = sorted({token for token in planted if planted.count(token) > 1})
    _require(not repeated, f"tokens {repeated} are planted more than once")
    n_ordinary = plan.vocab - first - len(planted)
    _require(
        n_ordinary >= 8,
        f"vocab={plan.vocab} leaves {n_ordinary} ordinary tokens; at least 8 are needed",
    )


def _check_phases(plan: PlantedPlan) -> None:
    _require(bool(plan.phases), "a model needs at least one primary phase")
    previous_end = -1
    for phase in plan.phases:
        _require(
            previous_end < phase.start < phase.end <= plan.n_layers,
            f"{phase} must lie after the previous phase, which ends at layer {previous_end}, and "
            f"within 0 .. n_layers = {plan.n_layers}",
        )
        _require(
            phase.start <= plan.n_layers - 2,
            f"{phase} starts in the last layer, after which no head can attend to it",
        )
        _check_norm(plan, phase.norm, repr(phase))
        previous_end = phase.end
    for name in ("aligned", "large"):
        if getattr(plan, f"{name}_decoys"):
            norm = getattr(plan, f"{name}_decoy_norm")
            _check_norm(plan, norm, f"{name}_decoy_norm={norm}")


def _check_sink(plan: PlantedPlan, sink: PlantedSink) -> None:
    _require(sink.lifetime >= 1, f"{sink} has no lifetime; it must be at least 1")
    phases = [phase for phase in plan.phases if phase.start < sink.writer < phase.end]
    _require(bool(phases), f"{sink}: the writer must lie inside a primary phase, after its start")
    _require(
        sink.end <= phases[0].end,
        f"{sink} outlives its primary phase, which ends at layer {phases[0].end}",
    )
    _require(
        sink.writer <= plan.n_layers - 2,
        f"{sink} is written in the last layer, after which no head can attend to it",
    )
    late = [feeder for feeder in sink.feeders if not 0 <= feeder < sink.writer]
    _require(not late, f"{sink}: feeders {late} are not layers before the writer")
    _require(len(set(sink.feeders)) == len(sink.feeders), f"{sink} names a feeder twice")
    _check_norm(plan, sink.norm, repr(sink))
    if sink.fades:
        _check_norm(plan, sink.norm / sink.lifetime, f"{sink} in its last layer")
        _require(plan.common == 0, f"{sink} would not fade evenly with a common component")


def _check_norm(plan: PlantedPlan, norm: float, name: str) -> None:
    """Raise unless a vector of this norm is massive and draws attention."""
    least = 8 * plan.ordinary_norm
    _require(
        least <= norm <= 4000,
        f"{name}: the norm must lie between 8 times an ordinary token's ({least:.1f}) and 4000",
    )
    alignment = plan.common_alignment if plan.common else 0.0
    total = math.sqrt(norm**2 + 2 * alignment * norm * plan.common + plan.common**2)
    _require(
        SINK_LOGIT * norm / total >= LEAST_LOGIT,
        f"{name}: with a common component of norm {plan.common} it would draw hardly more "
        f"attention than an ordinary token; a norm of {plan.common} is enough",
    )
