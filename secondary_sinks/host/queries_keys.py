"""Queries and keys as the attention uses them, in models that expose them in different ways.

A logit is `scale * q . k`. Its q and k include their biases, in some models a norm (Qwen 3,
Gemma 3, OLMo 2), and the rotary embedding, which turns pairs of dimensions by an angle that grows
with the position. The hooks of a model show this

* after the rotation (`rot_q`, `rot_k`): most models with a rotary embedding;
* before the rotation, with the cosines and sines of the angles (GPT-NeoX, Phi 3): the rotation is
  then computed here;
* without a rotation, because the model has none (GPT-2).

Which of these holds, how dimensions are paired, whether there is a norm, the scale, and whether
logits are capped is measured and not read from a configuration: `query_key_plan` runs a few tokens
once per model and takes what reproduces the model's own scores.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.host.forward import fired
from secondary_sinks.host.hooks_aside import hooks_aside
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.sites import Site
from secondary_sinks.host.visible_keys import is_visible

Rotation = Literal["none", "read", "computed", "unknown"]
Pairing = Literal["", "halves", "doubled halves", "neighbors", "repeated neighbors"]


class _Layout(NamedTuple):
    """How dimensions are paired, and how the cosines of the pairs are laid out."""

    dimensions: str
    angles: str
    copies: int
    """How often the cosine of each pair is given."""


_LAYOUTS: dict[Pairing, _Layout] = {
    "halves": _Layout("(half pair)", "(copy pair)", 2),
    "doubled halves": _Layout("(half pair)", "(copy pair)", 1),
    "neighbors": _Layout("(pair half)", "(copy pair)", 2),
    "repeated neighbors": _Layout("(pair half)", "(pair copy)", 2),
}
PAIRINGS = tuple(_LAYOUTS)
"""How dimensions are paired: i with i + d/2 (the cosines given twice, or once), or 2i with 2i + 1
(the cosines of the pairs given in two halves, or each one twice in a row)."""

_N_PROBED = 12

_plans: weakref.WeakKeyDictionary[Any, QueryKeyPlan] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class QueryKeyPlan:
    """How the logits of one model follow from what its hooks show."""

    rotation: Rotation
    """"read": `rot_q` and `rot_k` are shown; "computed": they follow from `q`, `k` and the angles;
    "none": there is no rotation; "unknown": nothing reproduces the scores."""
    pairing: Pairing
    """Empty where no rotation can be computed or undone."""
    normed: bool
    """Whether `q` and `k` are normalized after the point where they are shown."""
    scale: tuple[float, ...]
    """Factor of each layer's logits."""
    cap: float
    """Logits pass `cap * tanh(logit / cap)`; 0 if they do not."""
    n_heads: int
    """Query heads of a layer."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that logits and their parts are computed from."""
        if self.rotation == "unknown":
            return ()
        rotated = ("rot_q", "rot_k") if self.rotation == "read" else ()
        angles = ("rotary_cos", "rotary_sin") if self.pairing else ()
        return ("q", "k", *rotated, *angles)

    @property
    def splits_rotation(self) -> bool:
        """Whether logits without the rotation are known."""
        return self.rotation != "unknown" and (bool(self.pairing) or not self.normed)

    @property
    def splits_biases(self) -> bool:
        """Whether the parts of the biases are known: no norm comes after them, and a rotation, if
        there is one, can be applied to them."""
        return not self.normed and (self.rotation == "none" or bool(self.pairing))

    def rotated(
        self, seen: Mapping[str, Tensor], name: Literal["q", "k"]
    ) -> Float[Tensor, " token head d_head"]:
        """Queries or keys as the logits use them, from a layer's activations at `sites`."""
        return by_query_head(_rotated(seen, name, self.rotation, self.pairing), self.n_heads)

    def unrotated(
        self, seen: Mapping[str, Tensor], name: Literal["q", "k"]
    ) -> Float[Tensor, " token head d_head"]:
        """The same before the rotation and after a norm."""
        value = seen[name]
        if self.normed and self.pairing:
            value = rotate(seen[f"rot_{name}"], *_angles(seen), self.pairing, back=True)
        return by_query_head(value, self.n_heads)

    def biases(
        self, seen: Mapping[str, Tensor], bias: Float[Tensor, " any_head d_head"] | None
    ) -> tuple[Float[Tensor, " token head d_head"], Float[Tensor, " token head d_head"]]:
        """A bias of queries or keys at every token, before and after the rotation; zeros where
        there is none or its part is not known (`splits_biases`)."""
        if bias is None or not self.splits_biases:
            zeros = torch.zeros_like(by_query_head(seen["q"], self.n_heads))
            return zeros, zeros
        plain = bias.to(seen["q"].device).expand(len(seen["q"]), *bias.shape)
        rotated = plain
        if self.rotation != "none":
            rotated = rotate(plain, *_angles(seen), self.pairing)
        return by_query_head(plain, self.n_heads), by_query_head(rotated, self.n_heads)


def query_key_plan(model: Any) -> QueryKeyPlan:
    """How does a model compute its logits from queries and keys? Measured once per model."""
    if model not in _plans:
        _plans[model] = _find_plan(model)
    return _plans[model]


def rotate(
    x: Float[Tensor, " token head d_head"],
    cos: Float[Tensor, " token rotated"],
    sin: Float[Tensor, " token rotated"],
    pairing: Pairing,
    *,
    back: bool = False,
) -> Float[Tensor, " token head d_head"]:
    """Turn each pair of dimensions by its angle, or back; dimensions beyond the rotated ones stay.

    Cosines and sines may have a length other than 1 (YaRN scales them); `back` divides by it.
    """
    dimensions, angles, copies = _LAYOUTS[pairing]
    cos, sin = (
        rearrange(value, f"token {angles} -> copy token 1 pair", copy=copies)[0]
        for value in (cos, sin)
    )
    if back:
        length = cos.square() + sin.square()
        cos, sin = cos / length, -sin / length
    width = 2 * cos.shape[-1]
    first, second = rearrange(
        x[..., :width], f"token head {dimensions} -> half token head pair", half=2
    )
    turned = rearrange(
        [first * cos - second * sin, second * cos + first * sin],
        f"half token head pair -> token head {dimensions}",
    )
    return torch.cat([turned, x[..., width:]], dim=-1)


def by_query_head(
    k: Float[Tensor, " token kv_head d_head"], n_heads: int
) -> Float[Tensor, " token head d_head"]:
    """Keys or values of grouped-query attention, repeated for each query head."""
    group = n_heads // k.shape[1]
    return repeat(k, "token kv_head d_head -> token (kv_head group) d_head", group=group)


def query_key_biases(
    model: Any, layer: int
) -> tuple[Float[Tensor, " head d_head"] | None, Float[Tensor, " kv_head d_head"] | None]:
    """Biases of queries and keys; None where there are none, or not by head (latent attention)."""
    try:
        biases = [getattr(model.blocks[layer].attn, name, None) for name in ("b_Q", "b_K")]
    except NotImplementedError:
        return None, None
    query, key = (
        bias.detach().float()
        if isinstance(bias, Tensor) and bias.ndim == 2 and bool((bias != 0).any())
        else None
        for bias in biases
    )
    return query, key


def _find_plan(model: Any) -> QueryKeyPlan:
    layers, eps = _probe(model)
    n_heads = int(model.cfg.n_heads)
    declared = max(0.0, float(getattr(model.cfg, "attn_scores_soft_cap", None) or 0))
    ways: list[tuple[Rotation, Pairing]] = [("read", ""), ("none", "")]
    ways.extend(("computed", pairing) for pairing in PAIRINGS)
    # A cap that the model declares comes first: where logits are small it changes little, and both
    # would fit.
    for (rotation, pairing), cap in itertools.product(ways, dict.fromkeys((declared, 0.0))):
        fits = [_fit(seen, rotation, pairing, cap) for seen in layers]
        if not all(error <= max(1e-3, 8 * eps) for _, error in fits):
            continue
        normed = False
        if rotation == "read":
            pairing, normed = _before_rotation(layers, max(1e-2, 4 * eps))
        scales = tuple(scale for scale, _ in fits)
        return QueryKeyPlan(rotation, pairing, normed, scales, cap, n_heads)
    return QueryKeyPlan("unknown", "", False, (), 0.0, n_heads)


def _probe(model: Any) -> tuple[list[dict[str, Tensor]], float]:
    """What each layer shows of a few arbitrary tokens, by site, and the model's precision."""
    info = describe(model)
    n_tokens = min(_N_PROBED, info.n_ctx or _N_PROBED)
    tokens = ((7 * torch.arange(n_tokens) + 3) % int(model.cfg.d_vocab))[None]
    names = ("q", "k", "rot_q", "rot_k", "rotary_cos", "rotary_sin", "attn_scores")
    n_layers = int(model.cfg.n_layers)
    with hooks_aside(model):
        seen = fired(model, tokens, [Site(name, x) for name in names for x in range(n_layers)])
    layers: list[dict[str, Tensor]] = [{} for _ in range(n_layers)]
    for (name, layer), value in seen.items():
        activation = value[0].float()
        if name == "attn_scores":
            activation = activation.masked_fill(~is_visible(value[0]), -torch.inf)
        layers[int(layer or 0)][name] = activation
    return layers, max(torch.finfo(value.dtype).eps for value in seen.values())


def _fit(
    seen: Mapping[str, Tensor], rotation: Rotation, pairing: Pairing, cap: float
) -> tuple[float, float]:
    """Scale of one layer's logits under one assumption, and the largest relative error."""
    needed = {"rot_q", "rot_k"} if rotation == "read" else {"q", "k"}
    if not needed | {"attn_scores"} <= set(seen) or (pairing and not _has_angles(seen, pairing)):
        return 0.0, float("inf")
    q, k = (_rotated(seen, name, rotation, pairing) for name in ("q", "k"))
    product = einsum(q, by_query_head(k, q.shape[1]), "query head d, key head d -> head query key")
    visible = torch.isfinite(seen["attn_scores"])
    if bool(visible[0, 0, 1:].any()):  # weights, not scores
        return 0.0, float("inf")
    wanted, product = seen["attn_scores"][visible], product[visible]
    if cap:
        wanted = cap * torch.atanh((wanted / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    scale = float((wanted * product).sum() / product.square().sum().clamp_min(1e-30))
    return scale, _relative_error(scale * product, wanted)


def _rotated(
    seen: Mapping[str, Tensor], name: str, rotation: Rotation, pairing: Pairing
) -> Float[Tensor, " token head d_head"]:
    if rotation == "read":
        return seen[f"rot_{name}"]
    return rotate(seen[name], *_angles(seen), pairing) if rotation == "computed" else seen[name]


def _angles(seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return seen["rotary_cos"], seen["rotary_sin"]


def _has_angles(seen: Mapping[str, Tensor], pairing: Pairing) -> bool:
    """Whether there are angles in this layout, and not more of them than dimensions."""
    if not {"q", "k", "rotary_cos", "rotary_sin"} <= set(seen):
        return False
    cos, copies = seen["rotary_cos"], _LAYOUTS[pairing].copies
    if cos.ndim != 2 or len(cos) != len(seen["q"]) or cos.shape[-1] % copies:
        return False
    return 2 * cos.shape[-1] // copies <= seen["q"].shape[-1]


def _before_rotation(layers: list[dict[str, Tensor]], allowed: float) -> tuple[Pairing, bool]:
    """How the rotation that is shown paired dimensions, and whether a norm comes before it."""
    for pairing in PAIRINGS:
        if not all(_has_angles(seen, pairing) for seen in layers):
            continue
        pairs = [
            (rotate(seen[f"rot_{name}"], *_angles(seen), pairing, back=True), seen[name])
            for seen in layers
            for name in ("q", "k")
        ]
        if all(_relative_error(undone, shown) <= allowed for undone, shown in pairs):
            return pairing, False
        if all(_is_norm_of(undone, shown, allowed) for undone, shown in pairs):
            return pairing, True
    keeps_norms = all({"q", "k"} <= set(seen) for seen in layers) and all(
        _relative_error(seen[f"rot_{name}"].norm(dim=-1), seen[name].norm(dim=-1)) <= allowed
        for seen in layers
        for name in ("q", "k")
    )
    return "", not keeps_norms


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _is_norm_of(
    normed: Float[Tensor, " token head d_head"],
    shown: Float[Tensor, " token head d_head"],
    allowed: float,
) -> bool:
    """Whether each head is the shown one times a number for each token and one for each dimension:
    what a root-mean-square norm does, and a rotation that was undone wrongly does not."""
    by_token = torch.ones_like(shown[..., :1])
    by_dimension = torch.ones_like(shown[:1])
    for _ in range(30):  # alternating least squares, in which large entries weigh more
        scaled = shown * by_dimension
        by_token = (normed * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
        scaled = shown * by_token
        by_dimension = (normed * scaled).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True)
    return _relative_error(shown * by_token * by_dimension, normed) <= allowed
