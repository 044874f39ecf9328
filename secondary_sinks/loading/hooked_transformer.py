"""Convert a Hugging Face model into a `HookedTransformer`, and verify the result.

`HookedTransformer` re-implements every architecture and converts the weights. TransformerLens 4.0
removed it, so this works with TransformerLens 3 only. Its public loader accepts only names that it
knows and asks the hub about them. Here the steps of that loader are called one by one, from a
configuration file in a temporary folder. That needs no known name and no network, and neither
folds nor centers weights.

A conversion can succeed and be wrong: Qwen2 with a sliding window loads, but its residuals are off
by 40 percent, because the re-implementation has no window there. So a result is returned only if
one pass over random tokens gives the residuals of Hugging Face after every block, and its logits.
"""

from __future__ import annotations

import copy
import tempfile
from typing import TYPE_CHECKING, Any

from secondary_sinks.errors import ModelError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

_CHECKED_TOKENS = 48
"""Tokens in the verifying pass of a model without a sliding window."""
_LONGEST_CHECK = 1024
"""Most tokens that the verifying pass may take."""
_TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
"""Largest relative difference in any token's residual that rounding can explain."""


def require_hooked_transformer() -> None:
    """Raise `ModelError` unless the installed TransformerLens still has `HookedTransformer`."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError as error:
        from importlib.metadata import version

        raise ModelError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer: 4.0 removed "
            'it. Use kind="bridge", or install the last major version that has it: '
            'pip install "transformer-lens>=3.9,<4".'
        ) from error


def to_hooked(hf: Any, tokenizer: Any, device: Any, dtype: torch.dtype) -> Any:
    """Convert `hf` into a `HookedTransformer` with raw weights, verified against `hf`.

    Args:
        hf: A Hugging Face causal language model in eval mode. It is not changed, but the result
            may share its weights.
        tokenizer: Its tokenizer.
        device: Device of the result.
        dtype: Number format of the result's weights.

    Raises:
        ModelError: TransformerLens cannot convert this architecture, or the converted model
            computes something else; or the model has a sliding window too long to be checked.
    """
    length = _check_length(hf.config)
    config = copy.deepcopy(hf.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # left from GGUF files, whose weights are dequantized
    config.architectures = [type(hf).__name__]
    if hasattr(config, "n_positions") and not hasattr(config, "n_ctx"):
        config.n_ctx = config.n_positions  # TransformerLens reads the old name of GPT-2's files
    try:
        model = _convert(hf, config, tokenizer, device, dtype)
    except Exception as error:
        # An unknown architecture raises NotImplementedError, KeyError, AttributeError or a shape
        # mismatch, depending on how far the conversion gets.
        raise ModelError(
            f"TransformerLens cannot convert {type(hf).__name__} into a HookedTransformer: "
            f'{error!r}. Use kind="bridge".'
        ) from error
    model.eval()
    _check_against(hf, model, length)
    return model


def _convert(hf: Any, config: Any, tokenizer: Any, device: Any, dtype: torch.dtype) -> Any:
    # Not imported by name: TransformerLens 4, which checkers see, has neither.
    import transformer_lens

    host: Any = transformer_lens
    loading_from_pretrained = host.loading_from_pretrained

    # TransformerLens guesses the architecture from a path that contains "llama" or "gemma", so
    # the configuration is saved in a folder with a neutral name.
    with tempfile.TemporaryDirectory(prefix="config-") as folder:
        config.save_pretrained(folder)
        cfg = loading_from_pretrained.get_pretrained_model_config(
            folder, hf_cfg=config.to_dict(), fold_ln=False, device=str(device), dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(folder, cfg, hf, dtype=dtype)
    model = host.HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    model.move_model_modules_to_device()
    return model


def _check_length(config: Any) -> int:
    """Number of tokens of the verifying pass: more than an active sliding window."""
    context = int(getattr(config, "max_position_embeddings", None) or _CHECKED_TOKENS)
    window = _active_window(config)
    if window is None or window >= context:
        return min(_CHECKED_TOKENS, context)
    if window + _CHECKED_TOKENS // 2 > _LONGEST_CHECK:
        raise ModelError(
            f"The model has a sliding window of {window} tokens in a context of {context}. "
            "TransformerLens converts some such models wrongly, and a pass longer than this "
            'window is too expensive as a check. Use kind="bridge".'
        )
    return min(window + _CHECKED_TOKENS // 2, context)


def _active_window(config: Any) -> int | None:
    """Length of the sliding window in tokens; None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return int(window)


def _check_against(hf: Any, model: Any, length: int) -> None:
    """Raise unless both models give the same residuals and logits for `length` random tokens."""
    import torch

    vocabulary = int(hf.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    with torch.inference_mode():
        reference = hf(tokens.to(hf.device), output_hidden_states=True, use_cache=False)
        layers = model.cfg.n_layers
        residuals: dict[str, torch.Tensor] = {}
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
        logits = model.run_with_hooks(
            tokens.to(model.cfg.device),
            fwd_hooks=[
                (name, lambda resid, hook: residuals.__setitem__(hook.name, resid))
                for name in names
            ],
        )
    tolerance = _TOLERANCE.get(str(model.cfg.dtype).removeprefix("torch."), 1e-3)
    # The last hidden state of Hugging Face is after the final norm, so the last block is
    # compared by its logits.
    for layer, name in enumerate(names[:-1]):
        error = _relative_error(residuals[name], reference.hidden_states[layer + 1])
        _refuse_above(tolerance, error, f"the residual after layer {layer}", hf)
    width = min(logits.shape[-1], reference.logits.shape[-1])
    error = _relative_error(logits[..., :width], reference.logits[..., :width])
    _refuse_above(tolerance, error, f"the logits (after layer {layers - 1})", hf)


def _relative_error(
    vectors: Float[torch.Tensor, " batch token dim"],
    expected: Float[torch.Tensor, " batch token dim"],
) -> float:
    """The largest relative difference in any token's vector."""
    expected = expected.to(device=vectors.device).double()
    difference = (vectors.double() - expected).norm(dim=-1)
    return float((difference / expected.norm(dim=-1).clamp_min(1e-12)).max())


def _refuse_above(tolerance: float, error: float, quantity: str, hf: Any) -> None:
    if not error < tolerance:  # also true of a NaN
        raise ModelError(
            f"The HookedTransformer converted from {type(hf).__name__} does not match Hugging "
            f"Face: {quantity} differs by {error:.2g} (relative; {tolerance:g} is allowed). "
            'Use kind="bridge".'
        )
