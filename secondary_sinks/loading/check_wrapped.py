"""Check that a TransformerLens model computes what the Hugging Face model in it computed before.

TransformerLens rebuilds parts of a forward pass, so that its hooks can show them. Where a model has
a part that it does not expect, the wrapped model may fail, or compute another function without a
word. A few tokens before and after show both.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.precision import tolerance
from secondary_sinks.loading.messages import one_line

_N_PROBED = 8
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


def probe_logits(name: str, hf: Any) -> Tensor | None:
    """Logits of a Hugging Face model for a few tokens, with eager attention, as TransformerLens
    runs it; None where it lies partly on disk, where a pass takes long.

    Raises:
        ModelError: the model does not run.
    """
    if "disk" in {str(place) for place in (getattr(hf, "hf_device_map", None) or {}).values()}:
        return None
    implementation = hf.config._attn_implementation_internal
    try:
        hf.config._attn_implementation_internal = "eager"
        with torch.no_grad():
            logits: Tensor = hf(_tokens(hf, hf.config.vocab_size)).logits.float()
        return logits
    except _FAILURES as error:
        raise ModelError(
            f"{name} ({type(hf).__name__}) does not run in transformers "
            f"({type(error).__name__}: {one_line(error)}). Check its configuration"
        ) from error
    finally:
        hf.config._attn_implementation_internal = implementation


def check_wrapped(name: str, model: Any, expected: Tensor | None) -> None:
    """Compare a bridge with the model that it wraps.

    Warns if the logits differ by more than rounding explains.

    Args:
        name: of the model, for messages.
        model: the bridge.
        expected: of `probe_logits`, before it was wrapped; None checks nothing.

    Raises:
        ModelError: the wrapped model does not run.
    """
    if expected is None:
        return
    try:
        with torch.no_grad():
            logits = model(_tokens(model, expected.shape[-1]), return_type="logits").float()
    except _FAILURES as error:
        raise ModelError(
            f"TransformerLens wraps {name} ({type(model.original_model).__name__}), but the result "
            f"does not run ({type(error).__name__}: {one_line(error)}). Another version of "
            "TransformerLens may support this architecture"
        ) from error
    difference = float((logits - expected).norm() / expected.norm().clamp_min(1e-30))
    if not difference <= tolerance(model):
        warnings.warn(
            f"{name}: the logits of the model that TransformerLens wraps differ from those of the "
            f"model itself by {difference:.1e} (relative), more than rounding explains. The "
            "measured activations may not be those of the model as it was trained.",
            stacklevel=5,
        )


def _tokens(model: Any, n_words: int) -> Tensor:
    device = next(model.parameters()).device
    return (torch.arange(_N_PROBED, device=device) % n_words)[None]
