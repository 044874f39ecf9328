"""Short hashes of a model's weights and tokenizer, by which a result knows its model.

A sink map measured in one model says nothing about another, not even about another checkpoint of
the same one. So every result records these hashes, and they are compared wherever a sink map meets
a model.

The hash of the weights covers the name, shape, precision and `SAMPLES` evenly spaced values of
every parameter: it takes milliseconds, and any retrained, edited or rounded model differs in it. A
change of a few single values may not change it, and settings that are not weights, such as a
sliding window or the scaling of a rotary embedding, do not.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

SAMPLES = 64
"""Values of each parameter that are hashed."""

_PROBE = "The cat's 12345 naïve cafés:\n\n  x_1 = f(a);\t// 数学 θ² …\r\n A. the"


def weights_fingerprint(model: Any) -> str:
    """Hash of a model's weights, 16 hexadecimal digits, the same on every device.

    Weights that accelerate keeps on disk count by name, shape and precision alone, so the hash of
    such a model differs from that of the same model in memory.
    """
    digest = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = defaultdict(list)
    devices: list[torch.device] = []
    named = getattr(model, "named_parameters", lambda: enumerate(model.parameters()))
    for name, weight in sorted(named(), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        if weight.is_meta or weight.numel() == 0:
            continue
        values = _evenly_spaced(weight.detach()).view(torch.uint8)  # NumPy knows no bfloat16
        samples[values.device].append(values)
        devices.append(values.device)
    # One transfer from each device, hashed in the order of the names.
    moved = {
        device: iter(torch.split(torch.cat(parts).cpu(), [len(part) for part in parts]))
        for device, parts in samples.items()
    }
    for device in devices:
        digest.update(next(moved[device]).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of how a tokenizer splits a probe text, its special tokens and its chat template; None
    without a tokenizer."""
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


def _evenly_spaced(weight: Tensor) -> Tensor:
    """`SAMPLES` values of a weight, from the first to the last, or all if it has fewer."""
    # A weight that is not contiguous is indexed by coordinates: flattening would copy all of it.
    n_values = weight.numel()
    index = torch.linspace(0, n_values - 1, min(SAMPLES, n_values), dtype=torch.float64).long()
    index = index.to(weight.device)
    if weight.is_contiguous():
        return weight.reshape(-1)[index]
    return weight[torch.unravel_index(index, weight.shape)]
