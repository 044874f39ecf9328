"""Queries and keys as the attention uses them, in models that show them in different ways.

A logit is `scale * q . k` with q and k after their biases, after a norm of their own in some models
(Qwen 3, Gemma 3, OLMo 2), and after the rotary embedding, which turns pairs of their dimensions by
an angle that grows with the position. Hosts differ in what they show of this:

* after the rotation (`rot_q`, `rot_k`): most models with a rotary embedding;
* before it, with the cosines and sines of the angles: the others (GPT-NeoX, Phi 3), where the
  rotation is done here;
* no rotation, because the model has none (GPT-2).

Which way is right, how dimensions are paired, whether a norm stands in between, the scale, and
whether logits are capped, is not read from a configuration but found by trying: `query_key_plan`
runs a few tokens once a model and takes what reproduces the model's own scores.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.host.forward import fired
from secondary_sinks.host.identity import hooks_aside
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.sites import Site

Rotation = Literal["none", "read", "made", "unknown"]
Pairing = Literal["", "halves", "doubled halves", "neighbors", "repeated neighbors"]
PAIRINGS: tuple[Pairing, ...] = ("halves", "doubled halves", "neighbors", "repeated neighbors")
"""How dimensions are paired and how cosines are laid out for them: dimension i with i + d/2, the
cosines given twice or once; or 2i with 2i + 1, the cosines of the pairs given in two halves or each
one twice in a row."""

_N_PROBED = 12

_plans: weakref.WeakKeyDictionary[Any, QueryKeyPlan] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class QueryKeyPlan:
    """How the logits of one model come from what it shows."""

    rotation: Rotation
    """"read": `rot_q` and `rot_k` are shown; "made": they follow from `q`, `k` and the angles;
    "none": there is no rotation; "unknown": nothing reproduces the scores."""
    pairing: Pairing
    """Empty where no rotation can be made or undone."""
    normed: bool
    """Whether `q` and `k` are normalized after where they are shown."""
    scale: tuple[float, ...]
    """Factor of each layer's logits."""
    cap: float
    """Logits pass `cap * tanh(logit / cap)`; 0 if they do not."""

    @property
    def sites(self) -> tuple[str, ...]:
        """What must be read to make logits and their parts."""
        if self.rotation == "unknown":
            return ()
        rotated = ("rot_q", "rot_k") if self.rotation == "read" else ()
        angles = ("rotary_cos", "rotary_sin") if self.pairing else ()
        return ("q", "k", *rotated, *angles)

    @property
    def splits_rotation(self) -> bool:
        """Whether logits without the rotation can be given."""
        return self.rotation != "unknown" and (bool(self.pairing) or not self.normed)

    @property
    def splits_biases(self) -> bool:
        """Whether the parts of the biases can be told apart: no norm behind them, and a rotation
        that can be applied to them."""
        return not self.normed and (self.rotation == "none" or bool(self.pairing))


def query_key_plan(model: Any) -> QueryKeyPlan:
    """Find out how a model's logits come from its queries and keys, once a model."""
    if model not in _plans:
        _plans[model] = _find_plan(model)
    return _plans[model]


def rotate(
    x: Float[Tensor, "token head d_head"],
    cos: Float[Tensor, "token rotated"],
    sin: Float[Tensor, "token rotated"],
    pairing: Pairing,
    *,
    back: bool = False,
) -> Float[Tensor, "token head d_head"]:
    """Turn each pair of dimensions by its angle, or back; dimensions beyond the rotated ones stay.

    Cosines and sines may be of a length other than 1 (YaRN scales them); `back` divides by it.
    """
    if pairing == "doubled halves":
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    if pairing == "neighbors":
        half = cos.shape[-1] // 2
        cos, sin = (part[..., :half].repeat_interleave(2, dim=-1) for part in (cos, sin))
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if pairing in ("halves", "doubled halves"):
        first, second = turned[..., : width // 2], turned[..., width // 2 :]
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    cos, sin = cos[:, None], sin[:, None]
    if back:
        length = cos.square() + sin.square()
        cos, sin = cos / length, -sin / length
    return torch.cat([turned * cos + across * sin, rest], dim=-1)


def by_query_head(k: Float[Tensor, "token kv_head d_head"], n_heads: int) -> Tensor:
    """Keys or values of grouped-query attention, repeated for each query head."""
    return k.repeat_interleave(n_heads // k.shape[1], dim=1)


def query_key_biases(
    model: Any, layer: int
) -> tuple[Float[Tensor, "head d_head"] | None, Float[Tensor, "kv_head d_head"] | None]:
    """Biases of queries and keys; None where there are none."""
    attention = model.blocks[layer].attn
    biases = []
    for name in ("b_Q", "b_K"):
        bias = getattr(attention, name, None)
        shown = isinstance(bias, Tensor) and bias.ndim == 2 and bool((bias != 0).any())
        biases.append(bias.detach().float() if shown and bias is not None else None)
    return biases[0], biases[1]


def _find_plan(model: Any) -> QueryKeyPlan:
    info = describe(model)
    n = min(_N_PROBED, info.n_ctx or _N_PROBED)
    tokens = ((7 * torch.arange(n) + 3) % int(model.cfg.d_vocab))[None]
    names = ("q", "k", "rot_q", "rot_k", "rotary_cos", "rotary_sin", "attn_scores")
    sites = [Site(name, layer) for name in names for layer in range(info.n_layers)]
    with hooks_aside(model):
        seen = fired(model, tokens, sites)
    eps = max(torch.finfo(value.dtype).eps for value in seen.values())
    allowed = max(1e-3, 8 * eps)
    # Hidden keys have the most negative number of the model's own precision, or minus infinity.
    for site, value in seen.items():
        if site.name == "attn_scores":
            hidden = value <= 0.9 * max(torch.finfo(value.dtype).min, -1e30)
            seen[site] = value.float().masked_fill(hidden, -torch.inf)
    layers = [
        {name: seen[Site(name, x)][0].float() for name in names if Site(name, x) in seen}
        for x in range(info.n_layers)
    ]
    cap = max(0.0, float(getattr(model.cfg, "attn_scores_soft_cap", None) or 0))
    ways: list[tuple[Rotation, Pairing]] = [("read", ""), ("none", "")]
    ways += [("made", pairing) for pairing in PAIRINGS]
    for rotation, pairing in ways:
        # A cap that the model declares comes first: where logits are small it changes little, and
        # both would fit.
        for one in dict.fromkeys((cap, 0.0)):
            fits = [_fit(layer, rotation, pairing, one) for layer in layers]
            if any(not error <= allowed for _, error in fits):
                continue
            scale = tuple(factor for factor, _ in fits)
            normed = False
            if rotation == "read":
                pairing, normed = _before_rotation(layers, max(1e-2, 4 * eps))
            return QueryKeyPlan(rotation, pairing, normed, scale, one)
    return QueryKeyPlan("unknown", "", False, (), 0.0)


def _fit(
    seen: dict[str, Tensor], rotation: Rotation, pairing: Pairing, cap: float
) -> tuple[float, float]:
    """Scale of one layer's logits under one assumption, and the largest relative error."""
    made = _rotated(seen, rotation, pairing)
    if made is None or "attn_scores" not in seen:
        return 0.0, float("inf")
    q, k = made
    scores = seen["attn_scores"]
    product = torch.einsum("qhd,khd->hqk", q, by_query_head(k, q.shape[1]))
    visible = torch.isfinite(scores)
    if bool(visible[0, 0, 1:].any()):  # not scores, but weights
        return 0.0, float("inf")
    wanted, product = scores[visible], product[visible]
    if cap:
        wanted = cap * torch.atanh((wanted / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    scale = float((wanted * product).sum() / product.square().sum().clamp_min(1e-30))
    error = (scale * product - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return scale, float(error)


def _rotated(
    seen: dict[str, Tensor], rotation: Rotation, pairing: Pairing
) -> tuple[Tensor, Tensor] | None:
    if rotation == "read":
        return (seen["rot_q"], seen["rot_k"]) if {"rot_q", "rot_k"} <= set(seen) else None
    if not {"q", "k"} <= set(seen):
        return None
    if rotation == "none":
        return seen["q"], seen["k"]
    if not _fits(seen, pairing):
        return None
    angles = seen["rotary_cos"], seen["rotary_sin"]
    return rotate(seen["q"], *angles, pairing), rotate(seen["k"], *angles, pairing)


def _fits(seen: dict[str, Tensor], pairing: Pairing) -> bool:
    """Whether there are angles, and not more of them than dimensions."""
    if not {"q", "k", "rotary_cos", "rotary_sin"} <= set(seen):
        return False
    cos = seen["rotary_cos"]
    width = cos.shape[-1] * (2 if pairing == "doubled halves" else 1)
    return cos.ndim == 2 and len(cos) == len(seen["q"]) and width <= seen["q"].shape[-1]


def _before_rotation(layers: list[dict[str, Tensor]], allowed: float) -> tuple[Pairing, bool]:
    """How the shown rotation paired dimensions, and whether a norm stands before it."""
    plain = all({"q", "k"} <= set(seen) for seen in layers)
    for pairing in PAIRINGS:
        if not all(_fits(seen, pairing) for seen in layers):
            continue
        undone = [
            [
                (seen[name], rotate(seen[f"rot_{name}"], *_angles(seen), pairing, back=True))
                for name in ("q", "k")
            ]
            for seen in layers
        ]
        pairs = [pair for layer in undone for pair in layer]
        if all(_relative(made, shown) <= allowed for shown, made in pairs):
            return pairing, False
        if all(_is_norm_of(made, shown, allowed) for shown, made in pairs):
            return pairing, True
    kept = plain and all(
        _relative(seen[f"rot_{name}"].norm(dim=-1), seen[name].norm(dim=-1)) <= allowed
        for seen in layers
        for name in ("q", "k")
    )
    return "", not kept


def _angles(seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return seen["rotary_cos"], seen["rotary_sin"]


def _relative(made: Tensor, shown: Tensor) -> float:
    return float((made - shown).abs().max() / shown.abs().max().clamp_min(1e-30))


def _is_norm_of(
    made: Float[Tensor, "token head d_head"],
    shown: Float[Tensor, "token head d_head"],
    allowed: float,
) -> bool:
    """Whether each head is the shown one times a number for each token and one for each dimension:
    what a root-mean-square norm does, and no rotation that was undone wrongly."""
    by_token = torch.ones_like(shown[..., :1])
    by_dimension = torch.ones_like(shown[:1])
    for _ in range(30):  # alternating least squares, in which large entries weigh more
        scaled = shown * by_dimension
        by_token = (made * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
        scaled = shown * by_token
        by_dimension = (made * scaled).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True)
    return _relative(shown * by_token * by_dimension, made) <= allowed


__all__ = [
    "QueryKeyPlan",
    "by_query_head",
    "query_key_biases",
    "query_key_plan",
    "rotate",
]
