"""Does the library work on this model, and which of its fast paths?

Everything that the library would find out on first use, at once and on one short text: the hooks
that exist, the sum that attributions rest on, the state of the weights, the tokenizer, the path of
attention, the engines of counterfactual rows, and the memory that a text takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor

from secondary_sinks.errors import InputError, SecondarySinksError
from secondary_sinks.host.forward import fired
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.host.memory import eager_attention_bytes
from secondary_sinks.host.model_info import ModelInfo, describe
from secondary_sinks.host.precision import attention_tolerance, tolerance
from secondary_sinks.host.protocol import Model
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import (
    MODULE_SITES,
    SITE_HOOKS,
    Site,
    attention_layers,
    layer_sites,
)
from secondary_sinks.host.text_input import tokenize
from secondary_sinks.intervene.counterfactuals import counterfactuals
from secondary_sinks.intervene.edits import Zero
from secondary_sinks.intervene.engine import Method
from secondary_sinks.intervene.interventions import Intervention
from secondary_sinks.observe.attention_path import path_of_attention
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.attention_check import attention_check
from secondary_sinks.sinks.detect_sinks import detect_sinks
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.texts import bundled_texts

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal["ok", "failed", "refused"]

_N_TOKENS = 64
"""Length of the text that is run."""

_N_JUDGED = 400
"""Length of the two texts on which detection is compared with raw attention."""

_MOST_DISAGREED = 0.1
"""Tokens on which the two may disagree, over the number of clear sinks."""

_LONG = 4096
"""Length for which memory is estimated, by default."""

_NEEDED = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""Sites that detection and attribution read in every layer."""

_OF_SOME = ("pattern", "q_gate")
"""Sites of the layers that have attention, and of gated attention."""


def check_model(model: Model, *, n_tokens: int | None = None) -> ModelCheck:
    """Does the library work on this model, and which of its fast paths?

    Runs the start of a bundled text (64 tokens; token ids 0, 1, 2, ... in a model without a
    tokenizer) through detection and every engine. It takes some ten forward passes, and leaves the
    model as it was.

    Args:
        model: any TransformerLens model.
        n_tokens: length of the text for which memory is estimated; it is not run. None: 4,096, or
            the model's context if that is shorter.

    Returns:
        What was checked, in order. "refused" means that the library does not use a path in this
        model and says why; a slower one takes its place and results are right. "failed" means that
        results would be wrong or cannot be had.

    Not evidence for: behavior on longer texts. Beyond a sliding window attention and engines are
    checked again when a text first exceeds it.

    Raises:
        InputError: `n_tokens` is not a positive integer.

    >>> check = check_model(model)
    >>> check.passed
    True
    >>> check.to_frame()
    """
    if n_tokens is not None and (not isinstance(n_tokens, int) or n_tokens < 1):
        raise InputError(f"n_tokens must be a positive integer, got {n_tokens!r}")
    try:
        info = describe(model)
    except SecondarySinksError as error:
        name = type(model).__name__
        nothing = Provenance(ModelInfo(name))
        return ModelCheck(nothing, (Check("model", "failed", str(error)),))
    n_tokens = n_tokens or min(_LONG, info.n_ctx or _LONG)
    return ModelCheck(Provenance.of(model), tuple(_checks(model, info, n_tokens)))


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    what: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class ModelCheck(Result):
    """What works on a model, from `check_model`."""

    provenance: Provenance
    checks: tuple[Check, ...] = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether nothing failed. Fast paths that the library refuses do not count."""
        return all(check.outcome != "failed" for check in self.checks)

    def __repr__(self) -> str:
        parts = [f"{sum(check.outcome == 'ok' for check in self.checks)} of {len(self.checks)} ok"]
        for outcome in ("failed", "refused"):
            names = [check.what for check in self.checks if check.outcome == outcome]
            parts += [f"{outcome}: {', '.join(names)}"] if names else []
        return f"ModelCheck({self.provenance.model.name!r}, {'; '.join(parts)})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each check: what, outcome, detail."""
        import pandas as pd

        return pd.DataFrame([vars(check) for check in self.checks])


def _checks(model: Any, info: ModelInfo, n_tokens: int) -> Iterator[Check]:
    yield Check("model", "ok", _spelled(info))
    tokens = _tokens(model, info)
    yield _judged("sites", lambda: _needed_sites(model, tokens))
    yield _judged("other sites", lambda: _other_sites(model, tokens))
    yield _judged("residual identity", lambda: _identity(model))
    yield _judged("weights", lambda: _raw_weights(info))
    yield _judged("tokenizer", lambda: _tokenizer(model))
    yield _judged("streamed attention", lambda: _streaming(model, tokens), otherwise="refused")
    found: list[SinkMap] = []
    yield _judged("detection", lambda: _detection(model, tokens, found))
    if getattr(model, "tokenizer", None) is not None:
        yield _judged("attention-only check", lambda: _agreement(model, info), otherwise="refused")
    if found:
        engine = partial(_engine, model, found[0])
        yield _judged("full passes", partial(engine, "full"))
        yield _judged("cached rows", partial(engine, "cached"), otherwise="refused")
        yield _judged("packed rows", partial(engine, "packed"), otherwise="refused")
    yield _judged("memory", lambda: _memory(model, info, n_tokens))


def _judged(what: str, run: Callable[[], str | Check], *, otherwise: Outcome = "failed") -> Check:
    """The check that `run` returns, or "ok" with its detail; `otherwise` where it raises."""
    try:
        result = run()
    except SecondarySinksError as error:
        return Check(what, otherwise, str(error))
    except Exception as error:  # models fail in their own ways, and the other checks are to follow
        return Check(what, "failed", f"{type(error).__name__}: {error}")
    return Check(what, "ok", result) if isinstance(result, str) else result


def _tokens(model: Any, info: ModelInfo) -> Int[Tensor, " token"]:
    length = min(_N_TOKENS, info.n_ctx or _N_TOKENS)
    if getattr(model, "tokenizer", None) is None:
        return torch.arange(length) % int(model.cfg.d_vocab)
    text = bundled_texts("prose")[0].content
    return tokenize(model, text, max_tokens=length)[0].tokens


def _spelled(info: ModelInfo) -> str:
    size = f"{info.n_layers} layers, {info.n_heads} heads, width {info.d_model}"
    return f"{info.name}: {info.generation}, {size}, {info.dtype} on {info.device}"


def _needed_sites(model: Any, tokens: Tensor) -> str | Check:
    with_attention = attention_layers(model)
    sites = layer_sites(_NEEDED, int(model.cfg.n_layers))
    sites += [Site("pattern", layer) for layer in with_attention]
    seen = fired(model, tokens[None], sites)
    if absent := [site for site in sites if site not in seen]:
        return Check("sites", "failed", f"missing, or not firing once: {_listed(absent)}")
    n_layers = counted(len(with_attention), "layer")
    return f"{', '.join(_NEEDED)} in every layer, attention in {n_layers}"


def _other_sites(model: Any, tokens: Tensor) -> str | Check:
    names = [name for name in SITE_HOOKS if name not in (*_NEEDED, *_OF_SOME, *MODULE_SITES)]
    sites = layer_sites(names, int(model.cfg.n_layers))
    seen = fired(model, tokens[None], sites)
    if absent := [site for site in sites if site not in seen]:
        return Check("other sites", "refused", f"what reads these raises: {_listed(absent)}")
    return "all"


def _listed(sites: list[Site]) -> str:
    """Each site's name, with its number of layers."""
    counts = Counter(site.name for site in sites)
    return ", ".join(f"{name} ({counted(n, 'layer')})" for name, n in counts.items())


def _identity(model: Any) -> str:
    error = check_residual_identity(model)
    return (
        "resid_pre + attn_out + mlp_out = resid_post up to a relative error of "
        f"{error:.0e}, allowed {tolerance(model):.0e}"
    )


def _raw_weights(info: ModelInfo) -> str | Check:
    if info.processing:
        changes = ", ".join(info.processing)
        return Check("weights", "failed", f"{changes}: sinks are defined on raw weights")
    return "raw"


def _tokenizer(model: Any) -> str | Check:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return Check("tokenizer", "refused", "none: pass token ids instead of strings")
    bos = tokenizer.bos_token
    own = bos is not None and tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
    prepends = bool(getattr(model.cfg, "default_prepend_bos", own))
    if bos is not None and prepends != own:
        both = ("TransformerLens", "the tokenizer")
        adds, does_not = both if prepends else both[::-1]
        return Check(
            "tokenizer",
            "failed",
            f"{adds} puts {bos!r} before a text and {does_not} does not, so the first token may be "
            f"one that the model was not trained with; set model.cfg.default_prepend_bos = {own}",
        )
    begins = f"texts begin with {bos!r}" if own else "no BOS token before a text"
    template = "a" if getattr(tokenizer, "chat_template", None) else "no"
    return f"{len(tokenizer):,} tokens; {begins}; {template} chat template"


def _streaming(model: Any, tokens: Tensor) -> str:
    read = layer_sites(["resid_pre", "resid_post"], int(model.cfg.n_layers))
    path_of_attention(model, tokens, "streaming", sites=read)
    return "equals the eager pass up to rounding; memory grows with the text, not its square"


def _detection(model: Any, tokens: Tensor, found: list[SinkMap]) -> str:
    sink_map = detect_sinks(model, tokens, primary=0)
    found.append(cast(SinkMap, sink_map))
    return f"runs on {len(tokens)} tokens"


def _agreement(model: Any, info: ModelInfo) -> str | Check:
    """How far detection and raw attention agree on two bundled texts."""
    texts = [bundled_texts(kind)[0].content for kind in ("prose", "plain")]
    length = min(_N_JUDGED, info.n_ctx or _N_JUDGED)
    maps = [cast(SinkMap, detect_sinks(model, text, max_tokens=length)) for text in texts]
    checks = [attention_check(sink_map) for sink_map in maps]
    n_clear = sum(len(check.clear_sinks) for check in checks)
    n_false, n_missed = (
        sum(len(positions) for positions in which)
        for which in zip(*((check.false_calls, check.misses) for check in checks), strict=True)
    )
    found = f"{counted(n_clear, 'clear sink')}, {n_missed} missed, {counted(n_false, 'false call')}"
    if n_missed + n_false > _MOST_DISAGREED * n_clear:
        why = f"{found}: detection and raw attention disagree; see ss.attention_check"
        return Check("attention-only check", "failed", why)
    return f"{found}, on {len(maps)} bundled texts of {length} tokens"


def _engine(model: Any, sink_map: SinkMap, method: Method) -> str | Check:
    row = Intervention("mlp_out", int(model.cfg.n_layers) // 3, sink_map.n_tokens // 2, Zero())
    rows = counterfactuals(model, sink_map, [row], method=method, progress=False)
    if method == "full":
        return "run; the other engines are compared with them"
    allowed = attention_tolerance(model)
    return f"equal full passes up to {rows.self_test:.0e}, allowed {allowed:.0e}"


def _memory(model: Any, info: ModelInfo, n_tokens: int) -> str | Check:
    if info.n_ctx is not None and n_tokens > info.n_ctx:
        return Check(
            "memory", "failed", f"the context holds {info.n_ctx:,} tokens, not {n_tokens:,}"
        )
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    # Queries, and at most as many keys and values; residuals before and after.
    width = 3 * int(model.cfg.n_heads) * int(model.cfg.d_head) + 2 * int(model.cfg.d_model)
    kept = 4 * n_tokens * width * int(model.cfg.n_layers)
    return (
        f"weights {_gigabytes(weights)}; with {n_tokens:,} tokens a layer's eager attention takes "
        f"about {_gigabytes(eager_attention_bytes(model, n_tokens))}, and cached rows keep up to "
        f"{_gigabytes(kept)} of the text"
    )


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2g} GiB"
