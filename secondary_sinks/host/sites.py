"""Sites: the places in a model where an activation can be read or edited.

This is the only file that knows the names of hooks. The rest of the library speaks of *sites*:

>>> Site("resid_post", 3)          # the residual stream after block 3
>>> Site("k", 3)                   # the keys of layer 3
>>> Site("final_norm")             # the output of the norm before the unembedding

A site has the same name and shape in both TransformerLens generations (`TransformerBridge` and
`HookedTransformer`). Wherever a user names a site, TransformerLens' name of a layer's hook is
accepted as well: `"blocks.3.hook_resid_post"` is `Site("resid_post", 3)`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import torch

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.model_info import name_of

SITE_HOOKS: dict[str, str] = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "z": "blocks.{layer}.attn.hook_z",
    "q_gate": "blocks.{layer}.attn.hook_q_gate",
    "rot_q": "blocks.{layer}.attn.hook_rot_q",
    "rot_k": "blocks.{layer}.attn.hook_rot_k",
    "rotary_cos": "blocks.{layer}.attn.hook_cos",
    "rotary_sin": "blocks.{layer}.attn.hook_sin",
    "attn_scores": "blocks.{layer}.attn.hook_attn_scores",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "mlp_in": "blocks.{layer}.mlp.hook_in",
    "mlp_raw": "blocks.{layer}.mlp.hook_out",
    "mlp_pre": "blocks.{layer}.mlp.hook_pre",
    "mlp_pre_linear": "blocks.{layer}.mlp.hook_pre_linear",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
}
"""The hook of every site that each layer has.

Shapes, without the batch dimension:

* residual sites, `attn_out`, `mlp_out`: [token, d_model]. In a layer that mixes tokens without
  attention (by a state space, a convolution or linear attention), `attn_out` is what that mixer
  adds;
* `q`, `k`, `v`, `z`: [token, head, d_head], with key-value heads under grouped-query attention,
  whichever way the model lays them out (`host.head_layout`). With latent attention (DeepSeek) `q`
  and `k` hold the rotary part already; with gated attention (Qwen3-Next) `z` is after the gate;
* `q_gate`: [token, head * d_head], the logit of the gate on each entry of `z`, in gated attention;
* `rot_q`, `rot_k`: the same, after the rotary embedding (not every model with one shows them);
* `rotary_cos`, `rotary_sin`: [token, rotated dimension];
* `attn_scores`, `pattern`: [head, query, key];
* `mlp_in`, what the MLP reads (after the norm before it), and `mlp_raw`, what it returns (before
  the norm after it, if there is one, where `mlp_out` is after that norm): [token, d_model];
* `mlp_pre`, `mlp_pre_linear`, `mlp_post`: [token, d_mlp], or [token, d_model] in
  mixture-of-experts blocks.
"""

MODULE_SITES: dict[str, Literal["input", "output"]] = {"mlp_in": "input", "mlp_raw": "output"}
"""Sites that are the input or the output of a block's MLP module, and are read there in models
without such a hook (`HookedTransformer`)."""

FINAL_NORM = "final_norm"
"""The one site that belongs to no layer: the final norm's output, [token, d_model], which is what
Hugging Face calls `hidden_states[-1]`. No hook has this value in both generations, so it is read
by an ordinary module hook."""

_MIXERS = ("linear_attn", "mixer", "conv", "mamba", "time_mix")
"""Names that TransformerLens gives to what mixes tokens without attention: linear attention, state
spaces, convolutions."""

_SITE_OF_HOOK = {hook.removeprefix("blocks.{layer}."): site for site, hook in SITE_HOOKS.items()}
_HOOK_OF_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


class Site(NamedTuple):
    """A place in the model where an activation can be read."""

    name: str
    layer: int | None = None


def site_named(name: str) -> Site:
    """The site that a user names, without a layer if the name is that of a site in every layer.

    Args:
        name: a site of `SITE_HOOKS`, `final_norm`, or TransformerLens' name of one layer's hook.

    Raises:
        InputError: an unknown name; the message offers the nearest ones.
    """
    match = _HOOK_OF_LAYER.fullmatch(name)
    if match and match[2] in _SITE_OF_HOOK:
        return Site(_SITE_OF_HOOK[match[2]], int(match[1]))
    if name in SITE_HOOKS or name == FINAL_NORM:
        return Site(name)
    if match:
        nearest = get_close_matches(match[2], _SITE_OF_HOOK)
        nearest = [f"blocks.{match[1]}.{hook}" for hook in nearest]
    else:
        nearest = get_close_matches(name, [*SITE_HOOKS, FINAL_NORM])
    offer = (
        f"did you mean {' or '.join(map(repr, nearest))}?"
        if nearest
        else f"the sites are {', '.join(SITE_HOOKS)} and {FINAL_NORM}, or the name of one layer's "
        "hook of these, such as 'blocks.3.hook_resid_post'"
    )
    raise InputError(f"no site {name!r}; {offer}")


def layer_sites(names: Iterable[str], n_layers: int) -> list[Site]:
    """Every site that the names stand for, once: one in each layer, that of one hook, or the final
    norm.

    Raises:
        InputError: an unknown name (see `site_named`), or a hook of a layer that does not exist.
    """
    sites: list[Site] = []
    for name in names:
        site = site_named(name)
        if site.layer is None and site.name != FINAL_NORM:
            sites.extend(Site(site.name, layer) for layer in range(n_layers))
        elif site.layer is None or site.layer < n_layers:
            sites.append(site)
        else:
            raise InputError(f"no site {name!r}: the model's layers are 0 to {n_layers - 1}")
    return list(dict.fromkeys(sites))


def missing_sites(model: Any, sites: Iterable[Site]) -> list[Site]:
    """Those of the sites that `model` does not have."""
    # Read once: a bridge makes this dictionary anew at every access, which takes milliseconds.
    points = model.hook_dict

    def exists(site: Site) -> bool:
        if site.name == FINAL_NORM:
            return isinstance(getattr(model, "ln_final", None), torch.nn.Module)
        return _hook_of(site, points) in points or module_of_site(model, site, points) is not None

    return [site for site in sites if not exists(site)]


def hook_names(model: Any, sites: Iterable[Site]) -> list[str]:
    """The canonical hook name of each site.

    In compatibility mode the bridge calls a function once for the alias and once more for the
    canonical name; a hook on the canonical name is called once everywhere.

    Raises:
        InputError: an unknown site.
        ModelError: this model lacks the site.
    """
    points = model.hook_dict
    return [hook_of_site(model, site, points) for site in sites]


def hook_of_site(model: Any, site: Site, points: Mapping[str, Any]) -> str:
    """The canonical hook name of one site; `points` is the model's `hook_dict`."""
    hook = _hook_of(site, points)
    if hook is None:
        raise InputError(f"no site {site.name!r}; the sites are {', '.join(SITE_HOOKS)}")
    point = points.get(hook)
    if point is None:
        raise ModelError(
            f"{name_of(model)!r} has no {spell_site(site)} (hook {hook}): its blocks lack it, so "
            "it cannot be measured in this model"
        )
    return str(point.name)


def module_of_site(model: Any, site: Site, points: Mapping[str, Any]) -> torch.nn.Module | None:
    """The module whose input or output a site is, in a model that has no hook for it."""
    if site.name not in MODULE_SITES or site.layer is None or _hook_of(site, points) in points:
        return None
    blocks = getattr(model, "blocks", ())
    module = getattr(blocks[site.layer], "mlp", None) if site.layer < len(blocks) else None
    return module if isinstance(module, torch.nn.Module) else None


def spell_site(site: Site) -> str:
    """The site in words."""
    return site.name if site.layer is None else f"{site.name} of layer {site.layer}"


_attention_layers: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = weakref.WeakKeyDictionary()
_recurrent_layers: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = weakref.WeakKeyDictionary()
"""Of the models that were asked for them: reading a bridge's hook names takes milliseconds."""


def attention_layers(model: Any) -> tuple[int, ...]:
    """The layers whose attention the model shows: all of them in most models, some in hybrids of
    attention with state spaces, convolutions or linear attention, none in models without it."""
    if model not in _attention_layers:
        points, layers = model.hook_dict, range(int(model.cfg.n_layers))
        shown = (layer for layer in layers if _hook_of(Site("pattern", layer), points) in points)
        _attention_layers[model] = tuple(shown)
    return _attention_layers[model]


def layers_with_keys(model: Any) -> tuple[int, ...]:
    """The layers with attention that have keys and values of their own; in some models the last
    layers use those of earlier ones (Gemma 4)."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    n_own = int(model.cfg.n_layers) - int(getattr(config, "num_kv_shared_layers", None) or 0)
    return tuple(layer for layer in attention_layers(model) if layer < n_own)


def need_attention_everywhere(model: Any, what: str) -> None:
    """Raise `ModelError` for a hybrid, whose heads `what` cannot compare over all layers."""
    without = set(range(int(model.cfg.n_layers))) - set(attention_layers(model))
    if without:
        raise ModelError(
            f"{what} reads the heads of every layer, and {spell_layers(sorted(without))} of "
            f"{name_of(model)!r} have no attention; counterfactuals and attribute_to_mlps can be "
            "used there"
        )


def recurrent_layers(model: Any) -> tuple[int, ...]:
    """The layers in which something else than attention, or beside it, mixes tokens: a state or a
    convolution that each token hands to the next."""
    if model not in _recurrent_layers:
        points, attention = model.hook_dict, set(attention_layers(model))
        _recurrent_layers[model] = tuple(
            layer
            for layer in range(int(model.cfg.n_layers))
            if layer not in attention
            or any(f"blocks.{layer}.{mixer}.hook_out" in points for mixer in _MIXERS)
        )
    return _recurrent_layers[model]


def spell_layers(layers: Iterable[int]) -> str:
    """Layers in words: "layer 3", "layers 0, 2 and 4"."""
    *others, last = map(str, layers)
    return f"layers {', '.join(others)} and {last}" if others else f"layer {last}"


def _hook_of(site: Site, points: Mapping[str, Any]) -> str | None:
    template = SITE_HOOKS.get(site.name)
    if template is None:
        return None
    hook = template.format(layer=site.layer)
    block = f"blocks.{site.layer}."
    if site.name == "attn_out" and hook not in points and f"{block}hook_mlp_out" in points:
        # In a block without an MLP beside it, a mixer may be the MLP itself (Nemotron-H).
        mixers = (f"{block}{mixer}.hook_out" for mixer in _MIXERS)
        return next((mixer for mixer in mixers if mixer in points), hook)
    return hook
