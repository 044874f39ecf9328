"""The clean run of a text: what counterfactual rows are measured against.

One pass keeps, of every layer, the primary sink's residual, the common component, the median norm,
and which key each query may see. An edited token's residual is then judged exactly as detection
judged the clean one's, with the same direction, the same component and the same baselines.

It also keeps the whole residual stream before a few layers, those where passes with rows may begin:
a row is its clean token up to its first edit, and need not be computed before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.explain.attention import AttentionBaseline
from secondary_sinks.explain.evidence import lives
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.models.host import UserHook
from secondary_sinks.observe.collectors import Collector, Run, SinkScores, mean_of, ordinary_tokens
from secondary_sinks.observe.trace import Trace, trace


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
    visible: tuple[Bool[Tensor, "query key"], ...]
    """Which keys a query sees, once for each kind of layer (full, sliding window); empty where
    rows were not asked for."""
    kind_of_layer: tuple[int, ...]
    """Index into `visible` of every layer."""
    residual_before: dict[int, Float[Tensor, "token d_model"]]
    """The residual stream before the layers where a pass may begin, on the model's device."""

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
        begin_at: Iterable[int] = (),
        for_rows: bool = True,
    ) -> CleanRun:
        """Run the tokens of a sink map once more and keep what is needed of them.

        Args:
            model: any TransformerLens model.
            sinks: the sink map of the text.
            fwd_hooks: hooks of the user's own.
            begin_at: layers before which the residual stream is kept.
            for_rows: note which keys each query sees, as packed rows need. That is read from the
                attention scores, so the pass is eager; without, a long text's is streamed.
        """
        tokens = sinks.tokens
        collectors: list[Collector] = [
            _Anchors(sinks.primary_position),
            _Residuals(begin_at),
            SinkScores(min_queries=1, name="score"),
        ]
        collectors += [_Visible()] if for_rows else []
        found = cast(Trace, trace(model, cast(Tensor, tokens), collectors, fwd_hooks=fwd_hooks))
        primary, common, median, *geometry = found["_Anchors"]
        visible, kind_of_layer = found["_Visible"] if for_rows else ((), ())
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
            visible=visible,
            kind_of_layer=kind_of_layer,
            residual_before=found["_Residuals"],
        )

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
