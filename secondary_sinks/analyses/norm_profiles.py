"""How long are the keys, values and residuals of sinks, layer by layer?

What makes a sink visible to attention and harmless to the output can be read off three curves: a
long residual, keys that differ from ordinary ones, and short values, so that much attention moves
little. Residuals are those after block l; keys and values are those of block l, computed from the
residual before it, so what a sink with layers 5 to 21 does to keys and values is seen in layers 6
to 22.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.observe.collectors import Norms, ResidualNorms
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["key", "value", "residual"]

PARTS: tuple[Part, ...] = ("key", "value", "residual")

BAND = (0.05, 0.5, 0.95)

"""Quantiles of the ordinary tokens: the ends of the band, and the median."""


def norm_profiles(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> NormProfiles:
    """Norms of keys, values and residuals of the primary, each secondary sink, and the rest.

    Keys are those that the key projection gives (rotary embedding keeps their norm; where a model
    normalizes keys afterwards, as Qwen3 does, that is not in it), one norm a key-value head,
    averaged over heads. Everything is in the units of the model: compare with the ordinary tokens
    of the same layer, not with another layer or model.

    What it is not evidence for: attention (a long key may point anywhere; see `SinkMap.sink_score`)
    or what the head writes (the output matrix may amplify a short value).

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        chat: the string goes through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: several texts, or a sink map of another model, text or criterion.
        ModelError: the model has no site of keys or values.
    """
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    collectors = [Norms("k"), Norms("v"), ResidualNorms()]
    norms = cast(Trace, trace(model, cast(Tensor, found.tokens), collectors, fwd_hooks=fwd_hooks))
    chosen = found.secondary
    return NormProfiles(
        primary_position=found.primary_position,
        primary_token=found.token_strings[found.primary_position],
        phases=found.phases,
        sinks=tuple(dataclasses.replace(sink, evidence=None) for sink in chosen),
        n_ordinary=len(ordinary_positions(found)),
        key=curves_of(norms["k_norm"].mean(dim=1), found, chosen),
        value=curves_of(norms["v_norm"].mean(dim=1), found, chosen),
        residual=curves_of(norms["ResidualNorms"], found, chosen),
        model=found.model,
    )


@dataclass(frozen=True)
class NormCurves:
    """Norms of one part by layer. Keys and values: mean of the norms over key-value heads."""

    primary: Float[Tensor, "layer"]
    secondary: Float[Tensor, "sink layer"]
    """One row for each secondary sink of `NormProfiles.sinks`."""
    ordinary: Float[Tensor, "quantile layer"]
    """5 % quantile, median and 95 % quantile over the tokens that are no sinks."""


@dataclass(frozen=True)
class NormProfiles(Result):
    """Norms of keys, values and residuals of one text; see `norm_profiles`."""

    primary_position: int
    primary_token: str
    phases: tuple[tuple[int, int], ...]
    """Primary phases, [start, end)."""
    sinks: tuple[Sink, ...]
    """The secondary sinks (without their evidence)."""
    n_ordinary: int
    key: NormCurves
    value: NormCurves
    residual: NormCurves
    model: dict[str, Any]

    def curves(self, part: Part) -> NormCurves:
        """The curves of "key", "value" or "residual"."""
        found: NormCurves = getattr(self, part)
        return found

    def ratio(self, part: Part) -> Float[Tensor, "sink"]:
        """Of each secondary sink: its norm over the median ordinary token's, geometric mean over
        the layers that show its life (the life itself for residuals, the next layers for keys and
        values)."""
        curves = self.curves(part)
        n_layers = curves.primary.shape[0]
        logs = (curves.secondary / curves.ordinary[1]).log()
        shown = [
            [k for k in (layer + (part != "residual") for layer in sink.layers) if k < n_layers]
            for sink in self.sinks
        ]
        means = [logs[row, layers].mean().exp() for row, layers in enumerate(shown)]
        return torch.stack(means) if means else torch.zeros(0)

    def __repr__(self) -> str:
        name, count = self.model.get("name", "?"), len(self.sinks)
        ratios = ", ".join(
            f"{part} {self.ratio(part).median():.2g}" for part in PARTS if len(self.sinks)
        )
        over = f": norms over an ordinary token's: {ratios}" if ratios else ""
        return f"NormProfiles({name!r}, {count} secondary sinks{over})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each part, token and layer.

        `kind` is "primary", "secondary" or "ordinary". Ordinary tokens have one row, with the
        median as `norm` and the band in `low` and `high`.
        """
        import pandas as pd

        frames = []
        for part in PARTS:
            curves = self.curves(part)
            low, median, high = curves.ordinary
            n_layers = len(median)
            lines = [("primary", self.primary_position, self.primary_token, curves.primary)]
            lines += [
                ("secondary", sink.position, sink.token, row)
                for sink, row in zip(self.sinks, curves.secondary, strict=True)
            ]
            lines.append(("ordinary", -1, "", median))
            for kind, position, token, norm in lines:
                band = (
                    (low, high) if kind == "ordinary" else (torch.full((n_layers,), torch.nan),) * 2
                )
                frames.append(
                    pd.DataFrame(
                        {
                            "part": part,
                            "kind": kind,
                            "position": position,
                            "token": token,
                            "layer": range(n_layers),
                            "norm": norm.numpy(),
                            "low": band[0].numpy(),
                            "high": band[1].numpy(),
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)


def curves_of(
    norm: Float[Tensor, "layer token"], sinks: SinkMap, chosen: Sequence[Sink]
) -> NormCurves:
    """Curves of the primary, of the chosen sinks, and of all tokens that are no sinks."""
    quantiles = torch.tensor(BAND, dtype=norm.dtype)
    return NormCurves(
        primary=norm[:, sinks.primary_position].clone(),
        secondary=norm[:, [sink.position for sink in chosen]].T.contiguous(),
        ordinary=norm[:, ordinary_positions(sinks)].quantile(quantiles, dim=1),
    )


def ordinary_positions(sinks: SinkMap) -> list[int]:
    """Tokens that are sinks in no layer; all of them but the primary where there are none left."""
    taken = {sink.position for sink in sinks.sinks} | {sinks.primary_position}
    return [t for t in range(sinks.n_tokens) if t not in taken] or [
        t for t in range(sinks.n_tokens) if t != sinks.primary_position
    ]
