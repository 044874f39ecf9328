"""The sinks of one text in one model, with everything that was measured to find them."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.criterion import DEFAULTS, Criterion, next_layer, norm_ratio
from secondary_sinks.sinks.sink import Sink

if TYPE_CHECKING:
    import pandas as pd

SinkChoice: TypeAlias = "Literal['secondary', 'primary', 'all'] | Sink | int | Sequence[Sink | int]"
"""Which tokens an analysis is about; see `SinkMap.select`."""

ArrayName: TypeAlias = Literal[
    "tokens",
    "primary_residual",
    "common_residual",
    "persistence",
    "alignment",
    "centered_alignment",
    "norm",
    "centered_norm",
    "background_norm",
    "background_centered_norm",
    "share_alike",
    "mean_attention",
    "n_seeing",
    "uniform_attention",
    "steady_attention",
    "sink_score",
    "attention_ratio",
    "strength",
]
"""The arrays of a sink map."""


@dataclass(frozen=True, eq=False)
class SinkMap(Result):
    """The sinks of one text in one model.

    Arrays are None in maps that were read from published files, which hold none. "Centered" means
    without the layer's common component, the mean residual of its background tokens
    (`observe.residual_geometry`).
    """

    tokens: Int[Tensor, " token"] | None
    token_strings: tuple[str, ...]
    n_tokens: int
    provenance: Provenance
    """The model, its weights, the software and the thresholds."""
    criterion: Literal["evidence", "published"]
    primary_position: int
    """The token whose residual defines the sink direction."""
    phases: tuple[tuple[int, int], ...]
    """Primary phases: runs [start, end) of layers in which that token is massive."""
    sinks: tuple[Sink, ...]
    undecided: tuple[Sink, ...] = ()
    """Tokens with the residual of a sink that no later query sees, as the last one of a text. They
    are not among the sinks: a longer text would decide."""
    judge: Criterion | None = None
    """The evidence criterion with the baselines of this text; it also judges counterfactual rows.
    None for the published criterion."""
    primary_residual: Float[Tensor, " layer d_model"] | None = None
    """The primary's residual."""
    common_residual: Float[Tensor, " layer d_model"] | None = None
    """The common component."""
    persistence: Float[Tensor, " layer"] | None = None
    """Cosine of the primary's centered residual with itself one layer earlier; NaN at layer 0."""
    alignment: Float[Tensor, " layer token"] | None = None
    """Cosine of each token's residual with the primary's."""
    centered_alignment: Float[Tensor, " layer token"] | None = None
    """The same, centered."""
    norm: Float[Tensor, " layer token"] | None = None
    """Residual norms."""
    centered_norm: Float[Tensor, " layer token"] | None = None
    """Norms of the centered residuals."""
    background_norm: Float[Tensor, " layer"] | None = None
    """Median residual norm of the background tokens."""
    background_centered_norm: Float[Tensor, " layer"] | None = None
    """The same, centered."""
    share_alike: Float[Tensor, " layer"] | None = None
    """Share of tokens like one of the first (`observe.residual_geometry`); 0 in most texts."""
    mean_attention: Float[Tensor, " layer head token"] | None = None
    """Mean attention from the later queries that see a token, however few; NaN where none does."""
    n_seeing: Float[Tensor, " layer token"] | None = None
    """Number of those queries."""
    uniform_attention: Float[Tensor, " layer token"] | None = None
    """What `mean_attention` would be if all queries attended uniformly to what they see."""
    steady_attention: Float[Tensor, " layer token"] | None = None
    """Attention drawn from all of the later text, over uniform attention
    (`observe.steady_attention`); `attention_check` compares the sinks with it."""
    attention_ratio: Float[Tensor, " layer token"] | None = None
    """Attention drawn over that of ordinary tokens nearby (`sinks.attention_baseline`)."""
    strength: Float[Tensor, " layer token"] | None = None
    """Attention drawn, in a unit that does not depend on the length of the text (ibid.)."""
    beginnings: tuple[int, ...] = ()
    """Positions at the beginning of the text, or of a document in it: only there is a sink that
    rises with a phase a primary one."""
    notes: tuple[str, ...] = ()
    """What a reader must know: processed weights, a text without a primary sink."""
    record: dict[str, Any] = field(default_factory=dict, repr=False)
    """Whatever else a published record holds."""

    @property
    def primary(self) -> list[Sink]:
        """Primary sinks, one entry for each life (a primary with two phases has two)."""
        return [sink for sink in self.sinks if sink.kind == "primary"]

    @property
    def secondary(self) -> list[Sink]:
        """Secondary sinks, by onset and position."""
        return [sink for sink in self.sinks if sink.kind == "secondary"]

    @property
    def model_name(self) -> str:
        """Name of the model."""
        return self.provenance.model.name

    @property
    def n_layers(self) -> int | None:
        """Depth of the model, where it is known."""
        return self.provenance.model.n_layers

    @property
    def thresholds(self) -> dict[str, float | int]:
        """What the criterion was run with."""
        return self.provenance.thresholds

    @property
    def sink_score(self) -> Float[Tensor, " layer head token"] | None:
        """`mean_attention`, NaN where fewer than `min_queries` later queries make the mean."""
        if self.mean_attention is None:
            return None
        n_seeing = self.n_seeing
        if n_seeing is None:
            n_seeing = torch.arange(self.n_tokens - 1.0, -1, -1)[None]
        few = n_seeing < int(self.thresholds.get("min_queries", DEFAULTS["min_queries"]))
        return self.mean_attention.masked_fill(few[:, None], torch.nan)

    def array(self, name: ArrayName) -> Tensor:
        """One of the arrays by its name.

        Raises:
            InputError: the map was read from a published file and holds none.
        """
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise InputError(
                f"{self!r} holds no {name}: it was read from a published file; detect the sinks of "
                "the text with detect_sinks"
            )
        return value

    def select(
        self, sinks: SinkChoice = "secondary", *, min_lifetime: int = 1, min_score: float = 0.0
    ) -> list[Sink]:
        """The sinks that an analysis is about.

        >>> remove_sinks(model, sink_map, sinks=sink_map.select(min_score=0.03))

        A position stands for all lives of the sink there. A position at which there is no sink
        stands for that token, `kind="chosen"`, measured over the layers of the most common level of
        the map's secondary sinks, or over the longest primary phase if there are none.

        Args:
            sinks: "secondary", "primary", "all", a sink, a position, or several of these two.
            min_lifetime: leave out sinks that live for fewer layers.
            min_score: leave out sinks whose mean sink score is lower.

        Raises:
            InputError: nothing is selected, a sink is not in this map, or a position is outside the
                text.
        """
        chosen = list(self._chosen(sinks))
        left = [
            sink
            for sink in dict.fromkeys(chosen)
            if sink.lifetime >= min_lifetime and not sink.sink_score < min_score
        ]
        if not left:
            named = sinks if isinstance(sinks, str) else "selected"
            kind = "sinks" if named == "all" else f"{named} sinks"
            filtered = " pass the filter" if chosen else ""
            raise InputError(
                f"no {kind} in this text{filtered} ({self!r}): see margins() for the tokens that "
                "came nearest, detect with lower thresholds, or name positions, as in sinks=[3, 7]"
            )
        return left

    def refilter(self, **thresholds: float) -> SinkMap:
        """The same map, its tokens judged with other thresholds; no pass is run.

        >>> sink_map.refilter(min_lifetime=5, min_strength=0.5).secondary

        Every threshold that is not named keeps its value in this map, and the primary stays the
        same token.

        Args:
            **thresholds: of the evidence criterion, see `secondary_sinks.sinks.criterion.DEFAULTS`.

        Raises:
            InputError: an unknown threshold, one out of range, or a map that was not made with the
                evidence criterion.
        """
        from secondary_sinks.sinks.refilter import refiltered

        return refiltered(self, thresholds)

    def _chosen(self, sinks: Any) -> Iterable[Sink]:
        if isinstance(sinks, str):
            if sinks not in ("secondary", "primary", "all"):
                raise InputError(
                    f"sinks={sinks!r}; use 'secondary', 'primary', 'all', sinks or positions"
                )
            return [sink for sink in self.sinks if sinks in ("all", sink.kind)]
        several = sinks if isinstance(sinks, Iterable) and not isinstance(sinks, Sink) else [sinks]
        return [sink for entry in several for sink in self._at(entry)]

    def _at(self, entry: Any) -> list[Sink]:
        """The sink itself, or the lives of the token at a position."""
        if isinstance(entry, Sink):
            if entry not in self.sinks and entry.kind != "chosen":
                raise InputError(f"{entry!r} is not a sink of this map ({self!r})")
            return [entry]
        try:
            position = operator.index(entry)
        except TypeError:
            position = -1
        if isinstance(entry, bool) or not 0 <= position < self.n_tokens:
            raise InputError(
                f"sinks contains {entry!r}; a position is an integer from 0 to {self.n_tokens - 1}"
            )
        at_position = [sink for sink in self.sinks if sink.position == position]
        return at_position or [self._as_chosen(position)]

    def _as_chosen(self, position: int) -> Sink:
        levels = Counter(sink.layers for sink in self.secondary)
        if levels:
            layers = levels.most_common(1)[0][0]
        elif self.phases:
            layers = tuple(range(*max(self.phases, key=lambda phase: phase[1] - phase[0])))
        else:
            raise InputError(
                f"position {position} is not a sink, and the text has no primary sink whose "
                "direction it could be measured along"
            )
        token_id = -1 if self.tokens is None else int(self.tokens[position])
        return Sink(position, self.token_strings[position], token_id, "chosen", layers)

    def __repr__(self) -> str:
        phases = " and ".join(f"{start}-{end - 1}" for start, end in self.phases) or "none"
        processed = ", processed weights" if self.provenance.model.processing else ""
        n_secondary = counted(len(self.secondary), "secondary sink")
        if self.undecided:
            n_secondary += f", {len({sink.position for sink in self.undecided})} undecided"
        return (
            f"SinkMap({self.model_name!r}, {self.n_tokens} tokens: {n_secondary}, "
            f"primary at {self.primary_position} in layers {phases}{processed})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each sink: who, when, how strong."""
        import pandas as pd

        rows = [
            {
                "position": sink.position,
                "token": sink.token,
                "token_id": sink.token_id,
                "kind": sink.kind,
                "onset": sink.l_start,
                "lifetime": sink.lifetime,
                "last_layer": sink.layers[-1],
                "norm": sink.norm,
                "norm_ratio": sink.evidence.norm_ratio[0] if sink.evidence else math.nan,
                "alignment": _mean(sink.evidence.alignment) if sink.evidence else math.nan,
                "sink_score": sink.sink_score,
                "attention_ratio": sink.evidence.attention_ratio if sink.evidence else math.nan,
                "strength": sink.strength,
                "delay": sink.evidence.delay if sink.evidence else -1,
                "published_kind": sink.evidence.published_kind if sink.evidence else sink.kind,
                "n_queries": sink.evidence.n_queries if sink.evidence else -1,
            }
            for sink in self.sinks
        ]
        columns = (
            "position token token_id kind onset lifetime last_layer norm norm_ratio alignment "
            "sink_score attention_ratio strength delay published_kind n_queries"
        )
        return pd.DataFrame(rows, columns=columns.split())

    def margins(self, n: int | None = 10) -> pd.DataFrame:
        """The tokens that came nearest to being called sinks and were not, nearest first.

        For every other token: the layer in which it came nearest, its four measures there, each
        divided by its threshold (1 or more passes), and the test that it failed most clearly.
        `closeness` is the smallest of the four. It says how the result depends on the thresholds:
        a closeness near 1 is a token on the border, and "no secondary sinks" with nothing above 0.3
        is a clear answer. Attention is taken layer by layer here and over a whole life in the
        detection, and a life has `min_lifetime` layers at least, so a token with a closeness of 1
        may still not be a sink.

        Raises:
            InputError: the map holds no measurements (it was read from a published file) or was
                made with the published criterion, which looks at alignment alone.
        """
        if self.criterion != "evidence" or self.centered_alignment is None:
            raise InputError("margins exist only in maps made with criterion='evidence'")
        return _margins(self, n)


def _margins(sink_map: SinkMap, n: int | None) -> pd.DataFrame:
    import pandas as pd

    thresholds = sink_map.thresholds
    passed = torch.stack(
        [
            sink_map.array("centered_alignment") / thresholds["min_alignment"],
            norm_ratio(sink_map.array("centered_norm"), sink_map.array("background_centered_norm"))
            / thresholds["min_norm_ratio"],
            _shown(sink_map, "attention_ratio") / thresholds["min_attention_ratio"],
            _shown(sink_map, "strength") / thresholds["min_strength"],
        ]
    )  # [test, layer, token]
    inside = torch.zeros(passed.shape[1], dtype=torch.bool)
    for start, end in sink_map.phases or ((0, passed.shape[1]),):
        inside[start:end] = True
    closeness = passed.nan_to_num(nan=0.0).amin(dim=0)
    closeness[~inside] = -torch.inf
    nearest, layer = closeness.max(dim=0)
    called = {sink.position for sink in sink_map.sinks} | {sink_map.primary_position}
    tests = ("alignment", "magnitude", "attention", "strength")
    rows = []
    for token in nearest.argsort(descending=True).tolist():
        if token in called:
            continue
        values = passed[:, layer[token], token]
        rows.append(
            {
                "position": token,
                "token": sink_map.token_strings[token],
                "layer": int(layer[token]),
                "alignment": float(values[0]),
                "magnitude": float(values[1]),
                "attention": float(values[2]),
                "strength": float(values[3]),
                "closeness": float(nearest[token]),
                "failed": tests[int(values.nan_to_num(nan=0.0).argmin())],
            }
        )
        if n is not None and len(rows) == n:
            break
    columns = ["position", "token", "layer", *tests, "closeness", "failed"]
    return pd.DataFrame(rows, columns=columns)


def _shown(sink_map: SinkMap, name: ArrayName) -> Float[Tensor, " layer token"]:
    """An array with, for each layer, what the next block with attention shows."""
    has_attention = ~sink_map.array("uniform_attention").isnan().all(dim=1)
    return next_layer(sink_map.array(name), has_attention)


def _mean(values: tuple[float, ...]) -> float:
    return float(torch.tensor(values).mean())
