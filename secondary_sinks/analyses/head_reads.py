"""Which attention heads look at sinks, and what makes their logits large?

The weight that a query gives a key follows from a logit, `scale * q . k`. Why is the logit of a
sink's key large? Two answers, both exact:

* as a product: norm of the key, norm of the query, cosine between them;
* as a sum, with `R` the rotary embedding (which turns a vector by its position) and `b` the biases
  of queries and keys, `q = u + b_q` and `k = w + b_k`:

      content      u . w                       what query and key say, at any position
      rotation     R u . R w  -  u . w         what their distance changes in it
      query bias   R b_q . R w                 what every query adds for this key
      key bias     R u . R b_k                 what this query adds for every key at that distance
      distance     R b_q . R b_k               a function of the distance alone
      cap          cap * tanh(s / cap) - s     where logits are capped (Gemma 2)

The softmax depends on differences only, so a part counts as far as it differs from that of
ordinary keys seen by about the same queries; both are given.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.queries_keys import (
    QueryKeyPlan,
    by_query_head,
    query_key_biases,
    query_key_plan,
)
from secondary_sinks.host.sites import need_attention_everywhere
from secondary_sinks.host.visible_keys import is_visible
from secondary_sinks.observe.attention_columns import ATTENTION
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.controls import matched_controls, ordinary_tokens
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Kind, Sink
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap

if TYPE_CHECKING:
    import pandas as pd

Role = Literal["none", "primary", "secondary", "both"]

PARTS = ("content", "rotation", "query_bias", "key_bias", "distance", "cap")
"""The parts of a logit, in the order in which they are drawn."""

FACTORS = ("logit", *PARTS, "key_norm", "query_norm", "cosine", "value_norm")
"""The fields of `Logits`."""

MIN_UNIFORM = 4.0
"""A head reads a kind of sink only if it gives them this many times the attention that uniform
attention would, which matters where there are many of them."""

MOST = 0.5
"""A query spends most of its attention on sinks from this share on; and what it reads is small
below this share of an ordinary value's norm."""

DORMANT = 0.5
"""A head is dormant if at least this share of its queries is."""


def head_reads(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    min_score: float = 0.1,
    n_matched: int = 8,
    seed: int = 0,
    fwd_hooks: Sequence[UserHook] = (),
) -> HeadReads:
    """Which heads look at the sinks, and what are their logits made of?

    For every layer, head and sink: the mean logit of the later queries that see the sink's key,
    its factors (norms of key and query, cosine) and its parts (content, rotary rotation, biases,
    cap; defined in `analyses.head_reads`), and the same for ordinary keys nearby. The parts are
    compared with the logits that the model itself used, pair by pair. From the same pass, for
    every head: the attention that sinks draw, the entropy of the attention, and whether the head
    is *dormant*, that is, whether most of its attention falls on sinks whose values are small
    (compare arXiv 2410.13835).

    >>> heads = head_reads(model, sink_map)
    >>> heads.to_frame().query("role == 'both'")
    >>> heads.plot()

    Not evidence for: what a head does with what it reads (a role says where it looks); that a head
    which is dormant on this text is useless; or that a large part draws attention if all keys have
    it, so compare it with that of ordinary keys.

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sinks: the secondary sinks to look at (`SinkMap.select`); the primary is always added. A
            token that is not a sink gets logits, and counts for no role.
        min_score: a head reads a kind of sink from this sink score on (summed over the sinks of
            that kind), if it is also four times that of uniform attention.
        n_matched: how many ordinary keys each sink is compared with.
        seed: of the choice of these keys.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Returns:
        `HeadReads`: logits as [sink, layer, head], statistics of heads as [layer, head].

    Raises:
        InputError: nothing is selected, or a sink map that does not belong to this model.
        ModelError: the parts of a logit do not add up to the model's own.
    """
    if n_matched < 1:
        raise InputError(f"n_matched is {n_matched}; it must be 1 or more")
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    need_attention_everywhere(model, "head_reads")
    chosen = [*sink_map.primary, *sink_map.select(sinks)]
    read = _read_sinks(sink_map, chosen, n_matched, seed)
    plan = query_key_plan(model)
    collector = _Reads(model, sink_map, read, plan)
    tokens = sink_map.array("tokens")
    reads: _Reads = trace_tokens(model, tokens, [collector], fwd_hooks=fwd_hooks)["_Reads"]
    _check(model, plan, reads)
    n_matched_keys = [len(sink.matched) for sink in read]
    positions = [sink.position for sink in read]
    score = cast(Tensor, sink_map.sink_score)[:, :, positions]
    return HeadReads(
        sinks=tuple(read),
        min_score=min_score,
        sink=Logits(**{name: values[: len(read)] for name, values in reads.logits.items()}),
        ordinary=Logits(
            **{
                name: mean_by_group(values[len(read) :], n_matched_keys)
                for name, values in reads.logits.items()
            }
        ),
        score=rearrange(score, "layer head sink -> sink layer head"),
        uniform_score=reads.uniform_score,
        entropy=reads.heads["entropy"],
        uniform_entropy=reads.uniform_entropy,
        sink_attention=reads.heads["sink_attention"],
        value_seen=reads.heads["value_seen"],
        dormant_share=reads.heads["dormant"],
        error=reads.error,
        provenance=sink_map.provenance.extended(seed=seed),
        notes=_notes(plan, reads, read),
    )


@dataclass(frozen=True)
class Logits:
    """Logits to some keys, and what they are made of.

    Each field is [key, layer, head], a mean over the later queries that see the key; NaN where no
    query does. `content + rotation + query_bias + key_bias + distance + cap == logit`.
    """

    logit: Float[Tensor, " key layer head"]
    """As the model computes it, before masking and softmax."""
    content: Float[Tensor, " key layer head"]
    rotation: Float[Tensor, " key layer head"]
    """NaN, as all parts, in models whose logits could not be taken apart; see `HeadReads.notes`."""
    query_bias: Float[Tensor, " key layer head"]
    key_bias: Float[Tensor, " key layer head"]
    distance: Float[Tensor, " key layer head"]
    cap: Float[Tensor, " key layer head"]
    key_norm: Float[Tensor, " key layer head"]
    """Norm of the key, after the rotation."""
    query_norm: Float[Tensor, " key layer head"]
    """Mean norm of the queries."""
    cosine: Float[Tensor, " key layer head"]
    """Mean cosine of query and key, after the rotation."""
    value_norm: Float[Tensor, " key layer head"]
    """Norm of the key's value, over the median ordinary token's."""


@dataclass(frozen=True)
class ReadSink:
    """One token whose key was looked at, with the layers in which it is a sink."""

    position: int
    token: str
    kind: Kind
    shown: tuple[int, ...]
    """Layers whose attention shows the sink: those after the ones in which it lives."""
    matched: tuple[int, ...]
    """Ordinary tokens nearby, whose keys it is compared with."""


@dataclass(frozen=True)
class HeadReads(Result):
    """Which heads look at sinks and why; see `head_reads`."""

    sinks: tuple[ReadSink, ...]
    """One entry for each token, the primary first."""
    min_score: float
    sink: Logits
    """To the sinks' keys, [sink, layer, head], in all layers, also those where it is not a sink."""
    ordinary: Logits
    """To the keys of each sink's matched tokens, mean over them."""
    score: Float[Tensor, " sink layer head"]
    """Sink score in all layers; NaN for tokens with too few later queries."""
    uniform_score: Float[Tensor, " sink layer"]
    """What it would be if attention were uniform over the visible keys."""
    entropy: Float[Tensor, " layer head"]
    """Of the attention of a query, in nats, mean over queries."""
    uniform_entropy: Float[Tensor, " layer"]
    """The same of attention that is uniform over the visible keys."""
    sink_attention: Float[Tensor, " layer head"]
    """Attention that a query spends on the sinks that the layer shows, mean over queries."""
    value_seen: Float[Tensor, " layer head"]
    """Attention-weighted norm of the values, over the norm of the median ordinary value, mean over
    queries."""
    dormant_share: Float[Tensor, " layer head"]
    """Share of the queries that spend `MOST` or more of their attention on sinks and see values of
    less than `MOST` of an ordinary value's norm."""
    error: float
    """Largest deviation of a logit from the sum of its parts, over the largest logit of its layer;
    NaN where logits could not be taken apart."""
    provenance: Provenance
    notes: tuple[str, ...] = ()
    """What could not be separated in this model, and which tokens are not sinks."""

    @property
    def n_layers(self) -> int:
        """Depth of the model."""
        return self.score.shape[1]

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return self.score.shape[2]

    @property
    def primary_score(self) -> Float[Tensor, " layer head"]:
        """Sink score of the primary; 0 in layers that do not show it as a sink."""
        return self._total(self.score, "primary")

    @property
    def secondary_score(self) -> Float[Tensor, " layer head"]:
        """Sum of the sink scores of the secondary sinks that the layer shows."""
        return self._total(self.score, "secondary")

    @property
    def is_dormant(self) -> Bool[Tensor, " layer head"]:
        """Heads of which `DORMANT` or more of the queries are."""
        return self.dormant_share >= DORMANT

    @cached_property
    def roles(self) -> tuple[tuple[Role, ...], ...]:
        """Role of each head of each layer."""
        index = self.reads("primary").int() + 2 * self.reads("secondary").int()
        named: tuple[Role, ...] = get_args(Role)
        return tuple(tuple(named[role] for role in layer) for layer in index.tolist())

    def role(self, layer: int, head: int) -> Role:
        """What kind of sinks a head looks at."""
        return self.roles[layer][head]

    def reads(self, kind: Kind) -> Bool[Tensor, " layer head"]:
        """Heads that look at that kind of sink: with a score of `min_score` or more, and
        `MIN_UNIFORM` times what uniform attention would give."""
        score = self._total(self.score, kind)
        uniform = self._total(self.uniform_score[:, :, None].expand_as(self.score), kind)
        return (score >= self.min_score) & (score >= MIN_UNIFORM * uniform)

    def of_kind(
        self, values: Float[Tensor, " sink layer head"], kind: Kind
    ) -> Float[Tensor, " layer head"]:
        """Mean over the sinks of a kind, in each layer over those that it shows; else NaN."""
        return values.masked_fill(~self._shown(kind), torch.nan).nanmean(dim=0)

    def __repr__(self) -> str:
        counts = Counter(itertools.chain(*self.roles))
        roles = ", ".join(f"{counts[role]} {role}" for role in ("primary", "secondary", "both"))
        n_chosen = sum(sink.kind == "chosen" for sink in self.sinks)
        other = f" and {counted(n_chosen, 'other token')}" if n_chosen else ""
        return (
            f"HeadReads({self.provenance.model.name!r}, "
            f"{counted(len(self.sinks) - n_chosen, 'sink')}{other}, "
            f"{self.n_layers} x {self.n_heads} heads: {roles}, "
            f"{int(self.is_dormant.sum())} dormant)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each head: its role, its attention, and its logits to sinks.

        `primary_...` and `secondary_...` are means over the sinks that the layer shows (and
        `chosen_...` over tokens that are not sinks, if there are any), `..._ordinary` of the keys
        that they are compared with.
        """
        import pandas as pd

        layer, head = torch.meshgrid(
            torch.arange(self.n_layers), torch.arange(self.n_heads), indexing="ij"
        )
        columns = {"layer": layer, "head": head}
        for name in ("primary_score", "secondary_score", "sink_attention", "dormant_share"):
            columns[name] = getattr(self, name)
        columns |= {
            "dormant": self.is_dormant,
            "value_seen": self.value_seen,
            "entropy": self.entropy,
        }
        kinds: list[Kind] = ["primary", "secondary"]
        if any(sink.kind == "chosen" for sink in self.sinks):
            kinds.append("chosen")
        for kind, name in itertools.product(kinds, FACTORS):
            columns[f"{kind}_{name}"] = self.of_kind(getattr(self.sink, name), kind)
            columns[f"{kind}_{name}_ordinary"] = self.of_kind(getattr(self.ordinary, name), kind)
        frame = pd.DataFrame({name: value.flatten().tolist() for name, value in columns.items()})
        frame.insert(2, "role", list(itertools.chain(*self.roles)))
        return frame

    def logits_frame(self) -> pd.DataFrame:
        """One row for each sink, layer and head: its sink score, logits and their parts,
        `..._ordinary` beside."""
        import pandas as pd

        places = torch.meshgrid(*map(torch.arange, self.score.shape), indexing="ij")
        sink, layer, head = (place.flatten().tolist() for place in places)
        columns: dict[str, Any] = {
            "position": [self.sinks[index].position for index in sink],
            "kind": [self.sinks[index].kind for index in sink],
            "layer": layer,
            "head": head,
            "shown": [x in self.sinks[index].shown for index, x in zip(sink, layer, strict=True)],
            "score": self.score.flatten().tolist(),
        }
        for name in FACTORS:
            columns[name] = getattr(self.sink, name).flatten().tolist()
            columns[f"{name}_ordinary"] = getattr(self.ordinary, name).flatten().tolist()
        return pd.DataFrame(columns)

    def _notebook_frame(self) -> pd.DataFrame:
        frame = self.to_frame()
        return frame[frame.role != "none"].iloc[:, :18]

    def _shown(self, kind: Kind) -> Bool[Tensor, " sink layer 1"]:
        """Which layers show each sink, of the sinks of one kind."""
        shown = torch.zeros(*self.score.shape[:2], 1, dtype=torch.bool)
        for index, sink in enumerate(self.sinks):
            if sink.kind == kind:
                shown[index, list(sink.shown)] = True
        return shown

    def _total(
        self, values: Float[Tensor, " sink layer head"], kind: Kind
    ) -> Float[Tensor, " layer head"]:
        """Sum over the sinks of a kind, in each layer over those that it shows; tokens that too
        few queries see add nothing."""
        return values.masked_fill(~self._shown(kind) | self.score.isnan(), 0).sum(dim=0)


def _read_sinks(
    sink_map: SinkMap, chosen: Sequence[Sink], n_matched: int, seed: int
) -> list[ReadSink]:
    """Each token once, with all layers that show it."""
    lives_at: dict[int, list[Sink]] = {}
    for sink in chosen:
        lives_at.setdefault(sink.position, []).append(sink)
    n_layers = int(sink_map.n_layers or 0)
    return [
        ReadSink(
            position=position,
            token=lives[0].token,
            kind=lives[0].kind,
            shown=tuple(sorted({x + 1 for life in lives for x in life.layers} - {n_layers})),
            matched=matched_controls(sink_map, lives[0], n_matched, seed=[seed]),
        )
        for position, lives in lives_at.items()
    ]


class _Reads(Collector):
    """Logits to a few keys, taken apart, and statistics of every head's attention."""

    def __init__(
        self, model: Model, sink_map: SinkMap, read: Sequence[ReadSink], plan: QueryKeyPlan
    ):
        self.sites = ("v", *plan.sites, "attn_scores", "pattern", ATTENTION)
        self._positions = [sink.position for sink in read]
        matched = [position for sink in read for position in sink.matched]
        self._keys = torch.tensor([*self._positions, *matched])
        n_layers = int(sink_map.n_layers or 0)
        self._biases = [query_key_biases(model, layer) for layer in range(n_layers)]
        self._shown = [
            [s.position for s in read if layer in s.shown and s.kind != "chosen"]
            for layer in range(n_layers)
        ]
        self._plan = plan
        self._ordinary = ordinary_tokens(sink_map)
        self._queries = self._ordinary.clone()
        self._queries[: int(sink_map.thresholds["min_queries"])] = False
        if not self._queries.any():
            self._queries = torch.ones_like(self._ordinary)

    def start(self, run: Run) -> None:
        shape = (run.n_layers, run.n_heads)
        self.logits = {name: torch.full((len(self._keys), *shape), torch.nan) for name in FACTORS}
        names = ("entropy", "sink_attention", "value_seen", "dormant")
        self.heads = {name: torch.full(shape, torch.nan) for name in names}
        self.uniform_entropy = torch.full((run.n_layers,), torch.nan)
        self.uniform_score = torch.full((len(self._positions), run.n_layers), torch.nan)
        self.errors: list[float] = []
        self.dtype = torch.float32
        self.shows_scores = True
        self.has_biases = any(bias is not None for pair in self._biases for bias in pair)
        self._n_heads = run.n_heads
        self._seen: dict[str, Tensor] = {}

    def update(self, site: str, layer: int | None, activation: Any) -> None:
        layer = cast(int, layer)
        if site == ATTENTION:
            self.uniform_entropy[layer] = activation.n_visible[self._queries].log().mean()
            self.uniform_score[:, layer] = activation.uniform_score[self._positions]
        elif site == "attn_scores":
            self.dtype = activation.dtype
            self._take_scores(layer, activation)
        elif site == "pattern":
            self._take_pattern(layer, activation)
            self._seen = {}
        else:
            self._seen[site] = activation.float()

    def result(self) -> _Reads:
        return self

    @property
    def error(self) -> float:
        """Largest of all layers; NaN if nothing was taken apart, or a layer's is NaN."""
        return float(torch.tensor(self.errors or [torch.nan]).max())

    def _put(self, name: str, layer: int, value: Float[Tensor, " key head"]) -> None:
        self.logits[name][:, layer] = value.cpu()

    def _take_scores(self, layer: int, scores: Float[Tensor, " head query key"]) -> None:
        visible = is_visible(scores[0])
        if bool(visible[0, 1:].any()):
            # Weights after the softmax: nothing is hidden in them, and they are not logits.
            self.shows_scores = False
            return
        visible = visible[:, self._keys]
        weights = later_queries(visible, self._keys)
        logits = scores[:, :, self._keys].float().masked_fill(~visible, 0)
        mean = einsum(logits, weights, "head query key, query key -> key head")
        self._put("logit", layer, mean)
        if self._plan.rotation == "unknown":
            return
        queries = self._plan.rotated(self._seen, "q")
        keys = self._plan.rotated(self._seen, "k")[self._keys]
        product = self._plan.scale[layer] * einsum(
            queries, keys, "query head d, key head d -> head query key"
        )
        cap = self._plan.cap
        computed = cap * torch.tanh(product / cap) if cap else product
        difference = ((computed - logits) * visible).abs().max()
        self.errors.append(float(difference / logits.abs().max().clamp_min(1e-30)))
        self._take_factors(layer, queries, keys, weights, product)
        self._take_parts(layer, queries, keys, weights, mean)

    def _take_factors(
        self,
        layer: int,
        queries: Float[Tensor, " query head d_head"],
        keys: Float[Tensor, " key head d_head"],
        weights: Float[Tensor, " query key"],
        product: Float[Tensor, " head query key"],
    ) -> None:
        """Norms and cosines, and their means over queries."""
        query_norm, key_norm = queries.norm(dim=-1), keys.norm(dim=-1)
        norms = einsum(query_norm, key_norm, "query head, key head -> head query key")
        cosine = product / (self._plan.scale[layer] * norms.clamp_min(1e-30))
        cosine = cosine.masked_fill(~(weights > 0), 0)
        self._put("key_norm", layer, key_norm)
        self._put(
            "query_norm", layer, einsum(query_norm, weights, "query head, query key -> key head")
        )
        self._put("cosine", layer, einsum(cosine, weights, "head query key, query key -> key head"))

    def _take_parts(
        self,
        layer: int,
        queries: Float[Tensor, " query head d_head"],
        keys: Float[Tensor, " key head d_head"],
        weights: Float[Tensor, " query key"],
        logit: Float[Tensor, " key head"],
    ) -> None:
        """The parts of the mean logit: a dot product is linear in the query, so that of the mean
        query is the mean."""
        plan = self._plan

        def mean(vectors: Float[Tensor, " query head d_head"]) -> Float[Tensor, " key head d_head"]:
            return einsum(vectors, weights, "query head d, query key -> key head d")

        def dot(
            query: Float[Tensor, " key head d_head"], key: Float[Tensor, " key head d_head"]
        ) -> Float[Tensor, " key head"]:
            return plan.scale[layer] * (query * key).sum(dim=-1)

        of_queries, of_keys = self._biases[layer]
        plain_bias_q, bias_q = plan.biases(self._seen, of_queries)
        plain_bias_k, bias_k = (bias[self._keys] for bias in plan.biases(self._seen, of_keys))
        query, query_bias = mean(queries), mean(bias_q)
        content_query, content_key = query - query_bias, keys - bias_k
        content = rotated_content = dot(content_query, content_key)
        if plan.splits_rotation:
            plain_queries = plan.unrotated(self._seen, "q")
            plain_keys = plan.unrotated(self._seen, "k")[self._keys]
            content = dot(mean(plain_queries - plain_bias_q), plain_keys - plain_bias_k)
        rotation = rotated_content - content
        cap = logit - dot(query, keys)
        self._put("content", layer, content)
        self._put("rotation", layer, rotation if plan.splits_rotation else rotation * torch.nan)
        self._put("query_bias", layer, dot(query_bias, content_key))
        self._put("key_bias", layer, dot(content_query, bias_k))
        self._put("distance", layer, dot(query_bias, bias_k))
        self._put("cap", layer, cap if plan.cap else torch.zeros_like(cap))

    def _take_pattern(self, layer: int, pattern: Float[Tensor, " head query key"]) -> None:
        queries = self._queries.to(pattern.device)
        weights = pattern[:, queries].float()
        value_norm = by_query_head(self._seen["v"], self._n_heads).norm(dim=-1)
        typical = value_norm[self._ordinary.to(pattern.device)].median(dim=0).values
        relative = value_norm / typical.clamp_min(1e-30)
        self._put("value_norm", layer, relative[self._keys])
        # In some models a learned number joins the softmax and takes its share of the attention.
        rest = (1 - weights.sum(dim=-1)).clamp(0, 1)
        on_sinks = weights[:, :, self._shown[layer]].sum(dim=-1)
        seen = einsum(weights, relative, "head query key, key head -> head query")
        per_query = {
            "entropy": torch.special.entr(weights).sum(dim=-1) + torch.special.entr(rest),
            "sink_attention": on_sinks,
            "value_seen": seen,
            "dormant": ((on_sinks >= MOST) & (seen <= MOST)).float(),
        }
        for name, value in per_query.items():
            self.heads[name][layer] = value.mean(dim=1).cpu()


def mean_by_group(
    values: Float[Tensor, " key layer head"], sizes: Sequence[int]
) -> Float[Tensor, " group layer head"]:
    """Mean over each of the groups of keys that follow one another; NaN for an empty one."""
    return torch.stack([group.nanmean(dim=0) for group in torch.split(values, list(sizes))])


def later_queries(
    visible: Bool[Tensor, " query key"], keys: Int[Tensor, " key"]
) -> Float[Tensor, " query key"]:
    """Weight of each query in a mean over the later queries that see a key; NaN where none does."""
    later = torch.arange(len(visible), device=visible.device)[:, None] > keys.to(visible.device)
    looks = (visible & later).float()
    n_queries = looks.sum(dim=0)
    return looks / n_queries.masked_fill(n_queries == 0, torch.nan)


def _check(model: Model, plan: QueryKeyPlan, reads: _Reads) -> None:
    allowed = max(1e-3, 8 * torch.finfo(reads.dtype).eps)
    if plan.rotation != "unknown" and reads.shows_scores and not reads.error <= allowed:
        raise ModelError(
            f"in {name_of(model)!r} the parts of the attention's logits do not add up to the "
            f"model's own (relative error {reads.error:.1e}); a hook that edits queries, keys or "
            "scores does this: remove it (model.reset_hooks(), fwd_hooks=())"
        )


def _notes(plan: QueryKeyPlan, reads: _Reads, read: Sequence[ReadSink]) -> tuple[str, ...]:
    notes = []
    if not reads.shows_scores:
        notes.append("this model shows attention weights and no logits; logits are NaN here")
    elif plan.rotation == "unknown":
        notes.append(
            "nothing that this model shows of its queries and keys reproduces its logits (a bias "
            "by distance does this), so they are not taken apart"
        )
    else:
        if not plan.splits_rotation:
            notes.append("the rotation cannot be undone: `content` contains it, `rotation` is NaN")
        if reads.has_biases and not plan.splits_biases:
            notes.append("biases of queries and keys cannot be separated: `content` contains them")
    notes += [
        f"the token at position {sink.position} is not a sink: it counts for no role, and its "
        "scores and logits are in logits_frame()"
        for sink in read
        if sink.kind == "chosen"
    ]
    return tuple(notes)
