"""The identity that attributions rest on: a block adds its attention and its MLP, nothing else.

`resid_pre + attn_out + mlp_out == resid_post`. It is checked once for each model, because
TransformerLens can wrap a model whose blocks add something more, without a warning.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.forward import Observer, observe
from secondary_sinks.host.hooks_aside import hooks_aside
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.precision import coarsest_dtype, tolerance
from secondary_sinks.host.sites import Site

SUMMANDS = frozenset({"attn_out", "mlp_out", "resid_mid"})
"""The sites whose meaning rests on the identity."""

_largest_errors: weakref.WeakKeyDictionary[Any, dict[torch.dtype | None, float]] = (
    weakref.WeakKeyDictionary()
)
"""Of the models that were checked, by the precision that their weights had then."""


def check_residual_identity(model: Any, *, n_tokens: int = 8) -> float:
    """Check that `resid_pre + attn_out + mlp_out == resid_post` in every block, once for a model.

    The attribution of anything to an MLP rests on this sum. The check runs on a few arbitrary
    tokens, without hooks of the user. It is repeated if the precision of the weights has changed,
    and as long as a residual overflows.

    Returns:
        The largest relative error over layers, |sum - resid_post| / |resid_post|; infinite if a
        residual is NaN or infinite, which says nothing about the sum.

    Raises:
        ModelError: the sum is off by more than rounding in the model's own precision explains.
    """
    known, precision = _largest_errors.setdefault(model, {}), coarsest_dtype(model)
    if precision in known:
        return known[precision]
    info = describe(model)
    n_tokens = min(n_tokens, info.n_ctx or n_tokens)
    tokens = (torch.arange(n_tokens) % int(model.cfg.d_vocab))[None]
    sums: dict[int, Tensor] = {}
    errors = torch.zeros(model.cfg.n_layers)

    def add(layer: int) -> Observer:
        def observer(activation: Tensor) -> None:
            part = activation.float()
            if layer in sums:
                # In a divided model a block's input lies on the device of the block before it.
                part = sums[layer].to(part.device) + part
            sums[layer] = part

        return observer

    def compare(layer: int) -> Observer:
        def observer(activation: Tensor) -> None:
            after = activation.float()
            error = (sums.pop(layer).to(after.device) - after).norm() / after.norm()
            errors[layer] = error.cpu()

        return observer

    observers = {
        Site(name, layer): compare(layer) if name == "resid_post" else add(layer)
        for layer in range(len(errors))
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    }
    with hooks_aside(model):
        observe(model, tokens, torch.ones_like(tokens), observers)
    largest = float(errors.nan_to_num(nan=math.inf).max())
    overflows = math.isinf(largest)
    errors = errors.nan_to_num(nan=0.0, posinf=0.0)
    if float(errors.max()) > tolerance(model):
        raise ModelError(
            f"in {info.name!r}, layer {int(errors.argmax())}, the residual stream is not the sum "
            f"of what the attention and the MLP add to it (relative error {errors.max():.1e}): its "
            "blocks add something else too, so attn_out, mlp_out and resid_mid have no meaning "
            "there and nothing can be attributed to them. Norms, alignment and attention can be "
            "measured"
        )
    if not overflows:
        known[precision] = largest
    return largest
