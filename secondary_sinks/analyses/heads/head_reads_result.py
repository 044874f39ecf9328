"""Which heads look at sinks, and what makes their logits: norms, angle, content, rotation, biases.

The weight that a query gives a key follows from a logit, `scale * q . k`. Why is that of a sink's
key large? Two answers, both exact:

* as a product: norm of the key, norm of the query, cosine between them;
* as a sum, with `R` the rotary embedding (which turns a vector by its position) and `b` the biases
  of queries and keys, `q = u + b_q` and `k = w + b_k`:

      content      u . w                       what query and key say, wherever they stand
      rotation     R u . R w  -  u . w         what their distance changes in it
      query bias   R b_q . R w                 what any query likes in this key
      key bias     R u . R b_k                 what this query likes in any key at that distance
      position     R b_q . R b_k               a function of the distance alone
      cap          cap * tanh(s / cap) - s     where logits are capped (Gemma 2)

The softmax sees differences only, so a part counts as far as it differs from that of ordinary keys
seen by about the same queries; both are given. Everything here is arithmetic on small tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.result import Result
from secondary_sinks.sinks.attention_baseline import uniform_score
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

Role = Literal["primary", "secondary", "both", "none"]

MIN_UNIFORM = 4.0
"""A head reads a kind of sink only if it looks at them this many times more than uniform attention
would, which matters where there are many of them."""
MOST = 0.5
"""A query spends most of its attention on sinks from this share on; and what it reads is small
below this share of an ordinary value's norm."""
DORMANT = 0.5
"""A head is dormant if at least this share of its queries is."""


@dataclass(frozen=True)
class Logits:
    """Logits to some keys, and what they are made of.

    Each field is [key, layer, head], a mean over the later queries that see the key; NaN where no
    query does. `content + rotation + query_bias + key_bias + position + cap == logit`.
    """

    logit: Float[Tensor, "key layer head"]
    """As the model computes it, before masking and softmax."""
    content: Float[Tensor, "key layer head"]
    rotation: Float[Tensor, "key layer head"]
    """NaN, as all parts, in models whose logits could not be taken apart; see `HeadReads.notes`."""
    query_bias: Float[Tensor, "key layer head"]
    key_bias: Float[Tensor, "key layer head"]
    position: Float[Tensor, "key layer head"]
    cap: Float[Tensor, "key layer head"]
    key_norm: Float[Tensor, "key layer head"]
    """Norm of the key, after the rotation."""
    query_norm: Float[Tensor, "key layer head"]
    """Mean norm of the queries."""
    cosine: Float[Tensor, "key layer head"]
    """Mean cosine of query and key, after the rotation."""
    value_norm: Float[Tensor, "key layer head"]
    """Norm of the key's value, over the median ordinary token's."""


PARTS = ("content", "rotation", "query_bias", "key_bias", "position", "cap")
"""The parts of a logit, in the order in which they are drawn."""


@dataclass(frozen=True)
class ReadSink:
    """One token whose key was looked at, with the layers in which it is a sink."""

    position: int
    token: str
    kind: str
    shown: tuple[int, ...]
    """Layers whose attention shows the sink: those after the ones in which it lives."""
    matched: tuple[int, ...]
    """Ordinary tokens nearby, whose keys it is compared with."""


@dataclass(frozen=True)
class HeadReads(Result):
    """Which heads look at sinks and why; see `head_reads`."""

    sinks: tuple[ReadSink, ...]
    """One entry a token, the primary first."""
    n_layers: int
    n_heads: int
    min_score: float
    sink: Logits
    """To the sinks' keys, [sink, layer, head], in all layers, also those where it is no sink."""
    ordinary: Logits
    """To the keys of each sink's matched tokens, mean over them."""
    primary_score: Float[Tensor, "layer head"]
    """Sink score of the primary; 0 in layers that do not show it as a sink."""
    secondary_score: Float[Tensor, "layer head"]
    """Sum of the sink scores of the secondary sinks that the layer shows."""
    uniform_secondary_score: Float[Tensor, "layer"]
    """What that sum would be if attention were uniform."""
    uniform_primary_score: Float[Tensor, "layer"]
    entropy: Float[Tensor, "layer head"]
    """Of the attention of a query, in nats, mean over queries."""
    uniform_entropy: Float[Tensor, "layer"]
    """The same of attention that is uniform over the visible keys."""
    sink_attention: Float[Tensor, "layer head"]
    """Attention that a query spends on the sinks that the layer shows, mean over queries."""
    value_seen: Float[Tensor, "layer head"]
    """Attention-weighted norm of the values, over the norm of the median ordinary value, mean over
    queries."""
    dormant_share: Float[Tensor, "layer head"]
    """Share of the queries that spend `MOST` or more of their attention on sinks and see values of
    less than `MOST` of an ordinary value's norm."""
    error: float
    """Largest deviation of a logit from the sum of its parts, over the largest logit of its layer;
    NaN where logits could not be taken apart."""
    seed: int
    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""
    notes: tuple[str, ...] = ()
    """What could not be told apart in this model."""

    @property
    def is_dormant(self) -> Bool[Tensor, "layer head"]:
        """Heads of which `DORMANT` or more of the queries are."""
        return self.dormant_share >= DORMANT

    def reads(self, kind: Literal["primary", "secondary"]) -> Bool[Tensor, "layer head"]:
        """Heads that look at that kind of sink: with a score of `min_score` or more, and
        `MIN_UNIFORM` times what uniform attention would give."""
        score = self.primary_score if kind == "primary" else self.secondary_score
        uniform = self.uniform_primary_score if kind == "primary" else self.uniform_secondary_score
        return (score >= self.min_score) & (score >= MIN_UNIFORM * uniform[:, None])

    def role(self, layer: int, head: int) -> Role:
        """What kind of sinks a head looks at."""
        primary = bool(self.reads("primary")[layer, head])
        secondary = bool(self.reads("secondary")[layer, head])
        if primary and secondary:
            return "both"
        return "primary" if primary else "secondary" if secondary else "none"

    def of_kind(
        self, values: Float[Tensor, "sink layer head"], kind: Literal["primary", "secondary"]
    ) -> Float[Tensor, "layer head"]:
        """Mean over the sinks of a kind, in each layer over those that it shows; else NaN."""
        shown = torch.zeros(len(self.sinks), self.n_layers, 1, dtype=torch.bool)
        for index, sink in enumerate(self.sinks):
            if sink.kind == kind:
                shown[index, list(sink.shown)] = True
        return values.masked_fill(~shown, torch.nan).nanmean(dim=0)

    def __repr__(self) -> str:
        roles = Counter(
            self.role(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)
        )
        counts = ", ".join(f"{roles[one]} {one}" for one in ("primary", "secondary", "both"))
        return (
            f"HeadReads({self.model.get('name', '?')!r}, {len(self.sinks)} sinks, "
            f"{self.n_layers} x {self.n_heads} heads: {counts}, "
            f"{int(self.is_dormant.sum())} dormant)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each head: its role, its attention, and its logits to sinks.

        `primary_...` and `secondary_...` are means over the sinks that the layer shows,
        `..._ordinary` of the keys that they are compared with.
        """
        import pandas as pd

        layer, head = torch.meshgrid(
            torch.arange(self.n_layers), torch.arange(self.n_heads), indexing="ij"
        )
        columns: dict[str, Any] = {
            "layer": layer.flatten().tolist(),
            "head": head.flatten().tolist(),
        }
        columns["role"] = [
            self.role(*place) for place in zip(columns["layer"], columns["head"], strict=True)
        ]
        for name in ("primary_score", "secondary_score", "sink_attention"):
            columns[name] = getattr(self, name).flatten().tolist()
        columns["dormant_share"] = self.dormant_share.flatten().tolist()
        columns["dormant"] = self.is_dormant.flatten().tolist()
        columns["value_seen"] = self.value_seen.flatten().tolist()
        columns["entropy"] = self.entropy.flatten().tolist()
        kinds: tuple[Literal["primary", "secondary"], ...] = ("primary", "secondary")
        for kind in kinds:
            for name in ("logit", *PARTS, "key_norm", "query_norm", "cosine", "value_norm"):
                sink, ordinary = getattr(self.sink, name), getattr(self.ordinary, name)
                columns[f"{kind}_{name}"] = self.of_kind(sink, kind).flatten().tolist()
                columns[f"{kind}_{name}_ordinary"] = self.of_kind(ordinary, kind).flatten().tolist()
        return pd.DataFrame(columns)

    def logits_frame(self) -> pd.DataFrame:
        """One row for each sink, layer and head: logits and their parts, `..._ordinary` beside."""
        import pandas as pd

        shape = self.sink.logit.shape
        places = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
        sink, layer, head = (place.flatten().tolist() for place in places)
        columns: dict[str, Any] = {
            "position": [self.sinks[index].position for index in sink],
            "layer": layer,
            "head": head,
            "shown": [
                one in self.sinks[index].shown for index, one in zip(sink, layer, strict=True)
            ],
        }
        for entry in fields(Logits):
            columns[entry.name] = getattr(self.sink, entry.name).flatten().tolist()
            columns[f"{entry.name}_ordinary"] = (
                getattr(self.ordinary, entry.name).flatten().tolist()
            )
        return pd.DataFrame(columns)

    def _notebook_frame(self) -> pd.DataFrame:
        frame = self.to_frame()
        return frame[frame.role != "none"].iloc[:, :18]


def kind_scores(
    sinks: SinkMap, read: Sequence[ReadSink], kind: Literal["primary", "secondary"]
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer"]]:
    """Sum of the sink scores of one kind in the layers that show them, and what it would be if
    attention were uniform. Tokens that too few queries see add nothing."""
    score = sinks.sink_score
    if score is None:
        nothing = torch.full((1, 1), math.nan)
        return nothing, nothing[0]
    total, uniform = torch.zeros(score.shape[:2]), torch.zeros(score.shape[0])
    expected = uniform_score(sinks.n_tokens)
    for sink in read:
        if sink.kind != kind or bool(score[0, 0, sink.position].isnan()):
            continue
        shown = list(sink.shown)
        total[shown] += score[shown, :, sink.position]
        uniform[shown] += expected[sink.position]
    return total, uniform


def over_matched(
    values: Float[Tensor, "key layer head"], groups: Sequence[Sequence[int]]
) -> Float[Tensor, "sink layer head"]:
    """Mean over each sink's matched keys; NaN where it has none."""
    empty = torch.full(values.shape[1:], math.nan)
    return torch.stack([values[list(group)].nanmean(dim=0) if group else empty for group in groups])


def later_queries(
    visible: Bool[Tensor, "query key"], keys: Int[Tensor, "key"]
) -> Float[Tensor, "query key"]:
    """Weight of each query in a mean over the later queries that see a key; NaN where none does."""
    later = torch.arange(len(visible), device=visible.device)[:, None] > keys.to(visible.device)
    looks = (visible & later).float()
    count = looks.sum(dim=0)
    weights: Tensor = looks / count.masked_fill(count == 0, torch.nan)
    return weights
