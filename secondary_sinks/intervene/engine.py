"""Which engine runs counterfactual rows: the fastest that is right in the model at hand.

"cached" runs rows alone, over the stored queries, keys and values of the text; "packed" puts them
behind the text; "full" runs the whole text once for each row. The first two are used only where
`intervene.self_test` finds them right, and never where a layer hands a state from token to token
(hybrids of attention with state spaces, convolutions or linear attention).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from secondary_sinks.errors import ModelError
from secondary_sinks.host.forward import has_hooks
from secondary_sinks.host.model_info import generation_of, n_layers_of, name_of
from secondary_sinks.host.precision import attention_tolerance
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, layer_sites, recurrent_layers, spell_layers
from secondary_sinks.intervene.clean_run import CleanRun, KeepMasks, KeepText
from secondary_sinks.intervene.run_rows import Engine, FastEngine
from secondary_sinks.intervene.self_test import difference_from_clean, difference_from_full
from secondary_sinks.observe.attention_path import path_of_attention
from secondary_sinks.sinks.sink_map import SinkMap

Method = Literal["auto", "cached", "packed", "full"]


def clean_run_for_rows(
    model: Any,
    sink_map: SinkMap,
    method: Method,
    *,
    positions: Iterable[int],
    sites: Iterable[Site] = (),
    begin_at: Iterable[int] = (),
    fwd_hooks: Sequence[UserHook] = (),
) -> CleanRun:
    """Run the clean text, and keep what the engine needs that `method` asks for.

    Args:
        model: any TransformerLens model.
        sink_map: the sink map of the text.
        method: an engine, or "auto", which keeps the text for cached rows where attention can be
            streamed and there are no hooks, and masks for packed rows otherwise.
        positions: the tokens of the rows to come.
        sites: those at which edits use other tokens' activations (`rows.sites_of_other_tokens`).
        begin_at: layers at which passes of packed rows may begin.
        fwd_hooks: the user's hooks.

    Raises:
        ModelError: the model cannot be measured, or an engine was asked for and is impossible.
    """
    recurrent = recurrent_layers(model)
    if recurrent and method in ("cached", "packed"):
        raise ModelError(
            f"{method} rows are impossible in {name_of(model)!r}: {spell_layers(recurrent)} "
            "mix tokens by more than attention, in a state that each token hands to the next, and "
            "rows would not have that of their text; use method='full'"
        )
    if recurrent or method == "full":
        return CleanRun(sink_map)
    keep: KeepText | KeepMasks = KeepMasks(begin_at)
    if method == "cached" or (method == "auto" and not (fwd_hooks or has_hooks(model))):
        read = layer_sites(["resid_pre", "resid_post"], n_layers_of(model))
        tokens = sink_map.array("tokens")
        try:
            path_of_attention(model, tokens, "streaming", sites=[*read, *sites])
            keep = KeepText(positions, sites)
        except ModelError:
            if method == "cached":
                raise
    return CleanRun.of(model, sink_map, fwd_hooks=fwd_hooks, keep=keep)


def choose_engine(
    model: Any,
    clean: CleanRun,
    method: Method,
    positions: Sequence[int],
    fwd_hooks: Sequence[UserHook] = (),
) -> tuple[Engine, float | None]:
    """The engine to run, and what its self-test measured.

    Args:
        model: any TransformerLens model.
        clean: from `clean_run_for_rows` with the same `method`.
        method: an engine, or "auto" for the one that the clean run was made for if it is right,
            and full passes otherwise.
        positions: the tokens of the rows to come.
        fwd_hooks: the user's hooks.

    Returns:
        The engine and the largest relative difference of its rows from full passes. Where "auto"
        comes down to full passes, the difference of the engine that failed, None if none could run.

    Raises:
        ModelError: the engine that was asked for is wrong in this model, or with these hooks.
    """
    if method == "full" or recurrent_layers(model):
        return "full", None
    engine: FastEngine = "packed" if clean.kept is None else "cached"
    error, reason = _self_test(model, clean, engine, positions, fwd_hooks)
    if error is not None and error <= attention_tolerance(model):
        return engine, error
    if method == "auto":
        return "full", error
    if not reason:
        measured = "" if error is None else f" (relative error {error:.1e})"
        reason = f"its attention, or a hook on it, cannot be run that way{measured}"
    raise ModelError(f"{method} rows are wrong in {name_of(model)!r}: {reason}; use method='full'")


def _self_test(
    model: Any,
    clean: CleanRun,
    engine: FastEngine,
    positions: Sequence[int],
    fwd_hooks: Sequence[UserHook],
) -> tuple[float | None, str]:
    """Largest relative difference that the tests of an engine measure, None if they were not made,
    and why it cannot run."""
    hooked = bool(fwd_hooks) or has_hooks(model)
    # Cached rows run without the text, so a hook that looks at the sequence would edit others.
    if generation_of(model) == "other" or (engine == "cached" and hooked):
        return None, ""
    error, reason = difference_from_full(model, clean, engine)
    if hooked and error <= attention_tolerance(model):
        error = max(error, difference_from_clean(model, clean, engine, positions, fwd_hooks))
    return error, reason
