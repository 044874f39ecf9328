"""The MLP of a layer, taken out of the model: its stages, its weights, and the norms around it.

    residual -> norm -> input -> gate  -> activation \\
                              -> up    ------------- * -> product -> output -> norm -> written

An MLP without a gate has `pre -> activation -> output`; a mixture of experts shows its input and
its output only, because each token passes other weights there. Most models have no norm behind the
MLP, and what is written into the residual stream is the output itself.

>>> stages = run_mlp(model, 5, inputs)           # inputs: [n, d_model], after the norm before it
>>> stages["product"] @ mlp_of(model, 5).w_out   # its output, but for a bias

`run_mlp` calls the host's own module, outside of any forward pass. `mlp_of` reads weights, and
believes none of them: the first time that a layer of a model is asked for, one pass over a few
tokens records everything in it, and each stage must follow from the one before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.forward import observe
from secondary_sinks.host.identity import hooks_aside
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.norm_map import NormMap
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.sites import SITE_HOOKS, Site, missing_sites

MlpKind = Literal["gated", "plain", "experts"]

_STAGES: dict[MlpKind, tuple[str, ...]] = {
    "gated": ("input", "gate", "activation", "up", "product", "output"),
    "plain": ("input", "pre", "activation", "output"),
    "experts": ("input", "output"),
}
_HOOKED: dict[MlpKind, dict[str, str]] = {
    "gated": {"gate": "mlp_pre", "up": "mlp_pre_linear", "product": "mlp_post"},
    "plain": {"pre": "mlp_pre", "activation": "mlp_post"},
    "experts": {},
}
_N_TOKENS = 8  # of the pass on which a layer is checked


@dataclass(frozen=True)
class Mlp:
    """One layer's MLP."""

    layer: int
    kind: MlpKind
    reads: Literal["resid_mid", "resid_pre"]
    """The residual that the norm before it reads: without the layer's own attention in parallel
    blocks."""
    norm_before: NormMap
    norm_after: NormMap
    has_norm_after: bool
    """Whether what it writes differs from its output: by a norm, or by a factor."""
    readers: dict[str, tuple[Float[Tensor, "d_model d_mlp"], Float[Tensor, "d_mlp"] | None]]
    """Weight and bias of the stages that read the input: gate and up, or pre."""
    w_out: Float[Tensor, "d_mlp d_model"] | None
    b_out: Float[Tensor, "d_model"] | None
    activation: Callable[[Tensor], Tensor] | None
    """Elementwise; None in mixtures of experts."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of its stages, in the order of computation."""
        return _STAGES[self.kind] + (("written",) if self.has_norm_after else ())

    @property
    def hidden(self) -> str | None:
        """The stage whose coordinates are the neurons: what the output matrix reads."""
        return {"gated": "product", "plain": "activation", "experts": None}[self.kind]

    @property
    def d_mlp(self) -> int:
        """Number of neurons; 0 where they cannot be seen."""
        return 0 if self.w_out is None else self.w_out.shape[0]


def mlp_of(model: Any, layer: int) -> Mlp:
    """The MLP of a layer, checked on a few tokens the first time.

    Raises:
        InputError: no such layer.
        ModelError: its stages do not follow from one another as the library thinks they do.
    """
    return _checked(model, layer)[0]


def run_mlp(
    model: Any, layer: int, inputs: Float[Tensor, "token d_model"]
) -> dict[str, Float[Tensor, "token _"]]:
    """Run the MLP of a layer on given inputs, with the host's own module and no hook of the user's.

    Args:
        model: any TransformerLens model.
        layer: which block's.
        inputs: what the MLP reads: after the norm before it.

    Returns:
        Every stage in float32 on the CPU, and `written`: what would be added to the residual, which
        is the output where no norm follows.

    Raises:
        InputError: no such layer, or inputs of another width.
        ModelError: the MLP cannot be run alone, or does not do what its weights say.
    """
    if inputs.ndim != 2 or inputs.shape[1] != int(model.cfg.d_model):
        raise InputError(f"inputs have shape {list(inputs.shape)}, not [n, {model.cfg.d_model}]")
    mlp, multiplier = _checked(model, layer)
    return _run(model, mlp.kind, layer, inputs, multiplier, mlp.activation)


def need_neurons(model: Any, layer: int) -> Mlp:
    """The MLP of a layer, if its neurons can be seen.

    Raises:
        ModelError: it is a mixture of experts.
    """
    mlp = mlp_of(model, layer)
    if mlp.hidden is None:
        raise ModelError(
            f"the MLP of layer {layer} of {describe(model).name!r} is a mixture of experts: each "
            "token passes other weights, and the host shows no neurons; its input and output can "
            "be looked at (mlp_stage_alignment, mlp_response)"
        )
    return mlp


_known: weakref.WeakKeyDictionary[Any, dict[int, dict[str, Any]]] = weakref.WeakKeyDictionary()


def _checked(model: Any, layer: int) -> tuple[Mlp, float]:
    """The MLP, and the factor between its output and what is written, where no norm follows."""
    info = describe(model)
    if not 0 <= layer < info.n_layers:
        raise InputError(f"layer {layer} is out of range: there are {info.n_layers}, from 0 on")
    module = model.blocks[layer].mlp
    weights = _weights(module)
    known = _known.setdefault(model, {})
    if layer not in known:
        known[layer] = _examine(model, layer, *weights)
    facts = dict(known[layer])
    multiplier = facts.pop("multiplier")
    names = ("kind", "readers", "w_out", "b_out", "activation")
    return Mlp(layer=layer, **facts, **dict(zip(names, weights, strict=True))), multiplier


def _weights(module: Any) -> tuple[Any, ...]:
    """Kind, readers, output weight, output bias and activation function of the host's module."""
    w_in, w_gate, w_out = (_tensor(module, name) for name in ("W_in", "W_gate", "W_out"))
    if w_in is None or w_out is None or w_in.ndim != 2:
        return "experts", {}, None, None, None
    inner = getattr(module, "original_component", None) or module
    names = ("act_fn", "activation_fn", "act", "activation")
    found = (getattr(inner, name, None) for name in names)
    activation = next((one for one in found if callable(one)), None)
    b_in, b_out = _tensor(module, "b_in"), _tensor(module, "b_out")
    if w_gate is None:
        return "plain", {"pre": (w_in, b_in)}, w_out, b_out, activation
    readers = {"gate": (w_gate, _tensor(module, "b_gate")), "up": (w_in, b_in)}
    return "gated", readers, w_out, b_out, activation


def _tensor(module: Any, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _run(
    model: Any,
    kind: MlpKind,
    layer: int,
    inputs: Tensor,
    multiplier: float,
    activation: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    block = model.blocks[layer]
    weight = next(p for p in block.mlp.parameters() if p.is_floating_point())
    given = inputs.to(weight.device, _dtype(model))[None]
    seen: dict[str, Tensor] = {"input": given[0]}
    points = model.hook_dict

    def keep(stage: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, value: Tensor) -> None:
            seen[stage] = value.detach()[0]

        return hook

    with torch.no_grad(), hooks_aside(model), ExitStack() as stack:
        for stage, site in _HOOKED[kind].items():
            point = points[SITE_HOOKS[site].format(layer=layer)]
            stack.callback(point.register_forward_hook(keep(stage)).remove)
        try:
            output = block.mlp(given)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"the MLP of layer {layer} of {describe(model).name!r} cannot be run on vectors "
                f"of its own, outside of a forward pass ({type(error).__name__}: {error})"
            ) from error
        output = output[0] if isinstance(output, tuple) else output
        after = _norm_module(block, "ln2_post")
        written = multiplier * output if after is None else after(output)
    seen["output"], seen["written"] = output[0], written[0]
    if kind == "gated" and activation is not None:
        seen["activation"] = activation(seen["gate"]).detach()
    missing = [stage for stage in _STAGES[kind] if stage not in seen]
    if missing:
        raise ModelError(
            f"the hook of the stage {missing[0]!r} did not fire when the MLP of layer {layer} of "
            f"{describe(model).name!r} ran; its stages cannot be seen"
        )
    order = (*_STAGES[kind], "written")
    return {stage: seen[stage].float().cpu() for stage in order}


def _examine(model: Any, layer: int, *weights: Any) -> dict[str, Any]:
    """What is not written in the weights of a layer, from one pass over a few tokens."""
    kind, readers, w_out, b_out, activation = weights
    recorded = _record(model, kind, layer)
    inputs, raw, written = (recorded[name] for name in ("mlp_in", "mlp_raw", "mlp_out"))
    block = model.blocks[layer]
    first = recorded["resid_pre"]
    residuals = {"resid_mid": first + recorded["attn_out"], "resid_pre": first}
    # Parallel blocks share one norm, or have one each; some models have none in front.
    norms = [_norm_map(model, block, name, like=inputs) for name in ("ln2", "ln1", None)]
    before, reads = min(
        ((norm, name) for name in residuals for norm in norms if norm is not None),
        key=lambda place: place[0].error(residuals[place[1]], inputs),
    )
    after = _norm_map(model, block, "ln2_post", like=raw)
    multiplier = 1.0
    if after is None:
        after = NormMap.identity(raw.shape[-1])
        multiplier = float(after.scale(raw, written).median())
        multiplier = 1.0 if abs(multiplier - 1) < 1e-2 else multiplier
    own = _run(model, kind, layer, inputs, multiplier, activation)
    errors = {
        "the norm before it": before.error(residuals[reads], inputs),
        "the norm behind it": after.error(raw, written),
        "its output, run alone,": _difference(own["output"], raw),
        "what it writes, run alone,": _difference(own["written"], written),
    }
    for stage, site in _HOOKED[kind].items():
        errors[f"its {stage}, run alone,"] = _difference(own[stage], recorded[site])
    errors |= _weight_errors(kind, own, readers, w_out, b_out)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance(model):
        raise ModelError(
            f"in {describe(model).name!r}, the MLP of layer {layer} is not what the library takes "
            f"it for: {worst} is off by {errors[worst]:.1e} (relative), so nothing can be ascribed "
            "to its stages or neurons"
        )
    return {
        "reads": reads,
        "norm_before": before,
        "norm_after": after,
        "has_norm_after": _norm_module(block, "ln2_post") is not None or multiplier != 1.0,
        "multiplier": multiplier,
    }


def _record(model: Any, kind: MlpKind, layer: int) -> dict[str, Tensor]:
    """Everything around and in the MLP of a layer, in a pass over arbitrary tokens."""
    names = ["resid_pre", "attn_out", "mlp_in", "mlp_raw", "mlp_out", *_HOOKED[kind].values()]
    for site in missing_sites(model, [Site(name, layer) for name in names]):
        raise ModelError(
            f"{describe(model).name!r} has no site {site.name!r} in layer {layer}, so the stages "
            "of its MLP cannot be seen"
        )
    n_tokens = min(_N_TOKENS, describe(model).n_ctx or _N_TOKENS)
    tokens = (torch.arange(n_tokens) % int(model.cfg.d_vocab))[None]
    recorded: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def observer(activation: Tensor) -> None:
            recorded[name] = activation[0].float().cpu()

        return observer

    observers = {Site(name, layer): keep(name) for name in names}
    with hooks_aside(model):
        observe(model, tokens, torch.ones_like(tokens), observers)
    return recorded


def _weight_errors(
    kind: MlpKind, own: dict[str, Tensor], readers: Any, w_out: Any, b_out: Any
) -> dict[str, float]:
    """How far each stage is from what the weights make of the stage before."""
    if kind == "experts":
        return {}
    errors = {
        f"its {stage}, computed from the weights,": _difference(
            affine(own["input"], weight, bias), own[stage]
        )
        for stage, (weight, bias) in readers.items()
    }
    hidden = own["product" if kind == "gated" else "activation"]
    errors["its output, computed from the weights,"] = _difference(
        affine(hidden, w_out, b_out), own["output"]
    )
    if kind == "gated":
        product = own["activation"] * own["up"] if "activation" in own else torch.zeros(1)
        errors["activation times up"] = _difference(product, own["product"])
    return errors


def affine(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`vectors @ weight + bias` in float32 on the CPU."""
    product = vectors.float().cpu() @ weight.float().cpu()
    return product if bias is None else product + bias.float().cpu()


def _difference(found: Tensor, expected: Tensor) -> float:
    size = float(expected.float().norm().clamp_min(1e-12))
    return float((found.float() - expected.float()).norm()) / size


def _norm_module(block: Any, name: str) -> torch.nn.Module | None:
    module = getattr(block, name, None)
    return module if isinstance(module, torch.nn.Module) else None


def _norm_map(model: Any, block: Any, name: str | None, *, like: Tensor) -> NormMap | None:
    """A norm of the block as a map; the identity for no name, None where there is no such norm."""
    if name is None:
        return NormMap.identity(like.shape[-1])
    module = _norm_module(block, name)
    if module is None:
        return None
    parameter = next((p for p in block.parameters() if p.is_floating_point()), like)
    with torch.no_grad(), hooks_aside(model):
        return NormMap.of(module, like.to(parameter.device, _dtype(model)))


def _dtype(model: Any) -> torch.dtype:
    parameters = (p.dtype for p in model.parameters() if p.is_floating_point())
    return cast(torch.dtype, next(parameters, torch.float32))
