"""What every result records about its model, and which models are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from secondary_sinks.errors import ModelError
from secondary_sinks.host.condition import processing
from secondary_sinks.host.memory import input_device
from secondary_sinks.host.precision import coarsest_dtype

Generation = Literal["bridge", "hooked", "other"]


@dataclass(frozen=True)
class ModelInfo:
    """A model in the state in which it was measured."""

    name: str
    generation: Generation | None = None
    """`TransformerBridge`, `HookedTransformer`, or another model with the same methods; None where
    unknown (published files)."""
    n_layers: int | None = None
    n_heads: int | None = None
    d_model: int | None = None
    n_ctx: int | None = None
    dtype: str = ""
    """Of the weights: the coarsest where they differ."""
    device: str = ""
    revision: str | None = None
    """Commit of the weights on the hub, if the model came from there."""
    processing: tuple[str, ...] = ()
    """How the weights differ from the raw ones (empty: raw). Sinks are defined on raw weights;
    folding and centering change residual norms and cosines."""

    text_model_of: str = ""
    """Class of the multimodal model that it was taken from; empty for a model by itself."""

    @property
    def is_processed(self) -> bool:
        """Whether the weights were changed after loading."""
        return bool(self.processing)


def describe(model: Any) -> ModelInfo:
    """Read a model's name, size, precision and state from its configuration and weights.

    Raises:
        ModelError: `model` is not a TransformerLens model, or is not causal.
    """
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "this model was wrapped by torch.compile, which hides what its hooks need: pass the "
            "model itself (model._orig_mod)"
        )
    missing = [name for name in ("cfg", "run_with_hooks", "to_tokens") if not hasattr(model, name)]
    if missing:
        raise ModelError(
            f"{type(model).__name__} has no {', '.join(missing)}: pass a TransformerLens model "
            "(TransformerBridge or HookedTransformer), such as load_model(...) returns"
        )
    cfg = model.cfg
    config = getattr(getattr(model, "original_model", None), "config", None)
    if (
        getattr(cfg, "attention_dir", "causal") != "causal"
        or getattr(config, "is_encoder_decoder", False)
        or not hasattr(model, "unembed")
    ):
        raise ModelError(
            f"{name_of(model)!r} is not a causal language model; in an encoder every token sees "
            "every other, and attention sinks are not defined in the sense used here"
        )
    return ModelInfo(
        name=name_of(model),
        generation=generation_of(model),
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        d_model=int(cfg.d_model),
        n_ctx=int(cfg.n_ctx) if getattr(cfg, "n_ctx", None) else None,
        dtype=dtype_of(model),
        device=str(input_device(model)),
        revision=getattr(config, "_commit_hash", None),
        processing=processing(model),
        text_model_of=getattr(getattr(model, "original_model", None), "text_model_of", ""),
    )


def n_layers_of(model: Any) -> int:
    """Number of blocks."""
    return int(model.cfg.n_layers)


def name_of(model: Any) -> str:
    """The model's name in its configuration, or that of its class."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def generation_of(model: Any) -> Generation:
    """Which kind of TransformerLens model it is."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "TransformerBridge" in names:
        return "bridge"
    return "hooked" if "HookedTransformer" in names else "other"


def dtype_of(model: Any) -> str:
    """The coarsest precision of the weights, or what the configuration says without weights."""
    dtype = coarsest_dtype(model) or getattr(model.cfg, "dtype", None)
    return str(dtype or "").removeprefix("torch.")
