"""Which attention heads look at the sinks, and why: norms, content, rotation, biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.analyses.heads.head_reads_result import (
    MOST,
    PARTS,
    HeadReads,
    Logits,
    ReadSink,
    kind_scores,
    later_queries,
    over_matched,
)
from secondary_sinks.analyses.target import Target
from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.queries_keys import (
    QueryKeyPlan,
    by_query_head,
    query_key_biases,
    query_key_plan,
    rotate,
)
from secondary_sinks.host.text_input import Text
from secondary_sinks.observe.collectors import Collector, Run
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.sinks.selection import chosen_sinks, sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

_FACTORS = ("logit", *PARTS, "key_norm", "query_norm", "cosine", "value_norm")


def head_reads(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | None = None,
    *,
    which: Sequence[Sink] | None = None,
    min_score: float = 0.1,
    n_matched: int = 8,
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> HeadReads:
    """Find the heads that look at the sinks, and take their logits apart.

    For every layer and head and every sink: the mean logit of the later queries that see the sink's
    key, with its factors (norms of key and query, cosine) and its parts (content, rotary rotation,
    biases, cap; defined in `analyses.heads.head_reads_result`), and the same for ordinary keys nearby. The parts are
    compared with the logits that the model itself used, pair by pair. In the same pass, for every
    head: the attention that sinks draw, the entropy of the attention, and whether the head is
    *dormant*, that is, whether most of its attention falls on sinks whose values are small
    (compare arXiv 2410.13835).

    What it is not evidence for: a role says where a head looks, not what it does with what it
    finds; that a head is dormant here, on this text, does not make it useless; and a large part of
    a logit draws no attention if all keys have it, so compare it with that of ordinary keys.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or its sink map.
        sinks: the text's sink map, if it is there already.
        which: secondary sinks of the map; None for all. The primary is always among them.
        min_score: a head reads a kind of sink from this sink score on (summed over the sinks of
            that kind), if it is also four times that of uniform attention.
        n_matched: how many ordinary keys each sink is compared with.
        seed: of the choice of these keys; recorded with the result.
        chat: the string goes through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Returns:
        `HeadReads`: logits as [sink, layer, head], statistics of heads as [layer, head].

    Raises:
        InputError: no sinks in the text, sinks that are not in the map, a sink map of another
            model, text or criterion, or several texts.
        ModelError: the parts of a logit do not add up to the model's own.
    """
    if n_matched < 1:
        raise InputError(f"n_matched is {n_matched}; it must be 1 or more")
    found = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    read = _read_sinks(found, which, n_matched, seed)
    plan = query_key_plan(model)
    keys = [sink.position for sink in read]
    keys += [position for sink in read for position in sink.matched]
    shown = [
        [s.position for s in read if x in s.shown] for x in range(int(found.model["n_layers"]))
    ]
    collector = _Reads(keys, shown, found, plan, lambda layer: query_key_biases(model, layer))
    tokens = cast(Tensor, found.tokens)
    result = cast(Trace, trace(model, tokens, [collector], fwd_hooks=fwd_hooks))["_Reads"]
    _check(model, plan, result)
    groups, first = [], len(read)
    for sink in read:
        groups.append(range(first, first + len(sink.matched)))
        first += len(sink.matched)
    primary, uniform_primary = kind_scores(found, read, "primary")
    secondary, uniform_secondary = kind_scores(found, read, "secondary")
    logits = result.logits
    return HeadReads(
        sinks=tuple(read),
        n_layers=len(shown),
        n_heads=primary.shape[1],
        min_score=min_score,
        sink=Logits(**{name: logits[name][: len(read)] for name in _FACTORS}),
        ordinary=Logits(**{name: over_matched(logits[name], groups) for name in _FACTORS}),
        primary_score=primary,
        secondary_score=secondary,
        uniform_primary_score=uniform_primary,
        uniform_secondary_score=uniform_secondary,
        entropy=result.heads["entropy"],
        uniform_entropy=result.uniform_entropy,
        sink_attention=result.heads["sink_attention"],
        value_seen=result.heads["value_seen"],
        dormant_share=result.heads["dormant"],
        error=result.error,
        seed=seed,
        model=found.model,
        notes=_notes(plan, result),
    )


def _read_sinks(
    found: SinkMap, which: Sequence[Sink] | None, n_matched: int, seed: int
) -> list[ReadSink]:
    """The primary and the chosen secondary sinks, each token once, with all layers that show it."""
    chosen = found.primary + (found.secondary if which is None else chosen_sinks(found, which))
    if not chosen:
        raise InputError(
            "no sinks in this text, so no head looks at any: see detect_sinks(...).margins() for "
            "the tokens that came nearest"
        )
    depth = int(found.model["n_layers"])
    by_position: dict[int, list[Sink]] = {}
    for sink in chosen:
        if sink not in by_position.setdefault(sink.position, []):
            by_position[sink.position].append(sink)
    return [
        ReadSink(
            position=position,
            token=lives[0].token,
            kind=lives[0].kind,
            shown=tuple(sorted({x + 1 for life in lives for x in life.layers if x + 1 < depth})),
            matched=Target.of(found, lives[0], n_controls=n_matched, seed=seed).matched,
        )
        for position, lives in by_position.items()
    ]


class _Reads(Collector):
    """Logits to a few keys, taken apart, and statistics of every head's attention."""

    def __init__(
        self,
        keys: Sequence[int],
        shown: Sequence[Sequence[int]],
        sinks: SinkMap,
        plan: QueryKeyPlan,
        biases: Callable[[int], tuple[Tensor | None, Tensor | None]],
    ):
        self.sites = ("v", *plan.sites, "attn_scores", "pattern")
        self._keys = torch.tensor(list(keys))
        self._shown = shown
        self._plan = plan
        self._biases = biases
        ordinary = torch.ones(sinks.n_tokens, dtype=torch.bool)
        ordinary[[sinks.primary_position, *(sink.position for sink in sinks.sinks)]] = False
        self._ordinary = ordinary
        self._queries = ordinary.clone()
        self._queries[: int(sinks.thresholds["min_queries"])] = False
        if not self._queries.any():
            self._queries = torch.ones_like(ordinary)

    def start(self, run: Run) -> None:
        shape = (run.n_layers, run.n_heads)
        self.logits = {name: torch.full((len(self._keys), *shape), torch.nan) for name in _FACTORS}
        names = ("entropy", "sink_attention", "value_seen", "dormant")
        self.heads = {name: torch.full(shape, torch.nan) for name in names}
        self.uniform_entropy = torch.full((run.n_layers,), torch.nan)
        self.errors: list[float] = []
        self.dtype = torch.float32
        self.shows_scores, self.has_biases = True, False
        self._n_heads = run.n_heads
        self._seen: dict[str, Tensor] = {}
        # Where the hook of the scores shows weights, it comes after the pattern's.
        self._visible: Tensor = torch.ones(run.n_tokens, run.n_tokens, dtype=torch.bool).tril()

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        here = cast(int, layer)
        if site == "attn_scores":
            self.dtype = activation.dtype
            self._take_scores(here, activation)
        elif site == "pattern":
            self._take_pattern(here, activation)
            self._seen = {}
        else:
            self._seen[site] = activation.float()

    def result(self) -> _Reads:
        return self

    @property
    def error(self) -> float:
        """Largest of all layers; NaN if nothing was taken apart, or a layer's is NaN."""
        return float(torch.tensor(self.errors or [torch.nan]).max())

    def _keep(self, name: str, layer: int, value: Float[Tensor, "key head"]) -> None:
        self.logits[name][:, layer] = value.cpu()

    def _take_scores(self, layer: int, scores: Float[Tensor, "head query key"]) -> None:
        visible = scores[0] > 0.9 * max(torch.finfo(scores.dtype).min, -1e30)
        if bool(visible[0, 1:].any()):
            # Weights after the softmax: nothing is hidden in them, and they are no logits.
            self.shows_scores = False
            visible = torch.ones_like(visible).tril()
        self._visible = visible
        self._weights = later_queries(visible[:, self._keys], self._keys)
        if not self.shows_scores:
            return
        own = scores[:, :, self._keys].float().masked_fill(~visible[:, self._keys], 0)
        logit = torch.einsum("hqk,qk->kh", own, self._weights)
        self._keep("logit", layer, logit)
        if self._plan.rotation != "unknown":
            self._take_apart(layer, own, visible[:, self._keys], logit)

    def _take_apart(
        self,
        layer: int,
        own: Float[Tensor, "head query key"],
        visible: Bool[Tensor, "query key"],
        logit: Float[Tensor, "key head"],
    ) -> None:
        plan, scale, weights = self._plan, self._plan.scale[layer], self._weights
        turned, plain = self._rotated("q"), self._unrotated("q")
        keys, plain_keys = self._rotated("k")[self._keys], self._unrotated("k")[self._keys]
        product = scale * torch.einsum("qhd,khd->hqk", turned, keys)
        self._compare(product, own, visible)
        norms = turned.norm(dim=-1)
        key_norm = keys.norm(dim=-1)
        lengths = torch.einsum("qh,kh->hqk", norms, key_norm).clamp_min(1e-30)
        looks = weights > 0
        cosine = (product / (scale * lengths)).masked_fill(~looks, 0)
        self._keep("key_norm", layer, key_norm)
        self._keep("query_norm", layer, torch.einsum("qh,qk->kh", norms, weights))
        self._keep("cosine", layer, torch.einsum("hqk,qk->kh", cosine, weights))
        bias_q, bias_k = self._turned_biases(layer, turned, keys)

        def mean(queries: Tensor) -> Tensor:
            return torch.einsum("qhd,qk->khd", queries, weights)

        def dot(a: Tensor, b: Tensor) -> Float[Tensor, "key head"]:
            return scale * (a * b).sum(dim=-1)

        query, query_bias = mean(turned), mean(bias_q[1])
        said, liked = query - query_bias, keys - bias_k[1]
        plainly = dot(mean(plain - bias_q[0]), plain_keys - bias_k[0])
        if not plan.splits_rotation:
            plainly = dot(said, liked)
        self._keep("content", layer, plainly)
        rotation = dot(said, liked) - plainly
        self._keep("rotation", layer, rotation if plan.splits_rotation else rotation * torch.nan)
        self._keep("query_bias", layer, dot(query_bias, liked))
        self._keep("key_bias", layer, dot(said, bias_k[1]))
        self._keep("position", layer, dot(query_bias, bias_k[1]))
        cap = logit - dot(query, keys)
        self._keep("cap", layer, cap if plan.cap else torch.zeros_like(cap))

    def _compare(self, product: Tensor, own: Tensor, visible: Bool[Tensor, "query key"]) -> None:
        """Keep the largest difference of a logit of this layer from the model's own."""
        cap = self._plan.cap
        made = cap * torch.tanh(product / cap) if cap else product
        away = ((made - own) * visible).abs().max() / own.abs().max().clamp_min(1e-30)
        self.errors.append(float(away))

    def _rotated(self, name: str) -> Float[Tensor, "token head d_head"]:
        if self._plan.rotation == "read":
            found = self._seen[f"rot_{name}"]
        elif self._plan.rotation == "made":
            found = rotate(self._seen[name], *self._angles(), self._plan.pairing)
        else:
            found = self._seen[name]
        return by_query_head(found, self._n_heads)

    def _unrotated(self, name: str) -> Float[Tensor, "token head d_head"]:
        found = self._seen[name]
        if self._plan.normed and self._plan.pairing:
            turned = self._seen[f"rot_{name}"]
            found = rotate(turned, *self._angles(), self._plan.pairing, back=True)
        return by_query_head(found, self._n_heads)

    def _angles(self) -> tuple[Tensor, Tensor]:
        return self._seen["rotary_cos"], self._seen["rotary_sin"]

    def _turned_biases(
        self, layer: int, queries: Tensor, keys: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Biases of all queries and of the keys, each before and after the rotation."""
        found = []
        for bias, like in zip(self._biases(layer), (queries, keys), strict=True):
            self.has_biases |= bias is not None
            if bias is None or not self._plan.splits_biases:
                found.append((torch.zeros_like(like), torch.zeros_like(like)))
                continue
            n_tokens = len(queries)
            plain = bias.to(like.device).expand(n_tokens, *bias.shape)
            turned = plain
            if self._plan.rotation != "none":
                turned = rotate(plain, *self._angles(), self._plan.pairing)
            both = [by_query_head(one, self._n_heads) for one in (plain, turned)]
            at_keys = slice(None) if like is queries else self._keys
            found.append((both[0][at_keys], both[1][at_keys]))
        return found[0], found[1]

    def _take_pattern(self, layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        queries = self._queries.to(pattern.device)
        weights = pattern[:, queries].float()
        value_norm = by_query_head(self._seen["v"], self._n_heads).norm(dim=-1)
        typical = value_norm[self._ordinary.to(pattern.device)].median(dim=0).values
        relative = value_norm / typical.clamp_min(1e-30)
        self._keep("value_norm", layer, relative[self._keys])
        # In some models a learned number joins the softmax and takes its share of the attention.
        rest = (1 - weights.sum(dim=-1)).clamp(0, 1)
        entropy = torch.special.entr(weights).sum(dim=-1) + torch.special.entr(rest)
        on_sinks = weights[:, :, list(self._shown[layer])].sum(dim=-1)
        seen = torch.einsum("hqk,kh->hq", weights, relative)
        dormant = (on_sinks >= MOST) & (seen <= MOST)
        for name, value in (
            ("entropy", entropy),
            ("sink_attention", on_sinks),
            ("value_seen", seen),
            ("dormant", dormant.float()),
        ):
            self.heads[name][layer] = value.mean(dim=1).cpu()
        n_visible = self._visible.to(pattern.device)[queries].sum(dim=1)
        self.uniform_entropy[layer] = float(n_visible.log().mean())


def _check(model: Any, plan: QueryKeyPlan, result: _Reads) -> None:
    allowed = max(1e-3, 8 * torch.finfo(result.dtype).eps)
    if plan.rotation != "unknown" and result.shows_scores and not result.error <= allowed:
        raise ModelError(
            f"in {describe(model).name!r} the parts of the attention's logits do not add up to the "
            f"model's own (relative error {result.error:.1e}); a hook that edits queries, keys or "
            "scores does this: remove it (model.reset_hooks(), fwd_hooks=())"
        )


def _notes(plan: QueryKeyPlan, result: _Reads) -> tuple[str, ...]:
    if not result.shows_scores:
        return ("this model shows attention weights and no logits, so there are no logits here",)
    if plan.rotation == "unknown":
        return (
            "nothing that this model shows of its queries and keys reproduces its logits (a bias "
            "by distance does this), so they are not taken apart",
        )
    notes = []
    if not plan.splits_rotation:
        notes.append("the rotation could not be undone: `content` contains it, `rotation` is NaN")
    if result.has_biases and not plan.splits_biases:
        notes.append("the biases of queries and keys could not be told apart: `content` has them")
    return tuple(notes)
