"""Where a result comes from: enough to repeat it, or to see why a repetition differs.

Every result has a `provenance`. It also ties a sink map to its model: `check_same_model` raises
where a map meets other weights, another tokenizer or other hooks.
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
    """Names of the hook points that carried the user's hooks."""
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
        """Record the model and the software in their present state.

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
        """The same for a pass over one text.

        Args:
            tokenizer: the model's, or None.
            first_token: id of the first token of the text.
            chat: whether the text went through the chat template.
            attention: how attention was computed.
        """
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
    """Canonical names of the hook points that carry the user's hooks, on the model or for one pass.

    A hook that is chosen by a function of names is "a filter of names". Two different functions at
    the same hook point have the same label.
    """
    points = model.hook_dict

    def label(name: Any) -> str:
        if not isinstance(name, str):
            return "a filter of names"
        return str(points[name].name) if name in points else name

    return tuple(sorted([*(label(name) for name, _ in fwd_hooks), *hooks_on(model)]))


def check_same_model(
    provenance: Provenance, model: Any, fwd_hooks: Sequence[UserHook] = (), *, what: str
) -> None:
    """Raise `InputError` if a result was not measured in `model` in its present state.

    Args:
        provenance: of the result.
        model: the model to compare with.
        fwd_hooks: hooks of the next pass.
        what: the result in words, for the message.

    Raises:
        InputError: other weights, another tokenizer, or other hooks.
        ModelError: `model` is not a causal TransformerLens model.
    """
    info = describe(model)
    measured, now = provenance.weights, weights_fingerprint(model)
    if measured != now:
        raise InputError(
            f"{what} was measured in {_spelled(provenance.model, measured)}, but the model is "
            f"{_spelled(info, now)}: run detect_sinks in this model"
        )
    tokenizer = tokenizer_fingerprint(getattr(model, "tokenizer", None))
    if provenance.tokenizer != tokenizer:
        raise InputError(
            f"{what} was measured in {provenance.model.name!r} with tokenizer "
            f"{provenance.tokenizer}, but {info.name!r} now has tokenizer {tokenizer}: run "
            "detect_sinks again"
        )
    hooks = hook_labels(model, fwd_hooks)
    if provenance.hooks != hooks:
        raise InputError(
            f"{what} was measured with hooks at {_listed(provenance.hooks)}, but now there are "
            f"hooks at {_listed(hooks)}: pass the same fwd_hooks to detect_sinks and to the "
            "analysis"
        )


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _spelled(info: ModelInfo, weights: str | None) -> str:
    return f"{info.name!r} (weights {weights or 'unknown'})"


def _listed(hooks: Iterable[str]) -> str:
    return ", ".join(hooks) or "no hook point"
