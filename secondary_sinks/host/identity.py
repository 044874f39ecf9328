"""The identity that attributions rest on: a block adds its attention and its MLP, nothing else.

`resid_pre + attn_out + mlp_out == resid_post`, checked once a model, because a host can wrap a
block in which it does not hold and would say nothing.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.forward import Observer, observe
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.sites import Site

_identity_checked: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


def check_residual_identity(model: Any, *, n_tokens: int = 8) -> float:
    """Check that `resid_pre + attn_out + mlp_out == resid_post` in every block, once a model.

    The attribution of anything to an MLP rests on this sum. It is tested on a few arbitrary tokens
    the first time that a model is seen.

    Returns:
        The largest relative error over layers, |sum - resid_post| / |resid_post|.

    Raises:
        ModelError: the sum is off by more than rounding in the model's own precision explains.
    """
    if model in _identity_checked:
        return _identity_checked[model]
    info = describe(model)
    n_tokens = min(n_tokens, info.n_ctx or n_tokens)
    tokens = (torch.arange(n_tokens) % int(model.cfg.d_vocab))[None]
    running: dict[int, Tensor] = {}
    errors = torch.zeros(info.n_layers)
    rounding = 0.0

    def add(layer: int) -> Observer:
        def observer(activation: Tensor) -> None:
            part = activation.float()
            if layer in running:
                # A block of a divided model gets its input from the device of the block before.
                part = running[layer].to(part.device) + part
            running[layer] = part

        return observer

    def compare(layer: int) -> Observer:
        def observer(activation: Tensor) -> None:
            nonlocal rounding
            rounding = max(rounding, torch.finfo(activation.dtype).eps)
            after = activation.float()
            error = (running.pop(layer).to(after.device) - after).norm() / after.norm()
            errors[layer] = error.cpu()

        return observer

    observers = {
        Site(name, layer): compare(layer) if name == "resid_post" else add(layer)
        for layer in range(info.n_layers)
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    }
    with hooks_aside(model):
        observe(model, tokens, torch.ones_like(tokens), observers)
    worst = float(errors.nan_to_num(nan=float("inf")).max())
    if torch.isfinite(errors).all() and worst > max(1e-4, 8 * rounding):
        raise ModelError(
            f"in {info.name!r}, layer {int(errors.argmax())}, the residual stream is not the sum "
            f"of what the attention and the MLP add to it (relative error {worst:.1e}): its "
            "blocks are built in a way that this library does not know"
        )
    _identity_checked[model] = worst
    return worst


@contextmanager
def hooks_aside(model: Any) -> Iterator[None]:
    """Within the block the host's hook points have none of the user's functions.

    They may be meant for one text alone, and a text of a few arbitrary tokens is not that one.
    """
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point._forward_hooks) for point in points]
    for point, _ in kept:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in kept:
            point._forward_hooks = hooks
