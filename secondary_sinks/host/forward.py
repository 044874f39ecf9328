"""One forward pass in which functions see activations, and may replace them.

`observe` hands each activation to a function as it appears; `forward` lets functions replace it.
A model can fail silently (a hook that exists and never fires), so both count what fired, and raise.
Whether the residual stream is the sum that attributions rest on is checked in `host.identity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.condition import refuse_dropout
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
"""Sees an activation and must not change it."""
Editor = Callable[[Tensor], "Tensor | None"]
"""Sees an activation and returns None or a new one."""


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
    refuse_dropout(model, name_of(model))
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
            elif (module := module_of_site(model, site, points)) is not None:
                stack.enter_context(_module_hook(module, MODULE_SITES[site.name], hook))
            else:
                hooks.append((hook_of_site(model, site, points), hook))
        device = input_device(model)
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
            f"the hook of {spell_site(site)} fired {count} times in one forward pass of "
            f"{name_of(model)!r} ({len(wrong)} sites in all), so nothing it would say can be "
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
            tokens.to(input_device(model)),
            fwd_hooks=hooks,
            return_type=None,
            **_cheap_forward_arguments(model, logits=False),
        )
    return {site: found[0] for site, found in seen.items() if len(found) == 1}


def hooks_on(model: Any) -> list[str]:
    """Names of the hook points on which somebody has put functions.

    TransformerLens' own do not count: some bridges connect hook points with permanent hooks.
    """

    def is_own(handle: Any) -> bool:
        function = getattr(handle, "user_hook", None)
        own: bool = getattr(function, "__module__", "").startswith("transformer_lens")
        return handle.is_permanent and (function is None or own)

    points = {id(point): point for point in model.hook_dict.values()}.values()
    return [str(point.name) for point in points if not all(map(is_own, point.fwd_hooks))]


def has_hooks(model: Any) -> bool:
    """Whether somebody has put functions on the model's hook points."""
    return bool(hooks_on(model))


def _final_norm_hook(model: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
    module = getattr(model, "ln_final", None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{name_of(model)!r} has no final norm (ln_final)")
    return module.register_forward_hook(lambda _module, _inputs, output: hook(output))


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
    if generation_of(model) != "bridge":
        return {}
    import inspect

    accepted = inspect.signature(model.original_model.forward).parameters
    arguments = {"use_cache": False} | ({} if logits else {"logits_to_keep": 1})
    return {name: value for name, value in arguments.items() if name in accepted}
