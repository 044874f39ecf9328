"""The causal language model within a multimodal one.

A model that also reads images or sound (`...ForConditionalGeneration`) consists of encoders for
these, and of a text model with a language-model head, in which their tokens would be placed among
those of the text. Without them it is an ordinary causal language model, and that is what sinks are
measured in. It is the same modules: nothing is copied, and the encoders are left out.

TransformerLens is given the text model only. For a whole multimodal model it would look for an
image processor, and install a package for it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.precision import tolerance
from secondary_sinks.loading.messages import one_line

_N_PROBED = 8


def is_multimodal(config: Any) -> bool:
    """Whether a configuration is that of a model around a text model."""
    text = getattr(config, "text_config", None)
    return hasattr(text, "model_type") and not getattr(text, "is_encoder_decoder", False)


def text_model_of(name: str, hf: Any) -> Any:
    """The text model of a multimodal one, with its head, as a causal language model.

    Args:
        name: of the model, for messages.
        hf: the Hugging Face model; it shares its modules with the result.

    Raises:
        ModelError: transformers has no causal language model for this kind of text model, or the
            text model alone gives other logits.
    """
    whole = name if name == type(hf).__name__ else f"{name} ({type(hf).__name__})"
    inner: Any = getattr(hf, "language_model", None)
    text = inner if _is_whole(inner) else _assembled(whole, hf)
    text.config.architectures = [type(text).__name__]
    text.text_model_of = type(hf).__name__
    text.train(hf.training)
    _check_same(whole, hf, text)
    return text


def _is_whole(model: Any) -> bool:
    """Whether the inner model is a causal language model with its head already."""
    return type(model).__name__.endswith("ForCausalLM")


def _assembled(whole: str, hf: Any) -> Any:
    """The causal language model made of the decoder and the head of a multimodal one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = hf.config.text_config
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    decoder, head = hf.get_decoder(), hf.get_output_embeddings()
    if causal_class is None or head is None:
        raise ModelError(
            f"{whole} is multimodal, and transformers has no causal language model for its text "
            f"part alone ({config.model_type}), so it cannot be taken out. Load a text-only model "
            "of the same family"
        )
    with torch.device("meta"):
        text = causal_class(config)
    prefix = text.base_model_prefix
    if type(getattr(text, prefix)) is not type(decoder):
        raise ModelError(
            f"{whole} is multimodal, and its text model is a {type(decoder).__name__}, not the "
            f"{type(getattr(text, prefix)).__name__} of {causal_class.__name__}, so it cannot be "
            "taken out. Load a text-only model of the same family"
        )
    setattr(text, prefix, decoder)
    text.set_output_embeddings(head)
    return text


def _check_same(whole: str, hf: Any, text: Any) -> None:
    """Raise unless both models give the same logits for a few tokens."""
    device = next(text.parameters()).device
    if any(part.is_meta for part in (*text.parameters(), *text.buffers())):
        raise ModelError(f"{whole} has parts of its text model that lie outside of it")
    # Not those that stand for images or sound.
    special = {v for k, v in hf.config.to_dict().items() if "token" in k and isinstance(v, int)}
    usual = (token for token in range(text.config.vocab_size) if token not in special)
    tokens = torch.tensor([list(itertools.islice(usual, _N_PROBED))], device=device)
    try:
        expected, logits = (_logits(model, tokens) for model in (hf, text))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(
            f"the text model of {whole} does not run alone ({type(error).__name__}: "
            f"{one_line(error)}). Load a text-only model of the same family"
        ) from error
    error_size = float((logits - expected).norm() / expected.norm())
    if not error_size <= tolerance(text):
        raise ModelError(
            f"the text model of {whole} alone gives other logits than the whole (relative "
            f"difference {error_size:.1e}), so it is not a model by itself. Load a text-only model "
            "of the same family"
        )


def _logits(model: Any, tokens: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    return logits
