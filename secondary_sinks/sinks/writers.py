"""Which MLP wrote a sink: the rule that decides, and the comparison with controls.

A secondary sink is a large vector along the sink direction that an MLP writes into a token's
residual. Three tests ask which MLP, and none of them suffices alone:

* **direct write**: the part of the token's residual along the sink direction that each MLP (or
  attention block, or the embedding) contributes. The parts add up to the residual's projection.
  What ordinary tokens get from the same block does not count as a write of a sink, so the verdict
  looks at what exceeds their mean;
* **necessity**: without that MLP's output at the token, the sink is gone or a small part of its
  length is left. The *feeders* pass this test as well: earlier layers that build the feature which
  the writer reads;
* **sufficiency**: the MLP's output at the token, put in the place of the same MLP's output at
  ordinary tokens, makes sinks of them.

`judge` combines them, `compare` sets the result against controls. Both are arithmetic on small
tensors. `resolve_writers` is what analyses call that need a writer: it takes the caller's, or the
layer with the largest direct write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.sinks.direct_writes import DirectWrite, direct_writes
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.statistics import (
    bootstrap_interval,
    percentile_among,
    sign_flip_p_value,
)

MIN_TRANSPLANTS = 0.5
"""Share of the transplants that must make a sink for a layer's output to count as sufficient."""

MAX_LEFT = 0.25
"""A layer is necessary if at most this share of the sink's length along the sink direction is left
without it. To require that there is no sink at all would be too strict: in some layers a remnant a
tenth as long as the sink passes the thresholds of detection."""

CO_WRITER = 0.5
"""An upstream layer without which the sink does not arise is a feeder if it writes less than this
share of what the writer writes, and a co-writer otherwise."""

WriterRule = Literal["largest_write", "given", "mixed"]
"""How writers were chosen: by `largest_writes`, by the caller, or by the caller for some sinks."""

ControlKind = Literal["writer", "other_layer", "random_direction", "same_token", "ordinary"]


@dataclass(frozen=True)
class Verdict:
    """What the three tests say together. Shares are NaN where the whole is not above zero, as it
    may be for a token that is not a sink."""

    writer: int | None
    """The layer that passes all three tests; None where they disagree."""
    candidate: int
    """The layer that writes the largest part, whether or not it passes the other tests."""
    feeders: tuple[int, ...]
    co_writers: tuple[int, ...]
    reason: str
    """Why there is no writer; empty if there is one."""
    write_share: float
    """What the candidate writes, over the residual's projection after the onset layer; both beyond
    the mean of ordinary tokens."""
    length_left: float
    """Share of the length along the sink direction that is left without the candidate's output."""
    transplant_share: float
    """Share of the ordinary tokens that the candidate's output makes sinks of; NaN without any."""
    runner_up: int | None
    """The layer up to the onset that writes the second most."""
    runner_up_share: float


def judge(
    sink: Sink,
    write: Float[Tensor, " layer"],
    projection: float,
    lifetime_without: Int[Tensor, " layer"],
    length_left: Float[Tensor, " layer"],
    transplant_share: Float[Tensor, " layer"],
) -> Verdict:
    """Name the writer of one sink and its feeders.

    The *writer* is the layer whose MLP, among those at or before the onset, (a) writes the largest
    part along the sink direction, (b) is necessary: zeroing its output at the token leaves no sink,
    or at most `MAX_LEFT` of its length along the sink direction, and (c) is sufficient:
    `MIN_TRANSPLANTS` or more of the transplants of its output into ordinary tokens make a sink. If
    the layer of (a) fails (b) or (c) there is no writer, and the reason says which failed; nor is
    there one of a chosen token that is not a sink. *Feeders* are layers before the writer that are
    necessary and write less than `CO_WRITER` of what the writer does; necessary ones that write
    more are *co-writers*.

    Args:
        sink: the sink, or a chosen token.
        write: what each MLP writes along the sink direction, beyond what ordinary tokens get.
        projection: of the residual after the onset layer, beyond that of ordinary tokens.
        lifetime_without: layers for which the token is a sink with that MLP's output zeroed.
        length_left: share of the length along the sink direction that is left then.
        transplant_share: share of the transplants of that MLP's output that made a sink.
    """
    order = write[: sink.l_start + 1].argsort(descending=True).tolist()
    candidate = order[0]
    runner_up = order[1] if len(order) > 1 else None
    necessary = ((lifetime_without == 0) | (length_left <= MAX_LEFT)).tolist()
    share = float(transplant_share[candidate])
    reasons = []
    if sink.kind == "chosen":
        reasons.append(f"the token at position {sink.position} is not a sink")
    else:
        if not write[candidate] > 0:
            reasons.append("no MLP up to the onset writes along the sink direction")
        if not necessary[candidate]:
            reasons.append(
                f"MLP {candidate} writes most, but without it the sink still lives "
                f"{int(lifetime_without[candidate])} layers with {length_left[candidate]:.0%} of "
                "its length"
            )
        if math.isnan(share):
            reasons.append("there was no ordinary token to transplant into")
        elif share < MIN_TRANSPLANTS:
            reasons.append(
                f"MLP {candidate} writes most, but its output makes sinks of only {share:.0%} of "
                "the tokens that it is transplanted into"
            )
    upstream = [layer for layer in range(candidate) if necessary[layer]] if not reasons else []
    weak = {layer for layer in upstream if write[layer] < CO_WRITER * write[candidate]}

    whole = projection if projection > 0 else math.nan
    return Verdict(
        writer=None if reasons else candidate,
        candidate=candidate,
        feeders=tuple(layer for layer in upstream if layer in weak),
        co_writers=tuple(layer for layer in upstream if layer not in weak),
        reason="; ".join(reasons),
        write_share=float(write[candidate]) / whole,
        length_left=float(length_left[candidate]),
        transplant_share=share,
        runner_up=runner_up,
        runner_up_share=math.nan if runner_up is None else float(write[runner_up]) / whole,
    )


class Control(NamedTuple):
    """One row that the candidate is compared with, or one of the candidate (`kind="writer"`)."""

    sink: int
    """Index of the sink."""
    test: str
    """"necessity" or "sufficiency"."""
    kind: ControlKind
    layer: int
    """The MLP that was ablated, or into whose output something was put."""
    position: int
    """The token whose trajectory was measured."""
    source: int
    """The token that the output came from; -1 where there is none."""
    effect: float
    """Length along the sink direction after the onset layer (centered norm times centered
    alignment) that was lost (necessity) or gained (sufficiency)."""
    at_once: bool
    """Whether the token is a sink right after the edited block. One that becomes a sink later does
    so through other blocks: a large random vector also contains some of what they read."""
    lifetime: int
    """Layers for which the token is a sink, with the intervention."""


@dataclass(frozen=True)
class Comparison:
    """The candidate against its controls."""

    necessity_percentile: float
    """Percent of the controls that lose less than the sink does. The other layers that are drawn
    may be feeders, without which as much is lost."""
    sufficiency_percentile: float
    """Percent of the controls that gain less than the mean transplant does."""
    transplant_interval: tuple[float, float]
    """95 % bootstrap interval of the mean lifetime of the transplants."""
    p_value: float
    """Sign-flip p-value, one-sided: transplants against random directions of the same norm in the
    same tokens. n pairs cannot give less than 2^-n."""


def compare(controls: Sequence[Control], *, seed: int) -> Comparison:
    """Set the candidate of one sink against its controls.

    Args:
        controls: the rows of that sink, those of the candidate included.
        seed: of the bootstrap and of the permutations.
    """
    percentiles = {}
    for test in ("necessity", "sufficiency"):
        candidate = [c.effect for c in controls if c.test == test and c.kind == "writer"]
        others = [c.effect for c in controls if c.test == test and c.kind != "writer"]
        mean = sum(candidate) / len(candidate) if candidate else math.nan
        percentiles[test] = percentile_among(mean, others)
    lifetimes = [
        float(c.lifetime) for c in controls if (c.test, c.kind) == ("sufficiency", "writer")
    ]
    return Comparison(
        necessity_percentile=percentiles["necessity"],
        sufficiency_percentile=percentiles["sufficiency"],
        transplant_interval=bootstrap_interval(torch.tensor(lifetimes), seed=seed),
        p_value=sign_flip_p_value(
            torch.tensor(gains_over_random(controls)), alternative="greater", seed=seed
        ),
    )


def gains_over_random(controls: Iterable[Control]) -> list[float]:
    """What each transplant of one sink's candidate gains in length, minus what a random direction
    of the same norm gains in the same token."""
    gains: dict[str, dict[int, float]] = {"writer": {}, "random_direction": {}}
    for control in controls:
        if control.test == "sufficiency" and control.kind in gains:
            gains[control.kind][control.position] = control.effect
    pairs = [p for p in gains["writer"] if p in gains["random_direction"]]
    return [gains["writer"][p] - gains["random_direction"][p] for p in pairs]


@dataclass(frozen=True)
class Writers:
    """Which layer's MLP an analysis looks at, sink by sink, and how it was chosen."""

    layers: tuple[int, ...]
    """One for each sink."""
    rule: WriterRule


def resolve_writers(
    model: Any,
    sink_map: SinkMap,
    sinks: Sequence[Sink],
    writers: int | Mapping[int, int] | None = None,
    *,
    by: Literal["position", "onset"] = "position",
    writes: DirectWrite | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> Writers:
    """The layer whose MLP wrote each sink: those that are given, else the largest write.

    Without `writers` it is, sink by sink, the layer up to the onset whose MLP writes the largest
    part along the sink direction, beyond what ordinary tokens get (`largest_writes`). It costs one
    pass and is a candidate: `attribute_to_mlps` tests whether it is necessary and sufficient, and
    its result's `writers` can be passed here. They leave out sinks whose tests disagree; those get
    the largest write.

    Args:
        model: any TransformerLens model.
        sink_map: the map of the text.
        sinks: sinks of the map.
        writers: one layer for all, or a mapping to layers.
        by: what is mapped: positions where the sinks are of one text, onsets where they are of
            several, in each of which a position is another token.
        writes: the direct writes of these sinks, where they are known already; saves the pass.
        fwd_hooks: hooks in force in the pass.

    Raises:
        InputError: a mapping that has none of the sinks, or a layer out of range.
    """
    n_layers = int(model.cfg.n_layers)
    keys = [sink.position if by == "position" else sink.l_start for sink in sinks]
    given: dict[int, int | None] = (
        dict(writers) if isinstance(writers, Mapping) else dict.fromkeys(keys, writers)
    )
    layers = [given.get(key) for key in keys]
    if isinstance(writers, Mapping) and all(layer is None for layer in layers):
        raise InputError(f"writers is for {by}s {sorted(writers)}, the sinks are at {keys}")
    for layer in layers:
        if layer is not None and not 0 <= layer < n_layers:
            raise InputError(f"writer {layer} is out of range: the layers are 0 to {n_layers - 1}")
    known = [int(layer) for layer in layers if layer is not None]
    if len(known) == len(sinks):
        return Writers(tuple(known), "given")
    writes = writes or direct_writes(model, sink_map, sinks, fwd_hooks=fwd_hooks)
    largest = largest_writes(writes, sinks)
    resolved = (
        candidate if layer is None else int(layer)
        for layer, candidate in zip(layers, largest, strict=True)
    )
    return Writers(tuple(resolved), "mixed" if known else "largest_write")


def largest_writes(writes: DirectWrite, sinks: Sequence[Sink]) -> list[int]:
    """The layer up to each sink's onset whose MLP writes the largest part along its direction,
    beyond what ordinary tokens get."""
    return [
        int(writes.excess[index, : sink.l_start + 1].argmax()) for index, sink in enumerate(sinks)
    ]
