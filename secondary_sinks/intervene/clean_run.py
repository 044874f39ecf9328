"""The clean run of a text: what counterfactual rows are compared with and computed from.

The sink map of the text holds the sink direction, the common component and the criterion with its
baselines, so an edited token is measured and judged exactly as the clean one was. Engines need more
of the text: cached rows its queries, keys and values (`KeepText`), packed rows its attention masks
(`KeepMasks`). One pass over the text keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.host.visible_keys import is_visible
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.observe.attention_columns import ATTENTION, AttentionColumns, ColumnRequest
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.residual_geometry import TokenGeometry
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.sinks.controls import ordinary_tokens
from secondary_sinks.sinks.criterion import Criterion
from secondary_sinks.sinks.sink_map import SinkMap

MAX_RESIDUALS = 8
"""Largest number of layers before which the whole residual stream is kept."""


@dataclass(frozen=True)
class KeepText:
    """Keep what rows need that run without the text; the attention of the pass is streamed."""

    positions: Iterable[int]
    """The tokens of the rows."""
    sites: Iterable[Site] = ()
    """Where edits use other tokens' activations."""


@dataclass(frozen=True)
class KeepMasks:
    """Keep which keys each query sees, for rows that run with the text. It is read from the
    attention scores, so the pass is eager."""

    begin_at: Iterable[int] = ()
    """Layers before which the whole residual stream is kept, for passes to begin there; of more
    than `MAX_RESIDUALS`, evenly spaced ones."""


@dataclass(frozen=True)
class KeptText:
    """What rows need of the clean text when they run without it, on the devices of the layers."""

    attention: tuple[AttentionColumns, ...]
    """Of every layer, with `inputs` and `log_sum_exp`."""
    residual: tuple[Float[Tensor, " kept d_model"], ...]
    """Before every layer, of the rows' tokens."""
    index_of: dict[int, int]
    """Index in `residual` of each of these tokens, by position."""
    activations: dict[Site, Float[Tensor, " token *shape"]]
    """At the sites where edits use other tokens' activations."""
    last: tuple[Float[Tensor, " d_model"], ...]
    """The last token's residual after every layer."""

    def residual_at(
        self, positions: Int[Tensor, " row"], layer: int
    ) -> Float[Tensor, " row d_model"]:
        """The residual before a layer of the tokens at some positions."""
        return self.residual[layer][[self.index_of[position] for position in positions.tolist()]]


@dataclass(frozen=True)
class CleanRun:
    """One text as the model runs it without interventions."""

    sink_map: SinkMap
    visible: tuple[Bool[Tensor, " query key"], ...] = ()
    """Which keys a query sees, once for each kind of layer (full, sliding window), if kept."""
    kind_of_layer: tuple[int, ...] = ()
    """Index into `visible` of every layer."""
    residual_before: dict[int, Float[Tensor, " token d_model"]] = field(default_factory=dict)
    """The residual stream before the layers where a pass may begin, on the layers' devices."""
    kept: KeptText | None = None
    """What cached rows run over, if kept."""
    begin_by: int | None = None
    """The last layer at which passes with rows may begin; None: at their first edit."""

    @classmethod
    def of(
        cls,
        model: Any,
        sink_map: SinkMap,
        *,
        fwd_hooks: Sequence[UserHook] = (),
        keep: KeepText | KeepMasks | None = None,
    ) -> CleanRun:
        """Run the tokens of a sink map once more, if an engine needs something kept of them.

        Args:
            model: any TransformerLens model.
            sink_map: the sink map of the text.
            fwd_hooks: the hooks with which the map was made.
            keep: what to keep for rows.

        Raises:
            ModelError: see `trace`; with `KeepText`, also if attention cannot be streamed.
        """
        if keep is None:
            return cls(sink_map)
        with_text = isinstance(keep, KeepText)
        collectors: list[Collector] = (
            [_Text(keep)] if isinstance(keep, KeepText) else [_Visible(), _Residuals(keep.begin_at)]
        )
        result = trace(
            model,
            sink_map.array("tokens"),
            collectors,
            fwd_hooks=fwd_hooks,
            attention="streaming" if with_text else "auto",
        )
        kept = cast(Trace, result)
        if with_text:
            return cls(sink_map, kept=kept["_Text"])
        visible, kind_of_layer = kept["_Visible"]
        return cls(sink_map, visible, kind_of_layer, kept["_Residuals"])

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """Token ids."""
        return self.sink_map.array("tokens")

    @property
    def n_layers(self) -> int:
        """Depth of the model."""
        return len(self.primary)

    @property
    def primary(self) -> Float[Tensor, " layer d_model"]:
        """The primary sink's residual."""
        return self.sink_map.array("primary_residual")

    @property
    def common(self) -> Float[Tensor, " layer d_model"]:
        """The common component."""
        return self.sink_map.array("common_residual")

    @property
    def score(self) -> Float[Tensor, " layer head token"]:
        """Mean attention from the later queries that see each token."""
        return self.sink_map.array("mean_attention")

    @property
    def judge(self) -> Criterion:
        """The criterion, with the baselines of this text."""
        if self.sink_map.judge is None:
            raise InputError(f"{self.sink_map!r} holds no baselines to judge edited tokens by")
        return self.sink_map.judge

    @property
    def geometry(self) -> TokenGeometry:
        """Every token's residual, as rows are measured."""
        return TokenGeometry(
            alignment=self.sink_map.array("alignment"),
            centered_alignment=self.sink_map.array("centered_alignment"),
            norm=self.sink_map.array("norm"),
            centered_norm=self.sink_map.array("centered_norm"),
        )

    @cached_property
    def ordinary(self) -> Bool[Tensor, " token"]:
        """See `sinks.controls.ordinary_tokens`."""
        return ordinary_tokens(self.sink_map)

    @property
    def shows_scores(self) -> bool:
        """Whether the hook of the attention scores shows scores.

        In some architectures it fires after the softmax, with the weights, where no key is marked
        as hidden; then `visible` is wrong and the scores cannot be edited.
        """
        return bool(self.visible) and all(bool((~kind[0, 1:]).all()) for kind in self.visible)

    def latest_begin(self, rows: Iterable[Row]) -> int:
        """The last layer at which a pass over these rows may begin."""
        first_edit = min(row[0].layer for row in rows)
        return first_edit if self.begin_by is None else min(first_edit, self.begin_by)


class _Text(Collector):
    """A `KeptText`."""

    attention = ColumnRequest(log_sum_exp=True, inputs=True)

    def __init__(self, keep: KeepText):
        self._sites = frozenset(keep.sites)
        self._positions = set(keep.positions)
        always = ("resid_pre", "resid_post", ATTENTION)
        self.sites = (*always, *sorted({site.name for site in self._sites} - set(always)))

    def start(self, run: Run) -> None:
        # The last token is run with every pass of rows.
        self._kept = sorted({*self._positions, run.n_tokens - 1})
        self._attention: list[AttentionColumns] = []
        self._residual: list[Tensor] = []
        self._last: list[Tensor] = []
        self._activations: dict[Site, Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Any) -> None:
        if site == ATTENTION:
            self._attention.append(activation)
            return
        if site == "resid_pre":
            self._residual.append(activation[self._kept])
        if site == "resid_post":
            self._last.append(activation[-1].clone())
        if Site(site, layer) in self._sites:
            self._activations[Site(site, layer)] = activation.clone()

    def result(self) -> KeptText:
        return KeptText(
            attention=tuple(self._attention),
            residual=tuple(self._residual),
            index_of={position: index for index, position in enumerate(self._kept)},
            activations=self._activations,
            last=tuple(self._last),
        )


class _Residuals(Collector):
    """The residual stream before some layers."""

    sites = ("resid_pre",)

    def __init__(self, layers: Iterable[int]):
        later = sorted(set(layers) - {0})  # before the first block the pass begins anyway
        self._layers = frozenset(later[:: -(-len(later) // MAX_RESIDUALS) or 1])

    def start(self, run: Run) -> None:
        self._residuals: dict[int, Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        if layer is not None and layer in self._layers:
            self._residuals[layer] = activation.clone()

    def result(self) -> dict[int, Tensor]:
        return self._residuals


class _Visible(Collector):
    """Which keys each query sees, stored once for each kind of layer."""

    sites = ("attn_scores",)

    def start(self, run: Run) -> None:
        self._kinds: list[Tensor] = []
        self._kind_of_layer: list[int] = []

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        # All heads see the same keys, so one is read.
        visible = is_visible(activation[0]).cpu()
        kinds = enumerate(self._kinds)
        kind = next((index for index, known in kinds if torch.equal(known, visible)), None)
        if kind is None:
            kind = len(self._kinds)
            self._kinds.append(visible)
        self._kind_of_layer.append(kind)

    def result(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return tuple(self._kinds), tuple(self._kind_of_layer)
