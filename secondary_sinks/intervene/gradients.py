"""One forward pass that keeps gradients, for first-order estimates of many edits at once.

The effect of replacing an activation `a` by `b` on a number `m` is, to first order, the gradient of
`m` at `a` times `b - a`. One forward and one backward pass give the gradient at every site, layer
and token together, so that a scan of thousands of cells costs about three passes. How wrong it is
depends on how far `b` is from `a`: what uses it must say so, and check some cells exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import SITE_HOOKS, Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.whole_text import TextMeter, TextState


def metric_gradients(
    model: Any,
    clean: CleanRun,
    metric: Callable[[TextState], Tensor],
    sites: Sequence[Site],
    *,
    logits: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> dict[Site, tuple[Float[Tensor, "token *shape"], Float[Tensor, "token *shape"]]]:
    """Activation and gradient of a metric at every site, from one forward and one backward pass.

    Weights get no gradient and nothing stays on the model.

    Args:
        model: any TransformerLens model.
        clean: the run whose text is taken, unedited.
        metric: one number from the state of the text, differentiable.
        sites: where the gradient is wanted.
        logits: let the metric see the logits.
        fwd_hooks: hooks of the user's own.

    Raises:
        ModelError: a site's hook does not fire exactly once, or the metric does not depend on
            anything that has a gradient.
    """
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    meter = TextMeter(clean)
    hooks: list[UserHook] = [*fwd_hooks]
    hooks += [(_name(model, site), _keep(kept[site])) for site in sites]
    hooks += [(_name(model, site), _read(editor)) for site, editor in meter.editors()]
    tokens = clean.tokens[None].to(next(model.parameters()).device)
    with torch.inference_mode(False), torch.enable_grad():
        output = model.run_with_hooks(
            tokens,
            fwd_hooks=hooks,
            return_type="logits" if logits else None,
            attention_mask=torch.ones_like(tokens),
        )
        silent = [site for site, found in kept.items() if len(found) != 1]
        if silent:
            raise ModelError(f"the hook of {silent[0]} fired {len(kept[silent[0]])} times")
        (state,) = meter.states()
        if logits:
            state = TextState(**(vars(state) | {"logits": output[0]}))
        value = metric(state)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ModelError(
                "the metric has no gradient with respect to the model's activations: compute it "
                "with differentiable functions of the state, or scan exactly"
            )
        activations = [found[0] for found in kept.values()]
        gradients = torch.autograd.grad(value, activations, allow_unused=True)
    return {
        site: (at.detach()[0], torch.zeros_like(at[0]) if slope is None else slope[0])
        for site, at, slope in zip(sites, activations, gradients, strict=True)
    }


def _keep(into: list[Tensor]) -> Callable[..., Tensor]:
    def hook(activation: Tensor, hook: Any = None) -> Tensor:
        # The first site of a model with frozen weights has no gradient yet: it begins one.
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_(True)
        into.append(activation)
        return activation

    return hook


def _read(editor: Callable[[Tensor], Any]) -> Callable[..., None]:
    def hook(activation: Tensor, hook: Any = None) -> None:
        editor(activation)

    return hook


def _name(model: Any, site: Site) -> str:
    point = model.hook_dict.get(SITE_HOOKS[site.name].format(layer=site.layer))
    if point is None:
        raise ModelError(f"the model has no {site.name} in layer {site.layer}")
    return str(point.name)
