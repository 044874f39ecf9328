"""One forward pass that keeps gradients, for first-order estimates of many edits at once.

The effect of replacing an activation `a` by `b` on a number `m` is, to first order, the gradient of
`m` at `a` times `b - a`. One forward and one backward pass give the gradient at every site, layer
and token together, so that a scan of thousands of cells costs about three passes. The error grows
with the distance of `b` from `a`: whoever uses the estimate must say so, and check some cells
exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.head_layout import head_layout
from secondary_sinks.host.memory import input_device
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, hook_names, spell_site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.whole_text import TextMeter, TextState
from secondary_sinks.observe.attention_columns import ColumnRequest, eager_columns


def metric_gradients(
    model: Any,
    clean: CleanRun,
    metric: Callable[[TextState], Tensor],
    sites: Sequence[Site],
    *,
    logits: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> dict[Site, tuple[Float[Tensor, " token *shape"], Float[Tensor, " token *shape"]]]:
    """Activation and gradient of a metric at every site, from one forward and one backward pass.

    Weights get no gradient and the model is left as it was.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        metric: one number from the state of the text, differentiable.
        sites: where the gradient is wanted.
        logits: let the metric see the logits.
        fwd_hooks: the user's hooks.

    Raises:
        ModelError: the model lacks a site, a site's hook does not fire exactly once, the metric has
            no gradient, or the weights are inference tensors.
    """
    if any(weight.is_inference() for weight in model.parameters()):
        raise ModelError(
            f"{name_of(model)!r} was loaded within torch.inference_mode(), so no gradient passes "
            "through its weights: load it outside, or scan exactly"
        )
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    meter = TextMeter(clean)
    tokens = clean.tokens[None].to(input_device(model))
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        eager_columns(model, [len(clean.tokens)], ColumnRequest(), meter.receive) as patterns,
    ):
        readers = [*patterns, *meter.editors()]
        names = hook_names(model, [*seen, *(site for site, _ in readers)])
        functions = [
            *(_keeper(activations) for activations in seen.values()),
            *(_reader(read) for _, read in readers),
        ]
        output = model.run_with_hooks(
            tokens,
            fwd_hooks=[*fwd_hooks, *zip(names, functions, strict=True)],
            return_type="logits" if logits else None,
            attention_mask=torch.ones_like(tokens),
        )
        for site, activations in seen.items():
            if len(activations) != 1:
                raise ModelError(
                    f"the hook of {spell_site(site)} fired {len(activations)} times in one pass"
                )
        (state,) = meter.states()
        value = metric(dataclasses.replace(state, logits=output[0]) if logits else state)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ModelError(
                "the metric has no gradient with respect to the model's activations: compute it "
                "with differentiable functions of the state, or scan exactly"
            )
        activations = [activation for (activation,) in seen.values()]
        gradients = torch.autograd.grad(value, activations, allow_unused=True)
    found = {}
    for site, activation, gradient in zip(seen, activations, gradients, strict=True):
        gradient = torch.zeros_like(activation) if gradient is None else gradient
        pair = activation.detach(), gradient
        if (layout := head_layout(model, site)) is not None:
            pair = layout.read(pair[0]), layout.read(pair[1])
        found[site] = pair[0][0], pair[1][0]
    return found


def _keeper(kept: list[Tensor]) -> Callable[..., Tensor]:
    def hook(activation: Tensor, hook: Any = None) -> Tensor:
        # In a model with frozen weights the first site has no gradient yet and starts the graph.
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_(True)
        kept.append(activation)
        return activation

    return hook


def _reader(read: Callable[[Tensor], Any]) -> Callable[..., None]:
    def hook(activation: Tensor, hook: Any = None) -> None:
        read(activation)

    return hook
