"""The precision of a model's weights, and the differences that rounding in it may explain."""

from __future__ import annotations

from typing import Any

import torch


def coarsest_dtype(model: Any) -> torch.dtype | None:
    """The coarsest precision of the floating-point weights; None if there are none.

    Read from the weights themselves, because the configuration may be out of date.
    """
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def tolerance(model: Any) -> float:
    """Largest relative difference that rounding in the model's own precision may explain: 1e-4 in
    float32, 6e-2 in bfloat16, 8e-3 in float16; that of the coarsest weights where they differ.

    It is compared with residuals. Largest differences measured on a CPU, on the first 64 and 400
    tokens of bundled texts in SmolLM2-135M, Qwen2.5-Coder-0.5B and Gemma-3-270M (which overflows in
    float16 and is refused; rows of Qwen2.5 in float32 and float16 on 64 tokens only):

    =====================================  =======  ========  =======
    relative difference                    float32  bfloat16  float16
    =====================================  =======  ========  =======
    residual identity                      0        6.2e-3    6.4e-4
    residual, streamed from eager          3e-6     3.8e-2    4.7e-3
    received attention, the same           3e-6     0.11      1.7e-2
    packed rows from full passes           4e-6     0.11      3.2e-3
    cached rows from full passes           1e-5     0.22      1.9e-2
    =====================================  =======  ========  =======

    The last three are compared with `attention_tolerance`. A mask that is ignored gives differences
    near one; in half precision a mistake smaller than the tolerance is not noticed.
    """
    return max(1e-4, 8 * _epsilon(model))


def attention_tolerance(model: Any) -> float:
    """The same for received attention and for counterfactual rows: 1e-4 in float32, 0.25 in
    bfloat16, 3e-2 in float16.

    Eager attention rounds its scores, streamed attention and cached rows do not. An error of a
    score changes a weight by the same factor, however large the score is. Most of the measured
    differences (see `tolerance`) are those of Qwen2.5-Coder-0.5B, whose keys have large biases; in
    SmolLM2-135M received attention differs by 0.02 in bfloat16 and 0.005 in float16.
    """
    return max(1e-4, 32 * _epsilon(model))


def _epsilon(model: Any) -> float:
    return torch.finfo(coarsest_dtype(model) or torch.float32).eps
