"""The MLP of one layer by itself: its stages, its weights, and the norms before and after it.

    residual -> norm -> input -> gate  -> activation \\
                              -> up    ------------- * -> product -> output -> norm -> written

An MLP without a gate has `pre -> activation -> output`; a mixture of experts shows only input and
output, because each token uses other weights. Most models have no norm after the MLP, and the
output itself is written into the residual stream.

>>> stages = run_mlp(model, 5, inputs)           # inputs: [token, d_model], after the norm
>>> stages["product"] @ mlp_of(model, 5).w_out   # its output, except for a bias

`run_mlp` calls the model's own module outside of a forward pass. `mlp_of` reads the weights and
checks them the first time that a layer of a model is asked for: one pass over a few tokens records
every stage, and each must follow from the one before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.host.forward import observe
from secondary_sinks.host.hooks_aside import hooks_aside
from secondary_sinks.host.model_info import describe, name_of
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
_N_TOKENS = 8  # of the pass that checks a layer


@dataclass(frozen=True)
class Mlp:
    """The MLP of one layer."""

    layer: int
    kind: MlpKind
    readers: dict[str, tuple[Float[Tensor, " d_model d_mlp"], Float[Tensor, " d_mlp"] | None]]
    """Weight and bias of the stages that read the input: gate and up, or pre."""
    w_out: Float[Tensor, " d_mlp d_model"] | None
    b_out: Float[Tensor, " d_model"] | None
    activation: Callable[[Tensor], Tensor] | None
    """Elementwise; None in mixtures of experts."""
    reads: Literal["resid_mid", "resid_pre"]
    """The residual that the norm before the MLP reads: in parallel blocks without the output of the
    layer's attention."""
    norm_before: NormMap
    norm_after: NormMap
    has_norm_after: bool
    """Whether what is written differs from the output: by a norm, or by `multiplier`."""
    multiplier: float
    """What is written over the output, where no norm follows; 1 in most models."""

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
        ModelError: its stages do not follow from each other as the diagram above says.
    """
    info = describe(model)
    if not 0 <= layer < int(info.n_layers or 0):
        raise InputError(f"layer {layer} is out of range: there are {info.n_layers}, from 0 on")
    weights = _weights(model.blocks[layer].mlp)
    checked = _checked.setdefault(model, {})
    if layer not in checked:
        checked[layer] = _examine(model, layer, weights)
    return Mlp(layer, *weights, *checked[layer])


def run_mlp(
    model: Any, layer: int, inputs: Float[Tensor, " token d_model"]
) -> dict[str, Float[Tensor, " token _"]]:
    """Run the MLP of a layer on given inputs, without any hooks of the user's.

    Args:
        model: any TransformerLens model.
        layer: the block.
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
    mlp = mlp_of(model, layer)
    return _run(model, layer, mlp.kind, mlp.activation, mlp.multiplier, inputs)


def need_neurons(model: Any, layer: int) -> Mlp:
    """The MLP of a layer, if its neurons can be seen.

    Raises:
        ModelError: it is a mixture of experts.
    """
    mlp = mlp_of(model, layer)
    if mlp.hidden is None:
        raise ModelError(
            f"the MLP of layer {layer} of {name_of(model)!r} is a mixture of experts: each "
            "token uses other weights, and TransformerLens shows no neurons; look at its input and "
            "output with mlp_stage_alignment or mlp_response"
        )
    return mlp


def shows_neurons(model: Any, layer: int) -> bool:
    """Whether `mlp_post` of a layer has an entry for each neuron; in a mixture of experts, where
    each token uses other weights, it has one for each residual dimension."""
    return _weights(model.blocks[layer].mlp).kind != "experts"


class _Weights(NamedTuple):
    """The fields of `Mlp` that are read from the module."""

    kind: MlpKind
    readers: dict[str, tuple[Tensor, Tensor | None]]
    w_out: Tensor | None
    b_out: Tensor | None
    activation: Callable[[Tensor], Tensor] | None


class _Surroundings(NamedTuple):
    """The fields of `Mlp` that are found by a pass over a few tokens."""

    reads: Literal["resid_mid", "resid_pre"]
    norm_before: NormMap
    norm_after: NormMap
    has_norm_after: bool
    multiplier: float


_checked: weakref.WeakKeyDictionary[Any, dict[int, _Surroundings]] = weakref.WeakKeyDictionary()


def _weights(module: Any) -> _Weights:
    w_in, w_gate, w_out = (_tensor(module, name) for name in ("W_in", "W_gate", "W_out"))
    if w_in is None or w_out is None or w_in.ndim != 2:
        return _Weights("experts", {}, None, None, None)
    inner = getattr(module, "original_component", None) or module
    names = ("act_fn", "activation_fn", "act", "activation")
    functions = (getattr(inner, name, None) for name in names)
    # Without such an attribute the usual function is assumed (LFM2), and checked as all others are.
    activation: Any = next((f for f in functions if callable(f)), torch.nn.functional.silu)
    b_in, b_out = _tensor(module, "b_in"), _tensor(module, "b_out")
    if w_gate is None:
        return _Weights("plain", {"pre": (w_in, b_in)}, w_out, b_out, activation)
    readers = {"gate": (w_gate, _tensor(module, "b_gate")), "up": (w_in, b_in)}
    return _Weights("gated", readers, w_out, b_out, activation)


def _tensor(module: Any, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _run(
    model: Any,
    layer: int,
    kind: MlpKind,
    activation: Callable[[Tensor], Tensor] | None,
    multiplier: float,
    inputs: Tensor,
) -> dict[str, Tensor]:
    block, points = model.blocks[layer], model.hook_dict
    weight = next(p for p in block.mlp.parameters() if p.is_floating_point())
    batch = inputs.to(weight.device, _dtype(model))[None]
    stages: dict[str, Tensor] = {"input": batch[0]}

    def keep(stage: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, value: Tensor) -> None:
            stages[stage] = value.detach()[0]

        return hook

    with torch.no_grad(), hooks_aside(model), ExitStack() as stack:
        for stage, site in _HOOKED[kind].items():
            point = points[SITE_HOOKS[site].format(layer=layer)]
            stack.callback(point.register_forward_hook(keep(stage)).remove)
        try:
            output = block.mlp(batch)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"the MLP of layer {layer} of {name_of(model)!r} cannot be run outside of a "
                f"forward pass ({type(error).__name__}: {error})"
            ) from error
        output = output[0] if isinstance(output, tuple) else output
        norm_after = _norm_module(block, "ln2_post")
        written = multiplier * output if norm_after is None else norm_after(output)
    stages["output"], stages["written"] = output[0], written[0]
    if kind == "gated" and activation is not None:
        stages["activation"] = activation(stages["gate"]).detach()
    missing = [stage for stage in _STAGES[kind] if stage not in stages]
    if missing:
        raise ModelError(
            f"the hook of the stage {missing[0]!r} did not fire when the MLP of layer {layer} of "
            f"{name_of(model)!r} ran, so its stages cannot be seen"
        )
    return {stage: stages[stage].float().cpu() for stage in (*_STAGES[kind], "written")}


def _examine(model: Any, layer: int, weights: _Weights) -> _Surroundings:
    """Find the norms around an MLP from one pass over a few tokens, and check every stage."""
    recorded = _record(model, weights.kind, layer)
    inputs, output, written = (recorded[name] for name in ("mlp_in", "mlp_raw", "mlp_out"))
    block = model.blocks[layer]
    residuals: dict[Literal["resid_mid", "resid_pre"], Tensor] = {
        "resid_mid": recorded["resid_pre"] + recorded["attn_out"],
        "resid_pre": recorded["resid_pre"],
    }
    # Parallel blocks share one norm or have one each; some models have none before the MLP.
    norms = [_norm_map(model, block, name, like=inputs) for name in ("ln2", "ln1", None)]
    pairs = [
        (norm, *residual) for residual in residuals.items() for norm in norms if norm is not None
    ]
    before, reads, _ = min(pairs, key=lambda pair: pair[0].error(pair[2], inputs))
    after = _norm_map(model, block, "ln2_post", like=output)
    has_norm_after, multiplier = after is not None, 1.0
    if after is None:
        after = NormMap.identity(output.shape[-1])
        ratio = float(after.scale(output, written).median())
        has_norm_after = not abs(ratio - 1) < 1e-2
        multiplier = ratio if has_norm_after else 1.0
    stages = _run(model, layer, weights.kind, weights.activation, multiplier, inputs)
    errors = {
        "the norm before it": before.error(residuals[reads], inputs),
        "the norm after it": after.error(output, written),
        "its output, run alone,": _difference(stages["output"], output),
        "what it writes, run alone,": _difference(stages["written"], written),
    }
    for stage, site in _HOOKED[weights.kind].items():
        errors[f"its {stage}, run alone,"] = _difference(stages[stage], recorded[site])
    errors |= _weight_errors(weights, stages)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance(model):
        raise ModelError(
            f"in {name_of(model)!r}, the MLP of layer {layer} has a structure that this "
            f"library does not know: {worst} is off by {errors[worst]:.1e} (relative), so nothing "
            "can be attributed to its stages or neurons"
        )
    return _Surroundings(reads, before, after, has_norm_after, multiplier)


def _record(model: Any, kind: MlpKind, layer: int) -> dict[str, Tensor]:
    """Everything in and around the MLP of a layer, in a pass over arbitrary tokens."""
    names = ["resid_pre", "attn_out", "mlp_in", "mlp_raw", "mlp_out", *_HOOKED[kind].values()]
    for site in missing_sites(model, [Site(name, layer) for name in names]):
        raise ModelError(
            f"{name_of(model)!r} has no site {site.name!r} in layer {layer}, so the stages "
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


def _weight_errors(weights: _Weights, stages: dict[str, Tensor]) -> dict[str, float]:
    """How far each stage is from what the weights make of the stage before."""
    if weights.w_out is None:
        return {}
    errors = {
        f"its {stage}, computed from the weights,": _difference(
            affine(stages["input"], weight, bias), stages[stage]
        )
        for stage, (weight, bias) in weights.readers.items()
    }
    hidden = stages["product" if weights.kind == "gated" else "activation"]
    errors["its output, computed from the weights,"] = _difference(
        affine(hidden, weights.w_out, weights.b_out), stages["output"]
    )
    if weights.kind == "gated":
        product = stages["activation"] * stages["up"]
        errors["activation times up"] = _difference(product, stages["product"])
    return errors


def affine(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`vectors @ weight + bias` in float32 on the CPU."""
    product = vectors.float().cpu() @ weight.float().cpu()
    return product if bias is None else product + bias.float().cpu()


def _difference(values: Tensor, expected: Tensor) -> float:
    size = float(expected.float().norm().clamp_min(1e-12))
    return float((values.float() - expected.float()).norm()) / size


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
