"""Which tokens of a text are sinks, primary or secondary, from which layer, for how long?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

from jaxtyping import Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.text_input import Message, Text, bos_of
from secondary_sinks.observe.attention_collectors import SinkScores, Visibility
from secondary_sinks.observe.attention_path import AttentionChoice
from secondary_sinks.observe.collectors import Collector
from secondary_sinks.observe.residual_geometry import ResidualGeometry
from secondary_sinks.observe.steady_attention import SteadyAttention
from secondary_sinks.observe.trace import Trace, TraceOptions, trace
from secondary_sinks.sinks import primary as evidence_criterion
from secondary_sinks.sinks import published_criterion
from secondary_sinks.sinks.criterion import check_thresholds
from secondary_sinks.sinks.measurements import Measurements
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    from typing_extensions import Unpack

CriterionName = Literal["evidence", "published"]

PREFIX = 4
"""How many positions are the beginning of a text: one of them is the primary sink."""


class DetectOptions(TraceOptions, total=False):
    """The keyword arguments of `detect_sinks`."""

    criterion: CriterionName
    primary: int | None
    min_alignment: float
    min_norm_ratio: float
    min_attention_ratio: float
    min_strength: float
    min_lifetime: int
    min_primary_ratio: float
    min_queries: int


@overload
def detect_sinks(
    model: Model, text: str | list[Message], **options: Unpack[DetectOptions]
) -> SinkMap: ...
@overload
def detect_sinks(
    model: Model,
    text: list[str] | list[list[Message]] | list[Tensor],
    **options: Unpack[DetectOptions],
) -> list[SinkMap]: ...
@overload
def detect_sinks(
    model: Model, text: Text, **options: Unpack[DetectOptions]
) -> SinkMap | list[SinkMap]: ...
def detect_sinks(
    model: Model,
    text: Text,
    *,
    criterion: CriterionName = "evidence",
    chat: bool = False,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    attention_mask: Int[Tensor, " batch token"] | None = None,
    primary: int | None = None,
    batch_size: int = 1,
    fwd_hooks: Sequence[UserHook] = (),
    attention: AttentionChoice = "auto",
    progress: bool | None = None,
    **thresholds: float,
) -> SinkMap | list[SinkMap]:
    """Which tokens are attention sinks, primary or secondary, from which layer, for how long?

    >>> sink_map = ss.detect_sinks(model, "Once upon a time ...")
    >>> sink_map.secondary
    >>> sink_map.plot()

    One forward pass for each batch of texts. `criterion="evidence"` asks for alignment with the
    primary sink (without the component that all tokens share), for magnitude, and for attention
    actually drawn; see `sinks.criterion`. `criterion="published"` is the detector of the paper
    (arXiv 2512.22213), bit for bit, which asks for alignment alone; `sinks.published_criterion`
    says where it goes wrong.

    Not evidence for: that the model needs the sink, or which module wrote it.

    Args:
        model: any TransformerLens model, with its own hooks or without.
        text: a string, a list of strings, a conversation, token ids, or a list of token tensors.
        criterion: which definition of a sink.
        chat: wrap each string in the model's chat template.
        prepend_bos: None keeps the tokenizer's own convention.
        max_tokens: cut each text after this many tokens.
        attention_mask: marks the padding of a padded token tensor.
        primary: position of the primary sink; by default the one of the first 4 positions that
            becomes a sink first, of those whose residuals grow about as large as the largest.
        batch_size: texts in one forward pass.
        fwd_hooks: `(hook name, function)` pairs in force in these passes; an analysis of the map
            needs the same ones.
        attention: "streaming" holds no pattern, so that texts of many thousand tokens fit; "eager"
            is TransformerLens' own way; "auto" takes the better. See `trace`.
        progress: show a progress bar; None shows one for several texts.
        **thresholds: of the evidence criterion, see `secondary_sinks.sinks.criterion.DEFAULTS`.

    Returns:
        A `SinkMap` for one text, a list of them, in order, for several.

    Raises:
        InputError: unusable text or thresholds.
        ModelError: a model whose activations cannot be measured; see `trace`.
    """
    if criterion not in ("evidence", "published"):
        raise InputError(f"no criterion {criterion!r}; use 'evidence' or 'published'")
    if criterion == "published" and thresholds:
        raise InputError(f"criterion='published' has no threshold {sorted(thresholds)[0]!r}")
    checked = check_thresholds(thresholds) if criterion == "evidence" else {}
    if primary is not None:
        if isinstance(primary, bool) or int(primary) != primary:
            raise InputError(f"primary must be the position of a token, got {primary!r}")
        primary = int(primary)
    collectors: list[Collector] = [
        _geometry(criterion, primary),
        # Every token that has a later query is judged; what is shown is hidden below min_queries.
        SinkScores(min_queries=1, name="score"),
        SteadyAttention(name="steady"),
        Visibility(name="visible"),
    ]
    traces = trace(
        model,
        text,
        collectors,
        chat=chat,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
        attention_mask=attention_mask,
        batch_size=batch_size,
        fwd_hooks=fwd_hooks,
        attention=attention,
        progress=progress,
    )
    bos = bos_of(model)
    if isinstance(traces, Trace):
        return _sink_map(traces, criterion, primary, checked, bos)
    return [_sink_map(one, criterion, primary, checked, bos) for one in traces]


def _geometry(criterion: CriterionName, primary: int | None) -> ResidualGeometry:
    candidates = tuple(range(PREFIX)) if primary is None else (primary,)
    return ResidualGeometry(candidates, final_norm=criterion == "published", name="geometry")


def _sink_map(
    trace_result: Trace,
    criterion: CriterionName,
    primary: int | None,
    thresholds: dict[str, float | int],
    bos: int | None,
) -> SinkMap:
    geometry, visible = trace_result["geometry"], trace_result["visible"]
    tokens = trace_result.tokens
    documents = [] if bos is None else (tokens == bos).nonzero().flatten().tolist()
    measured = Measurements(
        tokens=tuple(tokens.tolist()),
        token_strings=trace_result.token_strings,
        geometry=geometry,
        score=trace_result["score"],
        visible=visible,
        beginnings=frozenset([*range(min(PREFIX, len(tokens))), *documents]),
    )
    if criterion == "published":
        detection = published_criterion.detect(measured, chat=trace_result.chat, primary=primary)
    else:
        detection = evidence_criterion.detect(measured, primary=primary, thresholds=thresholds)
    index = detection.primary
    return SinkMap(
        tokens=tokens,
        token_strings=trace_result.token_strings,
        n_tokens=len(tokens),
        provenance=trace_result.provenance.extended(thresholds=thresholds),
        criterion=criterion,
        primary_position=geometry.candidates[index],
        phases=detection.phases,
        sinks=detection.sinks,
        undecided=detection.undecided,
        judge=detection.criterion,
        primary_residual=geometry.residual[index],
        common_residual=geometry.common,
        persistence=geometry.persistence[index],
        alignment=geometry.alignment[index],
        centered_alignment=geometry.centered_alignment[index],
        norm=geometry.norm,
        centered_norm=geometry.centered_norm,
        background_norm=geometry.background_norm,
        background_centered_norm=geometry.background_centered_norm,
        share_alike=geometry.share_alike,
        mean_attention=measured.score,
        n_seeing=visible.n_seeing,
        uniform_attention=visible.uniform,
        steady_attention=trace_result["steady"],
        attention_ratio=detection.attention_ratio,
        strength=detection.strength,
        beginnings=tuple(sorted(measured.beginnings)),
        notes=(*_notes(trace_result, detection.phases), *detection.notes),
    )


def _notes(trace_result: Trace, phases: tuple[tuple[int, int], ...]) -> Iterator[str]:
    model = trace_result.provenance.model
    if model.is_processed:
        yield (
            f"weights are not raw ({'; '.join(model.processing)}): norms and cosines differ from "
            "those of the original model"
        )
    if not phases and not trace_result["geometry"].share_alike.any():
        yield (
            "no primary sink: no token at the beginning is massive, keeps its direction and draws "
            f"attention. The text begins with {trace_result.token_strings[0]!r}; if the model was "
            "not trained with that token in front, pass prepend_bos=False (or True, if it was). If "
            "the primary is elsewhere, name its position with primary="
        )
