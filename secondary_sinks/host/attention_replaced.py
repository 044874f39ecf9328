"""Replace the attention of a `TransformerBridge` for the duration of a context.

The bridge computes attention eagerly, whole pattern by whole pattern, so that its hooks can show
it. `replaced_attention` passes queries, keys and values to a function instead, and uses its output:

>>> def attend(layer: int, inputs: AttentionInputs) -> Tensor:  # [batch, token, head, d_head]
...     ...
>>> with replaced_attention(model, attend):
...     observe(...)

Everything outside of the scores runs as before: the hooks of queries, keys and values, of the
heads' outputs and of the residual stream fire and can be edited. Those between the projections and
the output (`pattern`, `attn_scores`, rotated queries and keys) do *not* fire, without a warning;
`observe.streaming_check` determines which, and compares the rest with the eager pass.

A bridge has attention of three kinds:

* Where the model has separate projections for queries, keys and values, Hugging Face's attention
  module is run (its projections are parts of the bridge, hooks included) with an attention function
  and a mask builder that are registered under a temporary name.
* Modules that are older than this registry (GPT-J, GPT-Neo) have a method `_attn`, which is
  replaced.
* Where the model has one joint projection (GPT-2, NeoX, Phi-3, Bloom), the bridge has split it,
  Hugging Face's module does not know the parts, and the bridge's step after the projections is
  replaced.

`HookedTransformer` offers no such place: scores, mask, softmax and hooks are one method. A module
that hides keys by a rule that `AttentionInputs` cannot express raises.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.head_layout import examine_heads
from secondary_sinks.host.model_info import generation_of
from secondary_sinks.host.sites import attention_layers
from secondary_sinks.host.temporary import exchanged
from secondary_sinks.host.visible_keys import window_of_module


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention."""

    query: Float[Tensor, " batch head token d_head"]
    """Position embeddings are already applied, to keys as well."""
    key: Float[Tensor, " batch kv_head token d_head"]
    value: Float[Tensor, " batch kv_head token d_head"]
    scale: float
    window: int | None = None
    """How many keys a query sees, itself included; None: all."""
    softcap: float | None = None
    """Scores s become `softcap * tanh(s / softcap)`."""
    sink_logits: Float[Tensor, " head"] | None = None
    """A learned logit for each head that joins every softmax."""
    alibi: Float[Tensor, " batch head key"] | None = None
    """Added to the scores of each key. It grows with the key's position, whereas ALiBi falls with
    the distance from the query; the two differ by a constant for each query, which softmax cancels.
    """
    visible: Bool[Tensor, " query key"] | None = None
    """Which keys the model's mask shows to the queries in `look_up` of `replaced_attention`; None
    without such queries, or where the model builds its mask in another way."""

    def logits(
        self, products: Float[Tensor, " head query key"], keys: slice
    ) -> Float[Tensor, " head query key"]:
        """Unmasked logits in float32 for one text, without `sink_logits`.

        Args:
            products: of queries with keys.
            keys: the indices of those keys.
        """
        logits = products * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.alibi is not None:
            logits = logits + self.alibi[0, :, None, keys].float()
        return logits

    def zero_output(self) -> Float[Tensor, " batch token head d_value"]:
        """Zeros in the shape of the heads' outputs."""
        n_batch, n_heads, n_tokens, _ = self.query.shape
        return self.query.new_zeros(n_batch, n_tokens, n_heads, self.value.shape[-1])

    def of_text(self, row: int, n_tokens: int) -> AttentionInputs:
        """The inputs of one text of the batch, without its padding."""
        query, key, value = (
            part[row : row + 1, :, :n_tokens] for part in (self.query, self.key, self.value)
        )
        alibi = None if self.alibi is None else self.alibi[row : row + 1, :, :n_tokens]
        return replace(self, query=query, key=key, value=value, alibi=alibi)


Attend = Callable[[int, AttentionInputs], Tensor]

_TRANSFORMER_LENS = "transformer_lens."  # how the names of its modules begin


@contextmanager
def replaced_attention(
    model: Any, attend: Attend, *, look_up: Sequence[int] = ()
) -> Iterator[None]:
    """Within the context `attend` computes the attention of every layer.

    `attend` applies the masks: causal, windows, and padding, which `AttentionInputs` does not
    describe. At the end the model is restored, also after an error.

    Args:
        model: a `TransformerBridge`.
        attend: computes the attention of one layer.
        look_up: indices of queries for which `AttentionInputs.visible` holds the mask that the
            model itself would have used, without padding.

    Raises:
        ModelError: the model's attention cannot be replaced; the message says why.
    """
    layers = list(_attention_bridges(model).items())
    examine_heads(model)
    with ExitStack() as stack:
        _register_with_hugging_face(model, stack, attend, dict(_modules_of(layers)), look_up)
        for layer, component in layers:
            owner, name, function = _replacement(layer, component, attend)
            if "forward" in vars(component) or name in vars(owner):
                raise ModelError("its attention is replaced already")
            stack.enter_context(exchanged(owner, name, function))
        yield


def sliding_windows(model: Any) -> set[int]:
    """Widths of the sliding windows of all layers, according to the configuration."""
    names = ("sliding_window", "attention_chunk_size", "window_size")
    owners = [getattr(c, "original_component", None) for c in _attention_bridges(model).values()]
    config = getattr(getattr(model, "original_model", None), "config", None)
    if set(getattr(config, "layer_types", None) or [""]) != {"full_attention"}:
        owners.append(config)  # with full attention it may name a width that no layer has
    values = [getattr(owner, name, None) for owner in owners for name in names]
    return {value for value in values if isinstance(value, int) and value > 0}


def has_module_hooks(model: Any) -> bool:
    """Whether attention modules have the user's PyTorch hooks, which would see another output.

    Hooks of the libraries do not count. After a request for hidden states, transformers leaves one
    on each module, which is inactive until the next request; and where a model scales the output of
    attention (Granite), one fires the bridge's `hook_attn_out`.
    """
    return any(
        not getattr(hook, "__module__", "").startswith(("transformers.", _TRANSFORMER_LENS))
        for component in _attention_bridges(model).values()
        for module in (component, component.original_component)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _attention_bridges(model: Any) -> dict[int, Any]:
    """The attention components by layer; hybrids have none in some layers."""
    if generation_of(model) != "bridge":
        raise ModelError(
            f"{type(model).__name__} computes scores, mask, softmax and hooks of its attention in "
            "one step, which cannot be replaced; load the model as a TransformerBridge"
        )
    components = {
        layer: getattr(block, "attn", None)
        for layer, block in enumerate(getattr(model, "blocks", ()))
        if layer in attention_layers(model)
    }
    if not components or any(
        getattr(component, "original_component", None) is None for component in components.values()
    ):
        raise ModelError("TransformerLens does not wrap its attention as a part of its blocks")
    return components


def _modules_of(layers: list[tuple[int, Any]]) -> Iterator[tuple[int, int]]:
    for layer, component in layers:
        yield id(component.original_component), layer


def _register_with_hugging_face(
    model: Any,
    stack: ExitStack,
    attend: Attend,
    layer_of: dict[int, int],
    look_up: Sequence[int],
) -> None:
    """Register the attention function and its mask builder, and select them in all configs."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ModelError("this transformers has no attention interface to stream with") from error

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and not look_up:
            raise ModelError("its attention hides keys by a rule that streaming does not know")
        if key.shape[2] != query.shape[2]:
            raise ModelError("its attention has keys that are not tokens")
        inputs = AttentionInputs(
            query=query,
            key=key,
            value=value,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sink_logits=s_aux,
            visible=_visible(attention_mask),
        )
        return attend(layer_of[id(module)], inputs), None

    name = f"secondary_sinks_{uuid.uuid4().hex}"
    for interface, function in (
        (AttentionInterface, attention),
        (AttentionMaskInterface, _mask_builder(look_up)),
    ):
        interface.register(name, function)
        stack.callback(interface._global_mapping.pop, name, None)
    for config in _configs(model):
        # The public property of this name also writes to the sub-configs.
        before = config._attn_implementation_internal
        config._attn_implementation_internal = name
        stack.callback(setattr, config, "_attn_implementation_internal", before)


def _mask_builder(look_up: Sequence[int]) -> Callable[..., Tensor | None]:
    """The function that Hugging Face's model calls for the mask of each kind of layer.

    The model passes its rule, a function of a query's and a key's index, which is evaluated for the
    queries in `look_up`; without such queries no mask is built.
    """

    def build(*_: Any, **arguments: Any) -> Tensor | None:
        shows = arguments.get("mask_function")
        if not look_up or shows is None:
            return None
        first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=arguments.get("device"))
        queries = first + first.new_tensor(look_up)[:, None]
        keys = first + torch.arange(arguments["kv_length"], device=first.device)
        visible: Tensor = shows(first, first, queries, keys)
        return visible

    return build


def _visible(mask: Tensor | None) -> Tensor | None:
    """The mask from `_mask_builder`, without batch and head."""
    return None if mask is None or mask.dtype != torch.bool else mask[0, 0]


def _configs(model: Any) -> list[Any]:
    of_modules = (getattr(module, "config", None) for module in model.original_model.modules())
    configs = {id(c): c for c in of_modules if hasattr(c, "_attn_implementation_internal")}
    return list(configs.values())


def _replacement(layer: int, component: Any, attend: Attend) -> tuple[Any, str, Callable[..., Any]]:
    """The one method to replace in an attention component: its owner, its name and the new one."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    kind, module = type(component), component.original_component
    if hasattr(kind, "_reconstruct_attention"):
        if kind._reconstruct_attention in _steps_after_projection():
            step = functools.partial(_joint, layer, component, attend)
            return component, "_reconstruct_attention", step
    elif issubclass(kind, AttentionBridge) and kind.forward.__module__.startswith(
        _TRANSFORMER_LENS
    ):
        if hasattr(module, "_attn"):
            return module, "_attn", functools.partial(_unregistered, layer, module, attend)
        return component, "forward", functools.partial(AttentionBridge.forward, component)
    raise ModelError(f"its attention is of an unknown kind ({kind.__name__})")


def _steps_after_projection() -> list[Callable[..., Any]]:
    """TransformerLens' steps that `_joint` can replace.

    Falcon's is not among them: with ALiBi the eager attention of transformers 5.23 adds it twice.
    """
    from transformer_lens.model_bridge.generalized_components import (
        BloomAttentionBridge,
        JointQKVAttentionBridge,
        JointQKVPositionEmbeddingsAttentionBridge,
    )

    kinds = (
        JointQKVAttentionBridge,
        JointQKVPositionEmbeddingsAttentionBridge,
        BloomAttentionBridge,
    )
    return [kind._reconstruct_attention for kind in kinds]


def _unregistered(
    layer: int,
    module: Any,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Attention of a module that predates the registry: after positions, before merging heads."""
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        scale=1 / getattr(module, "scale_attn", 1),
        window=window_of_module(module),
        visible=_visible(attention_mask),
    )
    return attend(layer, inputs).transpose(1, 2), None


def _joint(
    layer: int,
    component: Any,
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """A bridge's step after its joint projection: positions, attention, output projection."""
    config, module = component.config, component.original_component
    n_heads = int(config.n_heads)
    n_kv_heads = int(getattr(config, "n_key_value_heads", None) or n_heads)
    q, k, v, n_batch, n_tokens, d_head = component._reshape_qkv_to_heads(
        q, k, v, n_heads, n_kv_heads
    )
    positions = arguments.get("position_embeddings")
    if positions is not None and hasattr(component, "_apply_rotary_pos_emb"):
        cos, sin = component._apply_position_embedding_hooks(positions)
        q, k = component._apply_rotary_pos_emb(q, k, cos, sin)
    scale = d_head**-0.5
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    alibi = arguments.get("alibi")  # [batch * head, 1, key]
    inputs = AttentionInputs(
        query=q,
        key=k,
        value=v,
        scale=scale,
        window=window,
        visible=_visible(arguments.get("attention_mask")),
        alibi=None if alibi is None else alibi.view(n_batch, n_heads, -1),
    )
    output = attend(layer, inputs)
    return component._apply_output_projection(output.reshape(n_batch, n_tokens, -1)), None
