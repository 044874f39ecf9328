"""The tokens that sinks are compared with: ordinary tokens, and those matched to a sink.

An *ordinary* token is one that is neither the primary nor a sink of the map at any layer. The same
set makes the mean of a mean ablation, the average that direct writes are compared with, and the
pool that controls are drawn from.

A *matched control* of a sink is an ordinary token near it, because position decides how much
attention a token draws. Its token id is not that of a sink in this text, and at no layer of the
sink's phase is it more than `MAX_NORM_RATIO` times as large as the median token: a token that is
massive in another direction is not an example of ordinary ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

MAX_NORM_RATIO = 2.0
"""Largest centered norm of a matched control, over the median token's."""

POOL = 4
"""Controls are drawn from this many times as many tokens, the nearest in position."""

MIN_POOL = 16
"""But from at least this many."""


def ordinary_tokens(sink_map: SinkMap) -> Bool[Tensor, " token"]:
    """Which tokens are ordinary: neither the primary nor a sink at any layer."""
    ordinary = torch.ones(sink_map.n_tokens, dtype=torch.bool)
    no_control = (*sink_map.sinks, *sink_map.undecided)
    ordinary[[sink_map.primary_position, *(sink.position for sink in no_control)]] = False
    return ordinary


def phase_of(sink_map: SinkMap, sink: Sink) -> slice:
    """The primary phase that a sink lives in, as a slice of layers.

    Raises:
        InputError: it lies outside all of them.
    """
    for start, end in sink_map.phases:
        if start <= sink.l_start < end:
            return slice(start, end)
    raise InputError(f"{sink!r} lies outside the primary phases {sink_map.phases}")


def matched_controls(
    sink_map: SinkMap,
    sink: Sink,
    n: int,
    *,
    seed: Sequence[int],
    exclude: Collection[int] = (),
) -> tuple[int, ...]:
    """Draw ordinary tokens that are matched to a sink, in order of position.

    Where fewer than `n` tokens pass the tests of the module, the test of the norm is dropped, then
    that of the token id.

    Args:
        sink_map: the map of the text.
        sink: a sink, or a chosen token, of the map.
        n: how many at most; a short text has fewer.
        seed: of the draw, together with the sink's position and onset.
        exclude: positions that are taken.
    """
    tokens, norm = sink_map.array("tokens"), sink_map.array("centered_norm")
    ordinary = ordinary_tokens(sink_map)
    ordinary[[sink.position, *exclude]] = False
    n_later = torch.arange(sink_map.n_tokens - 1, -1, -1)
    seen = ordinary & (n_later >= int(sink_map.thresholds["min_queries"]))
    other_id = seen & ~torch.isin(tokens, torch.tensor([s.token_id for s in sink_map.sinks]))
    phase = phase_of(sink_map, sink)
    # Up to the last layer but one, where some models write large, unrelated vectors.
    inside = norm[phase.start : max(phase.start + 1, min(phase.stop, norm.shape[0] - 1))]
    median = inside.median(dim=1, keepdim=True).values
    plain = other_id & (inside <= MAX_NORM_RATIO * median).all(dim=0)
    allowed = next((kind for kind in (plain, other_id, seen) if int(kind.sum()) >= n), seen)
    nearest = _nearest(allowed, [sink.position], max(POOL * n, MIN_POOL))
    rng = np.random.default_rng([*seed, sink.position, sink.l_start])
    return tuple(sorted(rng.permutation(np.array(nearest, dtype=int))[:n].tolist()))


def same_token_controls(
    sink_map: SinkMap, sink: Sink, n: int, *, seed: Sequence[int]
) -> tuple[int, ...]:
    """Draw ordinary tokens with the token id of a sink, in order of position; the arguments are
    those of `matched_controls`."""
    allowed = _same_tokens(sink_map, [sink.token_id])
    allowed[sink.position] = False  # a chosen token is ordinary itself
    same = allowed.nonzero().flatten().numpy()
    rng = np.random.default_rng([*seed, sink.position, sink.l_start, 0])
    return tuple(sorted(rng.permutation(same)[:n].tolist()))


def nearest_same_tokens(
    sink_map: SinkMap, sinks: Sequence[Sink], n: int, *, exclude: Collection[int] = ()
) -> tuple[int, ...]:
    """The ordinary tokens with the token ids of some sinks whose positions are most like theirs, in
    order of position. The sinks may be those of other texts: a text without them still shows the
    same tokens where they are not sinks."""
    allowed = _same_tokens(sink_map, {sink.token_id for sink in sinks})
    allowed[list(exclude)] = False
    return tuple(sorted(_nearest(allowed, [sink.position for sink in sinks], n)))


def _same_tokens(sink_map: SinkMap, token_ids: Collection[int]) -> Bool[Tensor, " token"]:
    """Which ordinary tokens have one of these token ids."""
    ordinary = ordinary_tokens(sink_map)
    ordinary[-1] = False  # no later token shows what becomes of it
    return ordinary & torch.isin(sink_map.array("tokens"), torch.tensor(list(token_ids)))


def _nearest(allowed: Bool[Tensor, " token"], targets: Sequence[int], n: int) -> list[int]:
    """The `n` allowed positions that are nearest to one of the targets, nearest first. Distance is
    measured between logarithms, since early positions differ more than late ones."""
    positions = allowed.nonzero().flatten()
    logs = torch.tensor([math.log(target + 1) for target in targets])
    distance = ((positions + 1).log()[:, None] - logs).abs().min(dim=1).values
    return list(positions[distance.argsort(stable=True)[:n]].tolist())
