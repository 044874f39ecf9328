"""The clean run of a text: what counterfactual rows are measured against.

One pass keeps, of every layer, the primary sink's residual, the common component, the median norm,
and which key each query may see. An edited token's residual is then judged exactly as detection
judged the clean one's, with the same direction, the same component and the same baselines.

It also keeps what an engine needs to run rows: `KeepText` for cached rows, `KeepMasks` for packed
ones. Either way a row is its clean token up to its first edit, and need not be computed
before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.host.sites import Site, UserHook
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.collectors import Collector, Run, SinkScores, mean_of, ordinary_tokens
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.criterion import lives
from secondary_sinks.sinks.sink_map import SinkMap


@dataclass(frozen=True)
class TokenGeometry:
    """How residuals lie to the primary's; "centered" is without the common component."""

    alignment: Float[Tensor, "*layer token"]
    """Cosine with the primary's residual."""
    centered_alignment: Float[Tensor, "*layer token"]
    norm: Float[Tensor, "*layer token"]
    centered_norm: Float[Tensor, "*layer token"]

    @classmethod
    def of(
        cls,
        residual: Float[Tensor, "*batch token d_model"],
        primary: Float[Tensor, "d_model"],
        common: Float[Tensor, "d_model"],
    ) -> TokenGeometry:
        """Measure the residuals of one layer."""
        centered = residual - common
        return cls(
            alignment=torch.cosine_similarity(residual, primary, dim=-1),
            centered_alignment=torch.cosine_similarity(centered, primary - common, dim=-1),
            norm=residual.norm(dim=-1),
            centered_norm=centered.norm(dim=-1),
        )


@dataclass(frozen=True)
class KeepText:
    """Keep what rows need that run without the text; attention is streamed."""

    positions: Iterable[int]
    """The tokens of the rows."""
    sites: Iterable[Site] = ()
    """Whose clean activations edits look at."""


@dataclass(frozen=True)
class KeepMasks:
    """Keep what rows need that run with the text: which keys each query sees. That is read from the
    attention scores, so the pass is eager."""

    begin_at: Iterable[int] = ()
    """Layers before which the whole residual stream is kept, for passes to begin there."""


@dataclass(frozen=True)
class KeptText:
    """What rows need of the clean text when they run without it, on the devices of the layers."""

    attention: tuple[AttentionColumns, ...]
    """Of every layer, with `inputs` and `log_sum_exp`."""
    residual: tuple[Float[Tensor, "kept d_model"], ...]
    """Before every layer, of the tokens that rows are of."""
    kept: dict[int, int]
    """Index of those tokens in `residual`."""
    activations: dict[Site, Float[Tensor, "token *shape"]]
    """At the sites that edits look at."""
    last: tuple[Float[Tensor, "d_model"], ...]
    """The last token's residual after every layer."""

    def residual_at(
        self, positions: Int[Tensor, "row"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """The residual before a layer of the tokens at some positions."""
        return self.residual[layer][[self.kept[position] for position in positions.tolist()]]


@dataclass(frozen=True)
class CleanRun:
    """One text as the model runs it without interventions."""

    tokens: Int[Tensor, "token"]
    sinks: SinkMap
    score: Float[Tensor, "layer head token"]
    primary: Float[Tensor, "layer d_model"]
    """The primary sink's residual."""
    common: Float[Tensor, "layer d_model"]
    """The common component."""
    geometry: TokenGeometry
    """Every token's residual, as rows are measured."""
    median_centered_norm: Float[Tensor, "layer"]
    ordinary: Bool[Tensor, "token"]
    """Tokens that are no sinks."""
    baseline: AttentionBaseline
    visible: tuple[Bool[Tensor, "query key"], ...] = ()
    """Which keys a query sees, once for each kind of layer (full, sliding window), if kept."""
    kind_of_layer: tuple[int, ...] = ()
    """Index into `visible` of every layer."""
    residual_before: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)
    """The residual stream before the layers where a pass may begin, on the model's device."""
    kept: KeptText | None = None
    """What cached rows run over, if kept."""
    begin_by: int | None = None
    """A layer at which passes with rows begin at the latest; None: at their first edit."""

    @property
    def shows_scores(self) -> bool:
        """Whether the hook of the scores shows scores.

        In some architectures it fires after the softmax, with the weights, and nothing is hidden
        there; then `visible` says nothing and the scores cannot be edited.
        """
        return bool(self.visible) and all(bool((~kind[0, 1:]).all()) for kind in self.visible)

    @classmethod
    def of(
        cls,
        model: Any,
        sinks: SinkMap,
        *,
        fwd_hooks: Sequence[UserHook] = (),
        keep: KeepText | KeepMasks | None = None,
    ) -> CleanRun:
        """Run the tokens of a sink map once more and keep what is needed of them.

        Args:
            model: any TransformerLens model.
            sinks: the sink map of the text.
            fwd_hooks: hooks of the user's own.
            keep: what to keep for rows.

        Raises:
            ModelError: see `trace`; with `KeepText`, also if attention cannot be streamed.
        """
        tokens = sinks.tokens
        collectors: list[Collector] = [
            _Anchors(sinks.primary_position),
            SinkScores(min_queries=1, name="score"),
        ]
        if isinstance(keep, KeepMasks):
            collectors += [_Visible(), _Residuals(keep.begin_at)]
        elif keep is not None:
            collectors += [_Text(keep)]
        found = cast(
            Trace,
            trace(
                model,
                cast(Tensor, tokens),
                collectors,
                fwd_hooks=fwd_hooks,
                attention="streaming" if isinstance(keep, KeepText) else "auto",
            ),
        )
        of_rows: dict[str, Any] = {}
        if isinstance(keep, KeepMasks):
            visible, kind_of_layer = found["_Visible"]
            of_rows = {"visible": visible, "kind_of_layer": kind_of_layer}
            of_rows["residual_before"] = found["_Residuals"]
        elif keep is not None:
            of_rows = {"kept": found["_Text"]}
        primary, common, median, *geometry = found["_Anchors"]
        ordinary = torch.ones(len(found.tokens), dtype=torch.bool)
        ordinary[[sink.position for sink in sinks.sinks] or [sinks.primary_position]] = False
        ordinary[sinks.primary_position] = False
        baseline = AttentionBaseline.of(
            found["score"],
            sinks.primary_position,
            ordinary=ordinary,
            min_queries=int(sinks.thresholds["min_queries"]),
        )
        return cls(
            tokens=found.tokens,
            sinks=sinks,
            score=found["score"],
            primary=primary,
            common=common,
            geometry=TokenGeometry(*geometry),
            median_centered_norm=median,
            ordinary=ordinary,
            baseline=baseline,
            **of_rows,
        )

    def latest_begin(self, rows: Iterable[Row]) -> int:
        """The last layer at which a pass over these rows may begin."""
        first_edit = min(row[0].layer for row in rows)
        return first_edit if self.begin_by is None else min(first_edit, self.begin_by)

    def judge(
        self,
        centered_alignment: Float[Tensor, "row layer"],
        centered_norm: Float[Tensor, "row layer"],
        score: Float[Tensor, "row layer head"],
        positions: Sequence[int],
    ) -> Bool[Tensor, "row layer"]:
        """In which layers each row is a sink, by the evidence criterion.

        `score` holds NaN in layers where it was not measured; those say nothing.
        """
        thresholds = self.sinks.thresholds
        ratio = centered_norm / self.median_centered_norm
        aligned = (centered_alignment >= thresholds["min_alignment"]) & (
            ratio >= thresholds["min_norm_ratio"]
        )
        attention = self.baseline.ratio(score.permute(1, 2, 0), torch.tensor(list(positions)))
        is_sink = torch.zeros_like(aligned)
        for row, position in enumerate(positions):
            for start, end in self.sinks.phases:
                for life in lives(aligned[row, start:end], offset=start):
                    shown = [layer + 1 for layer in life if layer + 1 < aligned.shape[1]]
                    seen = attention[shown, row].nanmean() if shown else torch.tensor(torch.nan)
                    unseen = position == len(self.tokens) - 1
                    if unseen or seen >= thresholds["min_attention_ratio"]:
                        is_sink[row, list(life)] = True
        return is_sink


class _Text(Collector):
    """A `KeptText`."""

    attention = ColumnRequest(log_sum_exp=True, inputs=True)

    def __init__(self, keep: KeepText):
        self._sites = frozenset(keep.sites)
        self._positions = sorted(set(keep.positions))
        own = ("resid_pre", "resid_post", ATTENTION)
        self.sites = (*own, *sorted({site.name for site in self._sites} - set(own)))

    def start(self, run: Run) -> None:
        # The last token is run with every pass of rows.
        self._positions = sorted({*self._positions, run.n_tokens - 1})
        self._attention: list[AttentionColumns] = []
        self._residual: list[Tensor] = []
        self._last: list[Tensor] = []
        self._activations: dict[Site, Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Any) -> None:
        if site == ATTENTION:
            self._attention.append(activation)
            return
        if site == "resid_pre":
            self._residual.append(activation[self._positions])
        if site == "resid_post":
            self._last.append(activation[-1].clone())
        if Site(site, layer) in self._sites:
            self._activations[Site(site, layer)] = activation.clone()

    def result(self) -> KeptText:
        return KeptText(
            attention=tuple(self._attention),
            residual=tuple(self._residual),
            kept={position: index for index, position in enumerate(self._positions)},
            activations=self._activations,
            last=tuple(self._last),
        )


class _Residuals(Collector):
    """The residual stream before some layers."""

    sites = ("resid_pre",)

    def __init__(self, layers: Iterable[int]):
        self._layers = frozenset(layers)

    def start(self, run: Run) -> None:
        self._found: dict[int, Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        if layer is not None and layer in self._layers:
            self._found[layer] = activation.clone()

    def result(self) -> dict[int, Tensor]:
        return self._found


class _Anchors(Collector):
    """Primary residual and common component of each layer, [layer, d_model] each, the median
    centered norm, and the parts of a `TokenGeometry`."""

    sites = ("resid_post",)

    def __init__(self, position: int):
        self.position = position

    def start(self, run: Run) -> None:
        self._found: list[tuple[Tensor, ...]] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        residual = activation.float()
        ordinary = ordinary_tokens(residual)
        common = mean_of(residual, ordinary)
        primary = residual[self.position]
        geometry = TokenGeometry.of(residual, primary, common)
        median = geometry.centered_norm[ordinary].median()
        kept = (primary, common, median, *vars(geometry).values())
        self._found.append(tuple(value.cpu() for value in kept))

    def result(self) -> tuple[Tensor, ...]:
        return tuple(torch.stack(parts) for parts in zip(*self._found, strict=True))


class _Visible(Collector):
    """Which keys each query may see, stored once for each kind of layer."""

    sites = ("attn_scores",)

    def start(self, run: Run) -> None:
        self._kinds: list[Tensor] = []
        self._of_layer: list[int] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        # Hidden keys have the most negative number of the dtype, or minus infinity. Every head
        # sees the same, so the first is asked.
        hidden = 0.9 * max(torch.finfo(activation.dtype).min, -1e30)
        visible = (activation[0] > hidden).cpu()
        for index, known in enumerate(self._kinds):
            if torch.equal(known, visible):
                self._of_layer.append(index)
                return
        self._of_layer.append(len(self._kinds))
        self._kinds.append(visible)

    def result(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return tuple(self._kinds), tuple(self._of_layer)
