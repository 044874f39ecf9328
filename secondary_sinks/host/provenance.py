"""Where a result comes from: enough to repeat it, or to see why a repetition differs.

Every result has a `provenance`. It also says which model a sink map belongs to: `check_model`
refuses a map wherever it meets other weights, another tokenizer or other hooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from secondary_sinks.errors import InputError
from secondary_sinks.host.fingerprint import (
    template_hash,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from secondary_sinks.host.forward import hooks_on
from secondary_sinks.host.model_info import ModelInfo, describe
from secondary_sinks.host.protocol import UserHook

PACKAGES = ("secondary-sinks", "transformer-lens", "transformers", "torch")


@dataclass(frozen=True)
class Provenance:
    """The model, the software and the settings behind a result."""

    model: ModelInfo
    weights: str | None = None
    """Fingerprint of the weights (`host.fingerprint`); None in published files."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None for a model without one."""
    chat_template: str | None = None
    """Hash of the tokenizer's chat template, if the text went through it."""
    starts_with_bos: bool | None = None
    """Whether the text begins with the tokenizer's beginning-of-sequence token; None where the
    tokenizer has none."""
    attention: str | None = None
    """How attention was computed: "eager", "streaming" or "fused"."""
    hooks: tuple[str, ...] = ()
    """Names of the hook points at which hooks of the user's were in force."""
    engine: str | None = None
    """The engine that ran interventions: "cached", "packed" or "full"."""
    seed: int | None = None
    """Of every random choice."""
    thresholds: dict[str, float | int] = field(default_factory=dict)
    """Of the criterion."""
    versions: dict[str, str] = field(default_factory=dict)
    """Version of each package in `PACKAGES`."""

    @classmethod
    def of(cls, model: Any, *, fwd_hooks: Sequence[UserHook] = ()) -> Provenance:
        """The model and the software as they are now.

        Raises:
            ModelError: `model` is not a causal TransformerLens model.
        """
        return cls(
            model=describe(model),
            weights=weights_fingerprint(model),
            tokenizer=tokenizer_fingerprint(getattr(model, "tokenizer", None)),
            hooks=hook_labels(model, fwd_hooks),
            versions={package: _version(package) for package in PACKAGES},
        )

    def of_text(
        self, tokenizer: Any, first_token: int, *, chat: bool, attention: str
    ) -> Provenance:
        """The same, of a pass over one text."""
        bos = getattr(tokenizer, "bos_token_id", None)
        return dataclasses.replace(
            self,
            chat_template=template_hash(tokenizer) if chat else None,
            starts_with_bos=None if bos is None else first_token == bos,
            attention=attention,
        )

    def extended(self, **changes: Any) -> Provenance:
        """The same with some fields changed, such as `seed` and `engine`."""
        return dataclasses.replace(self, **changes)


def hook_labels(model: Any, fwd_hooks: Iterable[UserHook]) -> tuple[str, ...]:
    """Names of the hook points that carry a user's hook, on the model or for this pass."""
    given = (name if isinstance(name, str) else "a filter of names" for name, _ in fwd_hooks)
    return tuple(sorted([*given, *hooks_on(model)]))


def check_model(
    provenance: Provenance, model: Any, fwd_hooks: Sequence[UserHook] = (), *, what: str
) -> None:
    """Refuse a result that was measured in another model than `model` is now.

    Args:
        provenance: of the result.
        model: the model that it meets.
        fwd_hooks: hooks of the pass to come.
        what: the result, for the message.

    Raises:
        InputError: other weights, another tokenizer, or other hooks.
        ModelError: `model` is not a causal TransformerLens model.
    """
    info = describe(model)
    measured, now = provenance.weights, weights_fingerprint(model)
    if measured != now:
        raise InputError(
            f"{what} was measured in {_spelled(provenance.model, measured)}, the model is "
            f"{_spelled(info, now)}: detect its own sinks with detect_sinks"
        )
    tokenizer = tokenizer_fingerprint(getattr(model, "tokenizer", None))
    if provenance.tokenizer != tokenizer:
        raise InputError(
            f"{what} was measured with tokenizer {provenance.tokenizer}, the model {info.name!r} "
            f"now has tokenizer {tokenizer}: detect the sinks again"
        )
    hooks = hook_labels(model, fwd_hooks)
    if provenance.hooks != hooks:
        raise InputError(
            f"{what} was measured with hooks at {list(provenance.hooks) or 'no hook point'}, now "
            f"there are hooks at {list(hooks) or 'no hook point'}: pass the same fwd_hooks to "
            "detect_sinks and to the analysis"
        )


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _spelled(info: ModelInfo, weights: str | None) -> str:
    return f"{info.name!r} (weights {weights or 'unknown'})"
