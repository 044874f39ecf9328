"""Texts for a planted model, and what an analysis of each text must find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.planted.plan import SPECIAL_WORDS, PlantedPlan


class PlantedOccurrence(NamedTuple):
    """One secondary sink in one text."""

    position: int
    token: int
    onset: int
    lifetime: int
    writer: int
    feeders: tuple[int, ...]
    norm: float


@dataclass(frozen=True, kw_only=True)
class PlantedTruth:
    """What an analysis of one text must find."""

    primary: tuple[int, ...]
    """Positions of the primary tokens."""
    phases: tuple[tuple[int, int], ...]
    """The primary phases, each `[start, end)`."""
    sinks: tuple[PlantedOccurrence, ...]
    """Secondary sinks, by position."""
    decoys_aligned: tuple[int, ...]
    """Positions aligned with the sink direction that draw no attention."""
    decoys_large: tuple[int, ...]
    """Positions that are massive in another direction and draw no attention."""


def random_tokens(plan: PlantedPlan, n: int, seed: int) -> Int[Tensor, " 1 token"]:
    """A random text of `n` tokens with every planted token; see `PlantedModel.tokens`."""
    if n < plan.least_tokens:
        raise InputError(
            f"n={n} tokens are too few for a text with every planted token; at least "
            f"{plan.least_tokens} are needed"
        )
    generator = torch.Generator().manual_seed(seed)
    reserved = {*range(len(SPECIAL_WORDS)), *plan.planted_tokens}
    ordinary = torch.tensor([token for token in range(plan.vocab) if token not in reserved])
    ids = ordinary[torch.randint(len(ordinary), (n,), generator=generator)]
    ids[: plan.primary_positions] = torch.tensor(plan.primary_tokens)
    last = n - max(2, n // 8)
    shuffled = torch.randperm(last - plan.primary_positions, generator=generator)
    positions = iter((shuffled + plan.primary_positions).tolist())
    for token in plan.planted_tokens:
        ids[next(positions)] = token
    for token in plan.planted_tokens:
        if torch.rand(1, generator=generator) < 0.4 and (position := next(positions, None)):
            ids[position] = token
    return ids[None]


def truth_of_text(
    plan: PlantedPlan, tokens: Int[Tensor, " token"] | Int[Tensor, " 1 token"]
) -> PlantedTruth:
    """What an analysis of `tokens` must find; see `PlantedModel.truth`."""
    ids = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
    if ids.ndim != 1:
        raise InputError(f"tokens must have shape [token] or [1, token], got {tuple(tokens.shape)}")
    text: list[int] = ids.tolist()
    primary = list(plan.primary_tokens)
    if text[: len(primary)] != primary:
        raise InputError(f"tokens must begin with {primary}, got {text[: len(primary)]}")
    repeated = [
        position
        for position, token in enumerate(text)
        if token in primary and position >= len(primary)
    ]
    if repeated:
        raise InputError(f"primary tokens must not occur again, as at positions {repeated}")
    sinks = {sink.token: sink for sink in plan.secondary}
    return PlantedTruth(
        primary=tuple(range(len(primary))),
        phases=tuple((phase.start, phase.end) for phase in plan.phases),
        sinks=tuple(
            PlantedOccurrence(
                position=position,
                token=token,
                onset=sinks[token].writer,
                lifetime=sinks[token].lifetime,
                writer=sinks[token].writer,
                feeders=sinks[token].feeders,
                norm=sinks[token].norm,
            )
            for position, token in enumerate(text)
            if token in sinks
        ),
        decoys_aligned=_positions_of(plan.aligned_decoys, text),
        decoys_large=_positions_of(plan.large_decoys, text),
    )


def _positions_of(tokens: tuple[int, ...], text: list[int]) -> tuple[int, ...]:
    return tuple(position for position, token in enumerate(text) if token in tokens)
