"""Sites: the places in a model where an activation can be read or edited.

Everything that knows the name of a hook is in this file. The rest of the library speaks of *sites*:

>>> Site("resid_post", 3)          # the residual stream after block 3
>>> Site("k", 3)                   # the keys of layer 3
>>> Site("final_norm")             # the output of the norm before the unembedding

A site has the same name and shape in both TransformerLens generations (`TransformerBridge` and
`HookedTransformer`). TransformerLens' own name of a layer's hook is accepted wherever a user names
a site: `"blocks.3.hook_resid_post"` is `Site("resid_post", 3)`.
"""

from __future__ import annotations

import re
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
"""Hook of every site that each layer has. Without the batch dimension, residual sites and
`attn_out`, `mlp_out` are [token, d_model]; `q`, `k`, `v`, `z` are [token, head, d_head] (key-value
heads under grouped-query attention), and so are `rot_q`, `rot_k`, the queries and keys after the
rotary embedding, which not every model with one shows; `rotary_cos`, `rotary_sin` are [token,
rotated dimension]; `attn_scores`, `pattern` are [head, query, key]; `mlp_in` (what the MLP reads:
after the norm before it, if there is one) and `mlp_raw` (what it gives: before the norm behind it,
if there is one, where `mlp_out` is after it) are [token, d_model]; `mlp_pre`, `mlp_pre_linear`,
`mlp_post` are [token, d_mlp] (or [token, d_model] in mixture-of-experts blocks)."""

MODULE_SITES: dict[str, Literal["input", "output"]] = {"mlp_in": "input", "mlp_raw": "output"}
"""Sites that are the input or the output of the block's MLP module, which are read there in hosts
that have no such hook (`HookedTransformer`)."""

_SITE_OF_HOOK = {hook.removeprefix("blocks.{layer}."): site for site, hook in SITE_HOOKS.items()}

FINAL_NORM = "final_norm"
"""The one site that belongs to no layer: the final norm's output, [token, d_model], which is what
Hugging Face calls `hidden_states[-1]`. No hook has this value in both generations, so it is read
by an ordinary module hook."""

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


def missing_sites(model: Any, sites: Iterable[Site]) -> list[Site]:
    """Those of the sites that `model` does not have."""
    # Once for all: a bridge makes the dictionary anew whenever it is asked for, in milliseconds.
    points = model.hook_dict

    def exists(site: Site) -> bool:
        if site.name == FINAL_NORM:
            return isinstance(getattr(model, "ln_final", None), torch.nn.Module)
        return _hook_of(site) in points or module_of_site(model, site, points) is not None

    return [site for site in sites if not exists(site)]


def layer_sites(names: Iterable[str], n_layers: int) -> list[Site]:
    """Every site of the given names: one a layer, or the single final norm."""
    sites: list[Site] = []
    for name in dict.fromkeys(names):
        if name == FINAL_NORM:
            sites.append(Site(name))
        elif name in SITE_HOOKS:
            sites.extend(Site(name, layer) for layer in range(n_layers))
        else:
            raise InputError(
                f"no site {name!r}; there are {', '.join(SITE_HOOKS)} and {FINAL_NORM}"
            )
    return sites


def hook_names(model: Any, sites: Iterable[Site]) -> list[str]:
    """The canonical hook name of each site.

    The bridge calls a function once for the alias and once more for the canonical name in
    compatibility mode; asking for the canonical name itself gives one call everywhere.

    Raises:
        InputError: there is no such site.
        ModelError: this model has none.
    """
    points = model.hook_dict
    return [hook_of_site(model, site, points) for site in sites]


def hook_of_site(model: Any, site: Site, points: Mapping[str, Any]) -> str:
    """The canonical hook name of one site; `points` is the model's `hook_dict`."""
    hook = _hook_of(site)
    if hook is None:
        raise InputError(f"no site {site.name!r}; there are {', '.join(SITE_HOOKS)}")
    point = points.get(hook)
    if point is None:
        raise ModelError(
            f"{name_of(model)!r} has no {spell_site(site)} (no hook {hook}):"
            " its blocks lack it, so what is read there cannot be measured in this model"
        )
    return str(point.name)


def _hook_of(site: Site) -> str | None:
    template = SITE_HOOKS.get(site.name)
    return None if template is None else template.format(layer=site.layer)


def module_of_site(model: Any, site: Site, points: Mapping[str, Any]) -> torch.nn.Module | None:
    """The module whose input or output a site is, in a host that has no hook for it."""
    if site.name not in MODULE_SITES or site.layer is None or _hook_of(site) in points:
        return None
    blocks = getattr(model, "blocks", ())
    module = getattr(blocks[site.layer], "mlp", None) if site.layer < len(blocks) else None
    return module if isinstance(module, torch.nn.Module) else None


def spell_site(site: Site) -> str:
    """The site in words."""
    return site.name if site.layer is None else f"{site.name} of layer {site.layer}"
