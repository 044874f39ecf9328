"""Which weights, and which tokenizer: short hashes by which a result knows its model.

A sink map measured in one model says nothing about another, not even about another checkpoint of
the same one. So every result records a hash of the weights and of the tokenizer, and wherever a map
meets a model the two are compared.

The hash of the weights covers the name, shape, precision and `SAMPLES` evenly spaced values of
every parameter: it takes milliseconds, and any retrained, edited or rounded model differs in it. A
change of a few single values may not.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

SAMPLES = 64
"""Values of each parameter that are hashed."""

_PROBE = "The cat's 12345 naïve cafés:\n\n  x_1 = f(a);\t// 数学 θ² …\r\n A. the"


def weights_fingerprint(model: Any) -> str:
    """Hash of a model's weights, 16 hexadecimal digits.

    Weights that accelerate has moved to disk are covered by name, shape and precision alone.
    """
    digest = hashlib.sha256()
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    named = getattr(model, "named_parameters", lambda: enumerate(model.parameters()))
    for name, weight in sorted(named(), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        if weight.is_meta or weight.numel() == 0:
            continue
        flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach().flatten()
        index = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64)
        picked = flat[index.long().to(flat.device)]
        samples.setdefault((flat.device, flat.dtype), []).append(picked)
    for _, values in sorted(samples.items(), key=lambda item: str(item[0])):
        # One transfer a device; as bytes, because NumPy knows no bfloat16.
        joined = torch.cat(values).cpu().contiguous()
        digest.update(joined.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of what a tokenizer does to a probe text, of its special tokens and its chat template;
    None without a tokenizer."""
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
    digest.update(repr((len(tokenizer), special)).encode())
    digest.update(repr(tokenizer(_PROBE, add_special_tokens=False).input_ids).encode())
    digest.update((template_hash(tokenizer) or "").encode())
    return digest.hexdigest()[:16]


def template_hash(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's chat template; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(repr(template).encode()).hexdigest()[:16] if template else None
