"""How long are the keys, values and residuals of sinks, layer by layer?

What makes a sink visible to attention and harmless to the output can be read off three curves: a
long residual, keys that differ from ordinary ones, and short values, so that much attention moves
little. Residuals are those after block l; keys and values are those of block l, computed from the
residual before it, so what a sink with layers 5 to 21 does to keys and values shows in layers 6 to
22.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import need_attention_everywhere
from secondary_sinks.observe.collectors import Norms, ResidualNorms
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["key", "value", "residual"]

PARTS: tuple[Part, ...] = ("key", "value", "residual")

BAND = (0.05, 0.5, 0.95)
"""Quantiles of the ordinary tokens: the ends of the band, and the median."""


def norm_profiles(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    fwd_hooks: Sequence[UserHook] = (),
) -> NormProfiles:
    """How long are the keys, values and residuals of the primary, of each sink and of the rest?

    Keys are those that the key projection gives (rotary embedding keeps their norm; where a model
    normalizes keys afterwards, as Qwen3 does, that is not included), one norm per key-value head,
    averaged over heads. Everything is in the units of the model: compare with the ordinary tokens
    of the same layer, not with another layer or model.

    >>> profiles = ss.norm_profiles(model, sink_map)
    >>> profiles.ratio("value")
    >>> profiles.plot()

    Not evidence for: attention (a long key may point anywhere; see `SinkMap.sink_score`) or what
    the head writes (the output matrix may amplify a short value).

    Args:
        model: any TransformerLens model.
        sink_map: the map of the text, from `detect_sinks` in this model.
        sinks: which sinks or positions have curves beside the primary's, see `SinkMap.select`. A
            text without secondary sinks has the curves of the primary and of ordinary tokens.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Raises:
        InputError: none of the selected sinks exists, or a map that does not belong to this model.
        ModelError: the model has no site of keys or values.
    """
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    need_attention_everywhere(model, "norm_profiles")
    nothing_else = sinks == "secondary" and not sink_map.secondary
    chosen = [] if nothing_else else sink_map.select(sinks)
    collectors = [Norms("k"), Norms("v"), ResidualNorms()]
    tokens = sink_map.array("tokens")
    norms = trace_tokens(model, tokens, collectors, fwd_hooks=fwd_hooks)
    return NormProfiles(
        primary_position=sink_map.primary_position,
        primary_token=sink_map.token_strings[sink_map.primary_position],
        phases=sink_map.phases,
        sinks=tuple(dataclasses.replace(sink, evidence=None) for sink in chosen),
        n_ordinary=int(ordinary_tokens(sink_map).sum()),
        key=norm_curves(norms["k_norm"].mean(dim=1), sink_map, chosen),
        value=norm_curves(norms["v_norm"].mean(dim=1), sink_map, chosen),
        residual=norm_curves(norms["ResidualNorms"], sink_map, chosen),
        provenance=sink_map.provenance,
    )


@dataclass(frozen=True)
class NormCurves:
    """Norms of one part by layer. Keys and values: mean of the norms over key-value heads."""

    primary: Float[Tensor, " layer"]
    sinks: Float[Tensor, " sink layer"]
    """One row for each of `NormProfiles.sinks`."""
    ordinary: Float[Tensor, " quantile layer"]
    """5 % quantile, median and 95 % quantile over the ordinary tokens; NaN without any."""


@dataclass(frozen=True)
class NormProfiles(Result):
    """Norms of keys, values and residuals of one text; see `norm_profiles`."""

    primary_position: int
    primary_token: str
    phases: tuple[tuple[int, int], ...]
    """Primary phases, [start, end)."""
    sinks: tuple[Sink, ...]
    """The chosen sinks (without their evidence)."""
    n_ordinary: int
    key: NormCurves
    value: NormCurves
    residual: NormCurves
    provenance: Provenance

    def curves(self, part: Part) -> NormCurves:
        """The curves of "key", "value" or "residual"."""
        return cast(NormCurves, getattr(self, part))

    def shown_layers(self, sink: Sink, part: Part) -> list[int]:
        """The layers that show a sink's life: the life itself for residuals, the next layers for
        keys and values."""
        n_layers = len(self.key.primary)
        delay = 0 if part == "residual" else 1
        return [layer + delay for layer in sink.layers if layer + delay < n_layers]

    def ratio(self, part: Part) -> Float[Tensor, " sink"]:
        """Of each sink: its norm over the median ordinary token's, geometric mean over the layers
        that show its life."""
        curves = self.curves(part)
        logs = (curves.sinks / curves.ordinary[1]).log()
        means = [
            logs[row, self.shown_layers(sink, part)].mean().exp()
            for row, sink in enumerate(self.sinks)
        ]
        return torch.stack(means) if means else torch.zeros(0)

    def __repr__(self) -> str:
        kinds = {sink.kind for sink in self.sinks} or {"secondary"}
        noun = f"{kinds.pop()} sink" if len(kinds) == 1 else "sink"
        count = counted(len(self.sinks), noun.replace("chosen sink", "chosen token"))
        ratios = [f"{part} {self.ratio(part).median():.2g}" for part in PARTS if self.sinks]
        over = f": norms over an ordinary token's: {', '.join(ratios)}" if ratios else ""
        return f"NormProfiles({self.provenance.model.name!r}, {count}{over})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each part, token and layer.

        `kind` is "primary", that of the sink, or "ordinary". Ordinary tokens have one row, with the
        median as `norm` and the band in `low` and `high`.
        """
        import pandas as pd

        frames = []
        for part in PARTS:
            curves = self.curves(part)
            low, median, high = curves.ordinary
            rows = [
                ("primary", self.primary_position, self.primary_token, curves.primary),
                *(
                    (sink.kind, sink.position, sink.token, norm)
                    for sink, norm in zip(self.sinks, curves.sinks, strict=True)
                ),
                ("ordinary", -1, "", median),
            ]
            for kind, position, token, norm in rows:
                frame = pd.DataFrame({"layer": range(len(norm)), "norm": norm.numpy()})
                frame.insert(0, "part", part)
                frame.insert(1, "kind", kind)
                frame.insert(2, "position", position)
                frame.insert(3, "token", token)
                ordinary = kind == "ordinary"
                frame["low"] = low.numpy() if ordinary else math.nan
                frame["high"] = high.numpy() if ordinary else math.nan
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)


def norm_curves(
    norm: Float[Tensor, " layer token"], sink_map: SinkMap, chosen: Sequence[Sink]
) -> NormCurves:
    """Curves of the primary, of the chosen sinks, and of the ordinary tokens."""
    quantiles = torch.tensor(BAND, dtype=norm.dtype)
    ordinary = norm[:, ordinary_tokens(sink_map)]
    if ordinary.shape[1] == 0:
        ordinary = norm.new_full((len(norm), 1), torch.nan)
    return NormCurves(
        primary=norm[:, sink_map.primary_position].clone(),
        sinks=norm[:, [sink.position for sink in chosen]].T.contiguous(),
        ordinary=ordinary.quantile(quantiles, dim=1),
    )
