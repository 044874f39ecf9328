"""The host: what a TransformerLens model offers, and one observed forward pass through it.

Everything that knows the name of a hook is in this file. The rest of the library speaks of *sites*:

>>> Site("resid_post", 3)          # the residual stream after block 3
>>> Site("k", 3)                   # the keys of layer 3
>>> Site("final_norm")             # the output of the norm before the unembedding

A site has the same name and shape in both TransformerLens generations (`TransformerBridge` and
`HookedTransformer`). `observe` runs the model once and hands each activation to a function as it
appears. The host can fail silently (a hook that exists and never fires, a sum that does not
hold in an unusual block), so `forward` counts what fired, and raises; whether the residual stream
is the sum that everything rests on is checked in `host.identity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.condition import processing, refuse_dropout

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

_MODULE_SITES: dict[str, Literal["input", "output"]] = {"mlp_in": "input", "mlp_raw": "output"}
"""Sites that are the input or the output of the block's MLP module, which are read there in hosts
that have no such hook (`HookedTransformer`)."""

FINAL_NORM = "final_norm"
"""The one site that belongs to no layer: the final norm's output, [token, d_model], which is what
Hugging Face calls `hidden_states[-1]`. No hook has this value in both generations, so it is read
by an ordinary module hook."""


class Site(NamedTuple):
    """A place in the model where an activation can be read."""

    name: str
    layer: int | None = None


Observer = Callable[[Tensor], None]
Editor = Callable[[Tensor], "Tensor | None"]
UserHook = tuple[Any, Callable[..., Any]]


@dataclass(frozen=True)
class HostInfo:
    """What is recorded of the measured model with every result."""

    name: str
    generation: Literal["bridge", "hooked", "other"]
    n_layers: int
    n_heads: int
    d_model: int
    n_ctx: int | None
    dtype: str
    processing: tuple[str, ...]
    """How the weights differ from the raw ones (empty: raw). Sinks are defined on raw weights;
    folding or centering changes residual norms and cosines."""

    @property
    def is_processed(self) -> bool:
        """Whether the weights were changed after loading."""
        return bool(self.processing)


def describe(model: Any) -> HostInfo:
    """Read what the library needs to know of `model` from its configuration.

    Raises:
        ModelError: `model` is not a TransformerLens model, or is not causal.
    """
    missing = [name for name in ("cfg", "run_with_hooks", "to_tokens") if not hasattr(model, name)]
    if missing:
        raise ModelError(
            f"{type(model).__name__} has no {', '.join(missing)}: pass a TransformerLens model "
            "(TransformerBridge or HookedTransformer), such as load_model(...) returns"
        )
    cfg = model.cfg
    config = getattr(getattr(model, "original_model", None), "config", None)
    if (
        getattr(cfg, "attention_dir", "causal") != "causal"
        or getattr(config, "is_encoder_decoder", False)
        or not hasattr(model, "unembed")
    ):
        raise ModelError(
            f"{_name(model)!r} is not a causal language model; in an encoder every token sees "
            "every other, and attention sinks are not defined in the sense used here"
        )
    return HostInfo(
        name=_name(model),
        generation=_generation(model),
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        d_model=int(cfg.d_model),
        n_ctx=int(cfg.n_ctx) if getattr(cfg, "n_ctx", None) else None,
        dtype=str(getattr(cfg, "dtype", "")).removeprefix("torch."),
        processing=processing(model),
    )


def observe(
    model: Any,
    tokens: Int[Tensor, "batch token"],
    attention_mask: Int[Tensor, "batch token"],
    observers: Mapping[Site, Observer],
    *,
    fwd_hooks: Sequence[UserHook] = (),
) -> None:
    """Run `model` once over `tokens` and hand every observed activation to its observer.

    Observers see each activation with its batch dimension first, after any hook of the user's own
    (those already on the model, and `fwd_hooks`) has edited it, and must not change it. Logits are
    computed for the last position only where the host allows, no gradient is kept, and all hooks
    that this call added are gone when it returns or raises.

    Args:
        model: any TransformerLens model.
        tokens: token ids, padded on the right.
        attention_mask: 1 for tokens, 0 for padding.
        observers: one function a site.
        fwd_hooks: further `(hook name, function)` pairs, as `run_with_hooks` takes them; they run
            before the observers, so that the observers see what they changed.

    Raises:
        ModelError: a site does not exist in this model, or its hook did not fire exactly once, or
            the model is in training mode with dropout (its activations would be random).
    """

    def reader(observer: Observer) -> Editor:
        def read(activation: Tensor) -> None:
            observer(activation)

        return read

    forward(
        model,
        tokens,
        [(site, reader(observer)) for site, observer in observers.items()],
        fwd_hooks=fwd_hooks,
        attention_mask=attention_mask,
    )


def forward(
    model: Any,
    tokens: Int[Tensor, "batch token"],
    editors: Sequence[tuple[Site, Editor]],
    *,
    fwd_hooks: Sequence[UserHook] = (),
    logits: bool = False,
    **arguments: Any,
) -> Float[Tensor, "batch token d_vocab"] | None:
    """One forward pass in which functions see activations and may replace them.

    Args:
        model: any TransformerLens model.
        tokens: token ids.
        editors: pairs of a site and a function of its activation, which returns None or a new
            activation. Several at one site run in the order given.
        fwd_hooks: `(hook name, function)` pairs that run before all of them.
        logits: compute and return the logits of all positions.
        **arguments: for the model's own forward (`attention_mask`, `position_ids`).

    Raises:
        ModelError: as `observe`.
    """
    refuse_dropout(model, _name(model))
    fired = [0] * len(editors)

    def hook_of(index: int, editor: Editor) -> Callable[..., Tensor | None]:
        def hook(activation: Tensor, hook: Any = None) -> Tensor | None:
            fired[index] += 1
            return editor(activation.detach())

        return hook

    hooks: list[UserHook] = []
    points = model.hook_dict
    with torch.no_grad(), ExitStack() as stack:
        for index, (site, editor) in enumerate(editors):
            hook = hook_of(index, editor)
            if site.name == FINAL_NORM:
                stack.enter_context(_final_norm_hook(model, hook))
            elif (module := _module_of(model, site, points)) is not None:
                stack.enter_context(_module_hook(module, _MODULE_SITES[site.name], hook))
            else:
                hooks.append((_canonical(model, site, points), hook))
        device = _input_device(model)
        placed = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        out = model.run_with_hooks(
            tokens.to(device),
            fwd_hooks=[*fwd_hooks, *hooks],
            return_type="logits" if logits else None,
            **placed,
            **_cheap_forward_arguments(model, logits=logits),
        )
    wrong = [(editors[index][0], count) for index, count in enumerate(fired) if count != 1]
    if wrong:
        site, count = wrong[0]
        raise ModelError(
            f"the hook of {_spell(site)} fired {count} times in one forward pass of "
            f"{_name(model)!r} ({len(wrong)} sites in all), so nothing it would say can be "
            "trusted; this architecture cannot be measured at that site"
        )
    return out if logits else None


def fired(
    model: Any, tokens: Int[Tensor, "batch token"], sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """What passes those of the sites that exist in `model` and whose hook fires exactly once.

    For asking a model what it shows, on a few tokens; to measure, use `observe`, which refuses
    what this leaves out.
    """
    missing = missing_sites(model, sites)
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites if site not in missing}

    def keeper(site: Site) -> Callable[..., None]:
        def keep(activation: Tensor, hook: Any = None) -> None:
            seen[site].append(activation.detach())

        return keep

    names = hook_names(model, list(seen))
    hooks = [(name, keeper(site)) for site, name in zip(seen, names, strict=True)]
    with torch.no_grad():
        model.run_with_hooks(
            tokens.to(_input_device(model)),
            fwd_hooks=hooks,
            return_type=None,
            **_cheap_forward_arguments(model, logits=False),
        )
    return {site: found[0] for site, found in seen.items() if len(found) == 1}


def missing_sites(model: Any, sites: Iterable[Site]) -> list[Site]:
    """Those of the sites that `model` does not have."""
    # Once for all: a bridge makes the dictionary anew whenever it is asked for, in milliseconds.
    points = model.hook_dict

    def exists(site: Site) -> bool:
        if site.name == FINAL_NORM:
            return isinstance(getattr(model, "ln_final", None), torch.nn.Module)
        return _hook_of(site) in points or _module_of(model, site, points) is not None

    return [site for site in sites if not exists(site)]


def has_hooks(model: Any) -> bool:
    """Whether somebody has put functions on the model's hook points.

    The host's own do not count: some bridges connect hook points with permanent hooks.
    """

    def is_own(handle: Any) -> bool:
        function = getattr(handle, "user_hook", None)
        own: bool = getattr(function, "__module__", "").startswith("transformer_lens")
        return handle.is_permanent and (function is None or own)

    handles = (handle for point in model.hook_dict.values() for handle in point.fwd_hooks)
    return not all(map(is_own, handles))


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
    return [_canonical(model, site, points) for site in sites]


def _canonical(model: Any, site: Site, points: Mapping[str, Any]) -> str:
    hook = _hook_of(site)
    if hook is None:
        raise InputError(f"no site {site.name!r}; there are {', '.join(SITE_HOOKS)}")
    point = points.get(hook)
    if point is None:
        raise ModelError(
            f"{_name(model)!r} has no {_spell(site)} (no hook {hook}):"
            " its blocks lack it, so what is read there cannot be measured in this model"
        )
    return str(point.name)


def _hook_of(site: Site) -> str | None:
    template = SITE_HOOKS.get(site.name)
    return None if template is None else template.format(layer=site.layer)


def _final_norm_hook(model: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
    module = getattr(model, "ln_final", None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{_name(model)!r} has no final norm (ln_final)")
    return module.register_forward_hook(lambda _module, _inputs, output: hook(output))


def _module_of(model: Any, site: Site, points: Mapping[str, Any]) -> torch.nn.Module | None:
    """The module whose input or output a site is, in a host that has no hook for it."""
    if site.name not in _MODULE_SITES or site.layer is None or _hook_of(site) in points:
        return None
    blocks = getattr(model, "blocks", ())
    module = getattr(blocks[site.layer], "mlp", None) if site.layer < len(blocks) else None
    return module if isinstance(module, torch.nn.Module) else None


def _module_hook(
    module: torch.nn.Module,
    end: Literal["input", "output"],
    hook: Callable[[Tensor], Tensor | None],
) -> Any:
    if end == "output":
        return module.register_forward_hook(lambda _module, _inputs, output: hook(output))

    def before(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = hook(inputs[0])
        return None if new is None else (new, *inputs[1:])

    return module.register_forward_pre_hook(before)


def _cheap_forward_arguments(model: Any, *, logits: bool) -> dict[str, Any]:
    """Arguments that spare the work nobody looks at: the key-value cache and the logits.

    The logits of 8,192 tokens over 151,000 words are 5 GB. `HookedTransformer` stops before them
    by itself when no return value is asked for.
    """
    if _generation(model) != "bridge":
        return {}
    import inspect

    accepted = inspect.signature(model.original_model.forward).parameters
    arguments = {"use_cache": False} | ({} if logits else {"logits_to_keep": 1})
    return {name: value for name, value in arguments.items() if name in accepted}


def _input_device(model: Any) -> torch.device:
    parameters = getattr(model, "parameters", None)
    if parameters is None:
        return torch.device("cpu")
    return next((p.device for p in parameters() if p.device.type != "meta"), torch.device("cpu"))


def _generation(model: Any) -> Literal["bridge", "hooked", "other"]:
    names = {cls.__name__ for cls in type(model).__mro__}
    if "TransformerBridge" in names:
        return "bridge"
    return "hooked" if "HookedTransformer" in names else "other"


def _name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def _spell(site: Site) -> str:
    return site.name if site.layer is None else f"{site.name} of layer {site.layer}"


__all__ = [
    "FINAL_NORM",
    "SITE_HOOKS",
    "HostInfo",
    "Observer",
    "Site",
    "describe",
    "fired",
    "has_hooks",
    "hook_names",
    "layer_sites",
    "missing_sites",
    "observe",
]
