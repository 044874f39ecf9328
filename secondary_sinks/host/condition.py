"""The condition in which a model is measured.

Raw weights or not, repeatable activations or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.memory import in_memory


def refuse_dropout(model: Any, name: str) -> None:
    """Raise `ModelError` for a model in training mode with dropout or noise: random activations."""
    if not isinstance(model, torch.nn.Module):
        return
    for part, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0:
            raise ModelError(
                f"{name!r} is in training mode with dropout ({part}), so its activations "
                "are random; call model.eval() first"
            )
    # Attention dropout and router noise are applied by functions, not by modules.
    config = getattr(getattr(model, "original_model", None), "config", None)
    settings = config.to_dict() if config is not None else {}
    for setting, value in settings.items():
        random = "dropout" in setting or setting.endswith("_pdrop") or "jitter" in setting
        if (
            random
            and isinstance(value, float)
            and value > 0
            and any(module.training for module in model.modules())
        ):
            raise ModelError(
                f"{name!r} is in training mode with {setting}={value}, so its activations are "
                "random; call model.eval() first"
            )


def processing(model: Any) -> tuple[str, ...]:
    """How the weights were changed, as far as TransformerLens or the weights show it."""
    changes = []
    if getattr(model, "_weights_processed", False):
        changes.append("weights processed by TransformerLens")
    if str(getattr(model.cfg, "normalization_type", "") or "").endswith("Pre"):
        changes.append("layer norms folded into the weights")
    if _is_centered(model):
        changes.append("writing weights centered")
    return tuple(changes)


def _is_centered(model: Any) -> bool:
    """Whether the embedding of every word has mean zero, as after centering but not training.

    `HookedTransformer` keeps no record of centering, so the weights decide.
    """
    embedding = getattr(model, "embed", None)
    with in_memory(getattr(embedding, "original_component", embedding)):
        weight = getattr(embedding, "W_E", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] < 2:
            return False
        rows = weight[:64].detach().float()
    spread = rows.std(dim=1).clamp_min(1e-12)
    return bool((rows.mean(dim=1).abs() / spread).max() < 1e-4) and bool((rows != 0).any())
