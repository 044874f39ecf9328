"""Which block ended a sink: what erases its vector, and does the sink live on without that block?

A sink ends when the length along the sink direction that a block wrote into its token's residual is
gone, or small. Two tests ask which block did it:

* **erased length**: what each block after the sink's last layer, up to the one after which little
  is left, writes *against* the sink direction beyond what ordinary tokens get. The parts add up to
  the residual's own, so nothing is left out. The block that erases most is the *candidate*;
* **necessity**: with the candidate's output at the token zeroed, the token is a sink for longer.

"For longer" is measured along the direction that the primary has after the sink's last layer, held
fixed from there on: many erasers erase the primary's length as well, and no residual could be
aligned with it afterwards. A candidate that passes both tests is the *eraser*; other blocks without
which the sink lives longer too, and that erase at least half as much, are *co-erasers*.

Everything here is arithmetic on small tensors; nothing touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.result import counted
from secondary_sinks.statistics import percentile_among

MIN_ERASED = 0.25
"""An eraser erases at least this share of the length that the sink has after its last layer."""

GONE = 0.25
"""The erasure is over once at most this share of that length is left. What later blocks do to the
direction, such as a second primary phase, does not belong to it."""

CO_ERASER = 0.5
"""A co-eraser erases at least this share of what the eraser does."""

MAIN_HEAD = 0.5
"""A head is named in the place of its attention block if it erases at least this share of what the
block does."""

BlockKind = Literal["mlp", "attention", "head"]

Role = Literal["unedited", "candidate", "control"]


class Block(NamedTuple):
    """An MLP, an attention block, or one head of it."""

    kind: BlockKind
    layer: int
    head: int = -1
    """-1 unless it is a head."""

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}" + (f".{self.head}" if self.kind == "head" else "")


class Erased(NamedTuple):
    """What one block erases from the sink."""

    block: Block
    length: float
    """Along the sink direction, beyond what ordinary tokens lose; negative if it adds."""


class BlockAblation(NamedTuple):
    """What became of one sink when a block's output at its token was zeroed, or nothing was."""

    sink: int
    """Index of the sink."""
    block: str
    """Empty where nothing was zeroed."""
    role: Role
    lifetime: int
    """Layers in a row, from the onset, after which the token is a sink."""
    left: float
    """Length along the sink direction after the candidate's block, over the clean sink's after its
    last layer."""


@dataclass(frozen=True)
class EraserVerdict:
    """What the two tests say together."""

    reason: str
    """Why there is no eraser; empty if there is one."""
    eraser: str | None = None
    """The block that ended the sink, as "mlp 22", "attention 22" or "head 22.3"; None where nothing
    passes both tests."""
    candidate: str = ""
    """The block that erases most, whether or not it passes; empty if the token is not a sink or
    there is no layer after the sink's last."""
    candidate_layer: int = -1
    """-1 without candidate."""
    share: float = math.nan
    """What the candidate erases, over the length after the sink's last layer, both beyond ordinary
    tokens. Above 1 it erases more than there is."""
    co_erasers: tuple[str, ...] = ()
    runner_up: str = ""
    runner_up_share: float = math.nan
    primary_share: float = math.nan
    """The same block's share of the primary's length after that layer, along the same direction
    (of a head: that of its whole block)."""
    lifetime: int = -1
    """Layers in a row for which the unedited token is a sink, along the direction that is held
    fixed after the last layer; -1 if it was not tested."""
    lifetime_without: int = -1
    """The same with the candidate's output at the token zeroed."""
    left: float = math.nan
    """Length after the candidate's block, over that after the last layer, of the unedited token."""
    left_without: float = math.nan
    """The same with the candidate's output zeroed."""
    percentile: float = math.nan
    """Percent of the controls (every other MLP and attention block from the onset to the end of the
    erasure) that leave less than the candidate does when they are zeroed."""


def rank(
    mlp: Float[Tensor, " layer"],
    attention: Float[Tensor, " layer"],
    projection: Float[Tensor, " layer"],
    last_layer: int,
) -> list[Erased]:
    """The blocks after `last_layer`, up to the layer after which `GONE` or less of the sink's
    length is left (all of them if there is none), those that erase most first.

    Args:
        mlp: what each MLP writes along the sink direction, beyond what ordinary tokens get.
        attention: the same of each attention block.
        projection: of the residual after each block, beyond that of ordinary tokens.
        last_layer: of the sink's life.
    """
    gone = (projection[last_layer + 1 :] <= GONE * projection[last_layer]).nonzero().flatten()
    end = last_layer + 2 + int(gone[0]) if len(gone) else len(projection)
    kinds: tuple[tuple[BlockKind, Tensor], ...] = (("attention", attention), ("mlp", mlp))
    erased = [
        Erased(Block(kind, layer), -float(written[layer]))
        for kind, written in kinds
        for layer in range(last_layer + 1, end)
    ]
    return sorted(erased, key=lambda part: -part.length)


def main_head(heads: Float[Tensor, " head"], attention: Erased) -> Erased | None:
    """The head that erases most of what an attention block erases, if it erases enough of it.

    Args:
        heads: what each head writes along the sink direction, beyond ordinary tokens.
        attention: the whole block.
    """
    head = int(heads.argmin())
    length = -float(heads[head])
    if not (attention.length > 0 and length >= MAIN_HEAD * attention.length):
        return None
    return Erased(Block("head", attention.block.layer, head), length)


def leading_life(is_sink: Bool[Tensor, " layer"], onset: int) -> int:
    """For how many layers in a row, from the onset on, the token is a sink."""
    dead = (~is_sink[onset:]).nonzero().flatten()
    return int(dead[0]) if len(dead) else len(is_sink) - onset


def judge(
    candidate: Erased,
    others: Sequence[Erased],
    *,
    whole: float,
    primary_share: float,
    ablations: Sequence[BlockAblation],
) -> EraserVerdict:
    """Name the eraser of one sink.

    The *eraser* is the block after the sink's last layer that erases the largest part along the
    sink direction, at least `MIN_ERASED` of it, if the sink lives longer without it. *Co-erasers*
    pass that test too and erase at least `CO_ERASER` of what the eraser does.

    Args:
        candidate: the first of `rank`, or its main head.
        others: the rest of `rank`.
        whole: length along the sink direction after the last layer, beyond ordinary tokens.
        primary_share: what the candidate erases from the primary along the same direction.
        ablations: the sink's rows, the unedited one among them; empty if nothing was tested.
    """
    name = str(candidate.block)
    untested = BlockAblation(-1, "", "control", -1, math.nan)
    unedited = next((row for row in ablations if row.role == "unedited"), untested)
    without = next((row for row in ablations if row.block == name), untested)
    lifetime = unedited.lifetime
    reasons = []
    if not candidate.length >= MIN_ERASED * whole:
        reasons.append(
            f"{name} erases most, but only {candidate.length / whole:.0%} of the sink's length"
        )
    if without is untested:
        reasons.append("it was not tested whether the sink lives longer without it")
    elif not without.lifetime > lifetime:
        reasons.append(
            f"{name} erases most, but the sink does not live longer without it: "
            f"{counted(without.lifetime, 'layer')}, with it {counted(lifetime, 'layer')}"
        )
    controls = [row.left for row in ablations if row.role == "control"]
    outlived = {row.block for row in ablations if row.lifetime > lifetime and not reasons}
    runner_up = others[0] if others else None
    return EraserVerdict(
        reason="; ".join(reasons),
        eraser=None if reasons else name,
        candidate=name,
        candidate_layer=candidate.block.layer,
        share=candidate.length / whole,
        co_erasers=tuple(
            str(other.block)
            for other in others
            if other.length >= CO_ERASER * candidate.length and str(other.block) in outlived
        ),
        runner_up=str(runner_up.block) if runner_up else "",
        runner_up_share=runner_up.length / whole if runner_up else math.nan,
        primary_share=primary_share,
        lifetime=lifetime,
        lifetime_without=without.lifetime,
        left=unedited.left,
        left_without=without.left,
        percentile=percentile_among(without.left, controls),
    )
