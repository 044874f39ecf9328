"""Which block ended a sink: what takes its vector off again, and whether the sink outlives it.

A sink ends when the length along the sink direction that somebody wrote into its token's residual
is gone, or small. Two tests ask who did it:

* **taken off**: the blocks after the sink's last layer, up to the one after which little is left,
  each with what it writes *against* the sink direction beyond what ordinary tokens get. The parts
  add up to the residual's own, so nothing is left out. The one that takes most is the *candidate*;
* **necessity**: with the candidate's output at the token zeroed, the token is a sink for longer.

"For longer" is asked along the direction that the primary has after the sink's last layer, kept
from there on: many erasers take the primary's length off as well, and past that nothing could be
aligned with it. A candidate that passes both is the *eraser*; others without which the sink lives
longer too, and that take at least half as much, are *co-erasers*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.statistics import percentile_among

MIN_TAKEN = 0.25
"""An eraser takes at least this share of the length that the sink has after its last layer."""
GONE = 0.25
"""At most this share of that length is left when the sink's erasure is over. What later blocks do
to the direction, such as a second primary phase, is no part of it."""
CO_ERASER = 0.5
"""A co-eraser takes at least this share of what the eraser does."""
MAIN_HEAD = 0.5
"""A head is named in the place of its attention block if it takes at least this share of what the
block does."""

BlockKind = Literal["mlp", "attention", "head"]


class Block(NamedTuple):
    """An MLP, an attention block, or one head of it."""

    kind: BlockKind
    layer: int
    head: int = -1
    """-1 unless it is a head."""

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}" + (f".{self.head}" if self.kind == "head" else "")


class Taken(NamedTuple):
    """What one block takes off the sink."""

    block: Block
    length: float
    """Along the sink direction, beyond what ordinary tokens lose; negative if it adds."""


class BlockRemoved(NamedTuple):
    """What became of one sink when a block's output at its token was zeroed."""

    sink: int
    """Index of the sink."""
    block: str
    role: Literal["candidate", "control"]
    lifetime: int
    """Layers in a row, from the onset, after which the token is a sink."""
    left: float
    """Length along the sink direction after the candidate's block, over the clean sink's after its
    last layer."""


@dataclass(frozen=True)
class EraserVerdict:
    """What the two tests say together."""

    eraser: str | None
    """The block that ended the sink, as "mlp 22", "attention 22" or "head 22.3"; None where nothing
    passes both tests."""
    candidate: str
    """The block that takes most, whether or not it passes; empty if there is no layer after the
    sink's last."""
    candidate_layer: int
    """-1 without candidate."""
    reason: str
    """Why there is no eraser; empty if there is one."""
    share: float
    """What the candidate takes, over the length after the sink's last layer. Above 1 it takes more
    than there is; both beyond ordinary tokens."""
    co_erasers: tuple[str, ...]
    runner_up: str
    runner_up_share: float
    primary_share: float
    """The same block's share of the primary's length after that layer, along the same direction
    (of a head: that of its whole block)."""
    lifetime: int
    """Layers in a row for which the unedited token is a sink, along the direction that is kept
    after the last layer; -1 if it was not tested."""
    lifetime_without: int
    """The same with the candidate's output at the token zeroed."""
    left: float
    """Length after the candidate's block, over that after the last layer, of the unedited token."""
    left_without: float
    """The same with the candidate's output zeroed."""
    percentile: float
    """Percent of the controls (every other MLP and attention block from the onset to the end of the
    erasure) that leave less than the candidate does when they are zeroed."""


def rank(
    mlp: Float[Tensor, "layer"],
    attention: Float[Tensor, "layer"],
    projection: Float[Tensor, "layer"],
    last_layer: int,
) -> list[Taken]:
    """The blocks after `last_layer`, up to the layer after which `GONE` or less of the sink's
    length is left (all of them if there is none), those that take most first.

    Args:
        mlp: what each MLP writes along the sink direction, beyond what ordinary tokens get.
        attention: the same of each attention block.
        projection: of the residual after each block, beyond that of ordinary tokens.
        last_layer: of the sink's life.
    """
    gone = (projection[last_layer + 1 :] <= GONE * projection[last_layer]).nonzero().flatten()
    end = last_layer + 2 + int(gone[0]) if len(gone) else len(projection)
    kinds: tuple[tuple[BlockKind, Tensor], ...] = (("attention", attention), ("mlp", mlp))
    taken = [
        Taken(Block(kind, layer), -float(written[layer]))
        for kind, written in kinds
        for layer in range(last_layer + 1, end)
    ]
    return sorted(taken, key=lambda one: -one.length)


def main_head(heads: Float[Tensor, "head"], block: float) -> Taken | None:
    """The head that takes most of what an attention block takes, if it takes enough of it.

    Args:
        heads: what each head writes along the sink direction, beyond ordinary tokens.
        block: what the whole block takes off.
    """
    head = int(heads.argmin())
    length = -float(heads[head])
    if not (block > 0 and length >= MAIN_HEAD * block):
        return None
    return Taken(Block("head", -1, head), length)


def leading_life(is_sink: Bool[Tensor, "layer"], onset: int) -> int:
    """For how many layers in a row, from the onset on, the token is a sink."""
    dead = (~is_sink[onset:]).nonzero().flatten()
    return int(dead[0]) if len(dead) else len(is_sink) - onset


def judge(
    candidate: Taken,
    others: Sequence[Taken],
    *,
    whole: float,
    primary_share: float,
    removed: Sequence[BlockRemoved],
    lifetime: int,
    left: float,
) -> EraserVerdict:
    """Name the eraser of one sink.

    The *eraser* is the block after the sink's last layer that takes the largest part off along the
    sink direction, at least `MIN_TAKEN` of it, if the sink lives longer without it. *Co-erasers*
    pass that test too and take at least `CO_ERASER` of what the eraser does.

    Args:
        candidate: the first of `rank`, or its main head.
        others: the rest of `rank`.
        whole: length along the sink direction after the last layer, beyond ordinary tokens.
        primary_share: what the candidate takes off the primary along the same direction.
        removed: the sink's rows; empty if nothing was tested.
        lifetime: of the unedited token, as its rows are counted.
        left: share of the unedited token's length that is left after the candidate's block.
    """
    name = str(candidate.block)
    own = next((one for one in removed if one.block == name), None)
    reasons = []
    if not candidate.length >= MIN_TAKEN * whole:
        reasons.append(
            f"{name} takes most, but only {candidate.length / whole:.0%} of the sink's length"
        )
    if own is None:
        reasons.append("it was not tested whether the sink lives longer without it")
    elif not own.lifetime > lifetime:
        reasons.append(
            f"{name} takes most, but without it the sink lives {own.lifetime} layers as well"
            if own.lifetime == lifetime
            else f"{name} takes most, but without it the sink lives {own.lifetime} layers, not "
            f"longer than {lifetime}"
        )
    controls = [one.left for one in removed if one.role == "control"]
    outlived = {one.block for one in removed if one.lifetime > lifetime}
    runner_up = others[0] if others else None
    return EraserVerdict(
        eraser=None if reasons else name,
        candidate=name,
        candidate_layer=candidate.block.layer,
        reason="; ".join(reasons),
        share=candidate.length / whole,
        co_erasers=tuple(
            str(one.block)
            for one in others
            if one.length >= CO_ERASER * candidate.length
            and str(one.block) in outlived
            and not reasons
        ),
        runner_up=str(runner_up.block) if runner_up else "",
        runner_up_share=runner_up.length / whole if runner_up else math.nan,
        primary_share=primary_share,
        lifetime=lifetime,
        lifetime_without=own.lifetime if own else -1,
        left=left,
        left_without=own.left if own else math.nan,
        percentile=percentile_among(own.left, controls) if own else math.nan,
    )


def no_eraser() -> EraserVerdict:
    """The verdict on a sink after whose last layer there is no block."""
    return EraserVerdict(
        eraser=None,
        candidate="",
        candidate_layer=-1,
        reason="the sink lives to the last layer, so nothing ends it",
        share=math.nan,
        co_erasers=(),
        runner_up="",
        runner_up_share=math.nan,
        primary_share=math.nan,
        lifetime=-1,
        lifetime_without=-1,
        left=math.nan,
        left_without=math.nan,
        percentile=math.nan,
    )
