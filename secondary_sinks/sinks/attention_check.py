"""Do the sinks of a map agree with raw attention?

The criterion reads the direction and norm of residuals, and attention by the heads that read the
primary. This check reads none of these. It sorts tokens by their *steady strength*: attention
averaged over all heads in all but a quarter of the text after the token
(`observe.steady_attention`), in the unit of strength, which does not depend on the length of the
text: a multiple of uniform attention, times the root of uniform attention
(`sinks.attention_baseline`).

* a *clear sink* has a steady strength of `CLEAR_SINK` or more in `MIN_LAYERS` layers in a row;
* a *clear non-sink* stays below `CLEAR_NON_SINK` in every layer from the second on;
* what lies between, and tokens with too little text after them, are left open.

At 500 tokens the two are about 6 and 2.5 times uniform attention, or 0.02 and 0.008 of it all.
Tokens that are copied from, or attended to for being near, fail in most of the later text: they are
no clear sinks. A short-lived sink lies between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

CLEAR_SINK, MIN_LAYERS = 0.33, 4
CLEAR_NON_SINK = 0.14


@dataclass(frozen=True, eq=False)
class AttentionCheck(Result):
    """How the sinks of one map compare with attention alone. The primary itself does not count."""

    token_strings: tuple[str, ...]
    clear_sinks: tuple[int, ...]
    """Positions that draw attention from everywhere, over several layers in a row."""
    agreed: tuple[int, ...]
    """Those of them that the map calls sinks."""
    false_calls: tuple[int, ...]
    """Clear non-sinks that the map calls sinks."""
    open_calls: tuple[int, ...]
    """Sinks of the map that attention alone neither confirms nor refutes."""
    n_clear_non_sinks: int
    n_open: int
    """Tokens between the two classes, and those with too little text after them."""
    strongest: tuple[float, ...]
    """For each clear sink and then each false call, the largest steady strength that it keeps for
    `MIN_LAYERS` layers in a row: what `CLEAR_SINK` is compared with."""
    provenance: Provenance

    @property
    def misses(self) -> tuple[int, ...]:
        """Clear sinks that the map does not call sinks."""
        return tuple(sorted({*self.clear_sinks} - {*self.agreed}))

    @property
    def recall(self) -> float:
        """Share of the clear sinks that are called; NaN if there are none."""
        return _share(len(self.agreed), len(self.clear_sinks))

    @property
    def precision(self) -> float:
        """Share of the calls on which attention is clear that it confirms; NaN if there are
        none."""
        return _share(len(self.agreed), len(self.agreed) + len(self.false_calls))

    def __repr__(self) -> str:
        n_clear = counted(len(self.clear_sinks), "clear sink")
        return (
            f"AttentionCheck(recall {self.recall:.2f} of {n_clear}, precision "
            f"{self.precision:.2f}, false calls {list(self.false_calls)}, "
            f"misses {list(self.misses)}, {len(self.open_calls)} calls left open)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each clear sink and each false call."""
        import pandas as pd

        positions = [*self.clear_sinks, *self.false_calls]
        verdicts = [
            "miss" if p in self.misses else "false call" if p in self.false_calls else "agreed"
            for p in positions
        ]
        return pd.DataFrame(
            {
                "position": positions,
                "token": [self.token_strings[p] for p in positions],
                "verdict": verdicts,
                "steady_strength": list(self.strongest),
            }
        )


def attention_check(sink_map: SinkMap) -> AttentionCheck:
    """Do the sinks of a map agree with raw attention, all heads alike?

    >>> ss.attention_check(sink_map)
    AttentionCheck(recall 1.00 of 7 clear sinks, precision 1.00, false calls [], misses [], ...)

    Run it first on a model of a family that you have not seen. The definitions are those of the
    module `sinks.attention_check`.

    Not evidence for: that a called token left open is no sink, or that a miss is one in the sense
    of the paper, which asks for the primary's direction.

    Args:
        sink_map: of `detect_sinks`; texts of about 100 tokens or more.

    Raises:
        InputError: not a sink map, one that holds no attention (read from a published file), or
            one of a text too short for any token to be judged.
    """
    if not isinstance(sink_map, SinkMap):
        raise InputError(f"expected one sink map, got {type(sink_map).__name__}")
    steady = sink_map.array("steady_attention") * sink_map.array("uniform_attention").sqrt()
    known = ~torch.isnan(steady).all(dim=0)
    known[sink_map.primary_position] = False
    if not known.any():
        raise InputError(
            f"no token of {sink_map!r} is followed by enough text to be judged by attention alone; "
            "use a text of 100 tokens or more, and an attention path other than 'fused'"
        )
    seen = steady[~torch.isnan(steady).all(dim=1)].nan_to_num(nan=0.0)  # some have no attention
    kept = seen.unfold(0, min(MIN_LAYERS, len(seen)), 1).amin(dim=-1).amax(dim=0)
    is_sink = known & (kept >= CLEAR_SINK)
    is_none = known & (steady[1:].nan_to_num(nan=0.0) < CLEAR_NON_SINK).all(dim=0)
    called = torch.zeros_like(known)
    called[[sink.position for sink in sink_map.sinks]] = True
    called[sink_map.primary_position] = False
    clear, false = _positions(is_sink), _positions(is_none & called)
    return AttentionCheck(
        token_strings=sink_map.token_strings,
        clear_sinks=clear,
        agreed=_positions(is_sink & called),
        false_calls=false,
        open_calls=_positions(called & ~is_sink & ~is_none),
        n_clear_non_sinks=int(is_none.sum()),
        n_open=int((~is_sink & ~is_none).sum()) - 1,
        strongest=tuple(kept[[*clear, *false]].tolist()),
        provenance=sink_map.provenance,
    )


def _positions(chosen: Bool[Tensor, " token"]) -> tuple[int, ...]:
    return tuple(chosen.nonzero().flatten().tolist())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
