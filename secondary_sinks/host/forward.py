"""One forward pass in which functions see activations, and may replace them.

`observe` hands each activation to a function as it appears; `forward` lets functions replace it.
A hook can exist and never fire, without a warning, so both count the calls and raise if a hook did
not fire exactly once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.condition import refuse_dropout
from secondary_sinks.host.head_layout import head_layout, in_layout
from secondary_sinks.host.memory import input_device
from secondary_sinks.host.model_info import generation_of, name_of
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import (
    FINAL_NORM,
    MODULE_SITES,
    Site,
    hook_names,
    hook_of_site,
    missing_sites,
    module_of_site,
    spell_site,
)

Observer = Callable[[Tensor], None]
"""Gets an activation and must not change it."""
Editor = Callable[[Tensor], "Tensor | None"]
"""Gets an activation and returns None or a new one."""

_TOKEN_AXES = {"resid_pre": 1, "resid_post": 1, "attn_scores": 2, "pattern": 2}
"""Sites that show whether a model computes all tokens in a layer, and their axis of tokens."""


def observe(
    model: Any,
    tokens: Int[Tensor, " batch token"],
    attention_mask: Int[Tensor, " batch token"],
    observers: Mapping[Site, Observer],
    *,
    fwd_hooks: Sequence[UserHook] = (),
) -> None:
    """Run `model` once over `tokens` and hand every observed activation to its observer.

    Observers get each activation with its batch dimension first, after the user's hooks (on the
    model and in `fwd_hooks`) have edited it, and must not change it. Logits are computed for the
    last position only where the model allows, no gradient is kept, and all hooks that this call
    added are removed when it returns or raises.

    Args:
        model: any TransformerLens model.
        tokens: token ids, padded on the right.
        attention_mask: 1 for tokens, 0 for padding.
        observers: one function for each site.
        fwd_hooks: further `(hook name, function)` pairs, as `run_with_hooks` takes them; they run
            before the observers.

    Raises:
        ModelError: a site does not exist in this model, or its hook did not fire exactly once, or
            the model is in training mode with dropout (its activations would be random).
    """
    forward(
        model,
        tokens,
        list(observers.items()),
        fwd_hooks=fwd_hooks,
        attention_mask=attention_mask,
    )


def forward(
    model: Any,
    tokens: Int[Tensor, " batch token"],
    editors: Sequence[tuple[Site, Editor]],
    *,
    fwd_hooks: Sequence[UserHook] = (),
    logits: bool = False,
    **arguments: Any,
) -> Float[Tensor, " batch token d_vocab"] | None:
    """Run `model` once over `tokens`, while functions see activations and may replace them.

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
    refuse_dropout(model, name_of(model))
    counts = [0] * len(editors)

    def hook_of(index: int, editor: Editor) -> Callable[..., Tensor | None]:
        def hook(activation: Tensor, hook: Any = None) -> Tensor | None:
            counts[index] += 1
            _check_tokens(model, editors[index][0], activation, tokens.shape[1])
            return editor(activation.detach())

        return hook

    hooks: list[UserHook] = []
    points = model.hook_dict
    # Before any hook is set: the first time, a layout takes a pass of its own over a few tokens.
    layouts = [head_layout(model, site) for site, _ in editors]
    with torch.no_grad(), ExitStack() as stack:
        for index, (site, editor) in enumerate(editors):
            hook = hook_of(index, in_layout(layouts[index], editor))
            if site.name == FINAL_NORM:
                stack.enter_context(_final_norm_hook(model, hook))
            elif (module := module_of_site(model, site, points)) is not None:
                stack.enter_context(_module_hook(module, MODULE_SITES[site.name], hook))
            else:
                hooks.append((hook_of_site(model, site, points), hook))
        device = input_device(model)
        placed = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        output = model.run_with_hooks(
            tokens.to(device),
            fwd_hooks=[*fwd_hooks, *hooks],
            return_type="logits" if logits else None,
            **placed,
            **_cheap_forward_arguments(model, logits=logits),
        )
    wrong = [(editors[index][0], count) for index, count in enumerate(counts) if count != 1]
    if wrong:
        site, count = wrong[0]
        raise ModelError(
            f"the hook of {spell_site(site)} fired {count} times in one forward pass of "
            f"{name_of(model)!r} ({len(wrong)} such sites); it must fire exactly once, so this "
            "architecture cannot be measured there"
        )
    return output if logits else None


def _check_tokens(model: Any, site: Site, shown: Tensor, n_tokens: int) -> None:
    """Raise `ModelError` where a model leaves tokens out that later layers do not need."""
    n_shown = shown.shape[_TOKEN_AXES[site.name]] if site.name in _TOKEN_AXES else n_tokens
    if n_shown != n_tokens:
        raise ModelError(
            f"{spell_site(site)} of {name_of(model)!r} has {n_shown} of the {n_tokens} tokens: the "
            "model does not compute the others there, so this layer cannot be measured"
        )


def fired(
    model: Any, tokens: Int[Tensor, " batch token"], sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """The activations at those of the sites that `model` has and whose hook fires exactly once.

    It shows what a model offers, on a few tokens; to measure, use `observe`, which raises where
    this leaves a site out.
    """
    missing = missing_sites(model, sites)
    activations: dict[Site, list[Tensor]] = {site: [] for site in sites if site not in missing}

    def appender(site: Site) -> Callable[..., None]:
        layout = head_layout(model, site)

        def append(activation: Tensor, hook: Any = None) -> None:
            shown = activation.detach()
            activations[site].append(shown if layout is None else layout.read(shown))

        return append

    names = hook_names(model, list(activations))
    hooks = [(name, appender(site)) for site, name in zip(activations, names, strict=True)]
    with torch.no_grad():
        model.run_with_hooks(
            tokens.to(input_device(model)),
            fwd_hooks=hooks,
            return_type=None,
            **_cheap_forward_arguments(model, logits=False),
        )
    return {site: calls[0] for site, calls in activations.items() if len(calls) == 1}


def hooks_on(model: Any) -> list[str]:
    """Canonical names of the hook points that carry the user's functions.

    TransformerLens' own do not count: some bridges connect hook points with permanent hooks.
    """

    def is_internal(handle: Any) -> bool:
        function = getattr(handle, "user_hook", None)
        internal: bool = getattr(function, "__module__", "").startswith("transformer_lens")
        return handle.is_permanent and (function is None or internal)

    points = {id(point): point for point in model.hook_dict.values()}.values()
    return [str(point.name) for point in points if not all(map(is_internal, point.fwd_hooks))]


def has_hooks(model: Any) -> bool:
    """Whether the model's hook points carry the user's functions."""
    return bool(hooks_on(model))


def _final_norm_hook(model: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
    module = getattr(model, "ln_final", None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{name_of(model)!r} has no final norm (ln_final)")
    return module.register_forward_hook(lambda *arguments: hook(arguments[2]))


def _module_hook(
    module: torch.nn.Module,
    end: Literal["input", "output"],
    hook: Callable[[Tensor], Tensor | None],
) -> Any:
    if end == "output":
        return module.register_forward_hook(lambda *arguments: hook(arguments[2]))

    def before(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = hook(inputs[0])
        return None if new is None else (new, *inputs[1:])

    return module.register_forward_pre_hook(before)


def _cheap_forward_arguments(model: Any, *, logits: bool) -> dict[str, Any]:
    """Arguments that switch off what is not read: the key-value cache and most of the logits.

    The logits of 8,192 tokens over 151,000 words are 5 GB. `HookedTransformer` computes none when
    no return value is asked for.
    """
    if generation_of(model) != "bridge":
        return {}
    accepted = inspect.signature(model.original_model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": False}
    if not logits:
        # Given a number, a model whose last layers share keys and values (Gemma 4) computes these
        # layers for the last tokens alone.
        shares = getattr(model.original_model.config, "num_kv_shared_layers", 0)
        last = torch.tensor([-1], device=input_device(model)) if shares else 1
        arguments["logits_to_keep"] = last
    return {name: value for name, value in arguments.items() if name in accepted}
