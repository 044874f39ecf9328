"""Cached counterfactual rows: the edited tokens alone, over what is kept of the clean text.

The clean run is streamed (`observe.attention_path`), and keeps queries, keys and values of every
layer, with positions applied, and the log-sum-exp of every query. The tokens of all rows then run
as one short sequence, in which attention is replaced: a row at position p attends to the kept keys
of the tokens before p (those within the layer's window) and to its own key, and to no other row.

    kept       queries, keys, values and log-sum-exp of 0 ... T-1, in every layer
    sequence   row 0 | row 1 | ... | the last token, unedited
    row r      repeats token p, at position p, sees kept keys 0 ... p-1 and its own

So a pass costs what its rows cost, whatever the length of the text, and no pattern is ever held.
The direct sink score is computed as in packed rows: with `rest` the log-sum-exp of a clean query
without the token's own key, and `b` its logit to the row's key, the new weight is
`sigmoid(b - rest)`.

The last token of the text runs with every pass, unedited, for two reasons. Positions whose scaling
depends on the longest one are those of the text; and if its residuals differ from those of the
clean run, the model does something that this engine does not reproduce, and the pass raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.attention_replaced import replaced_attention
from secondary_sinks.host.blocks import skipping
from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.precision import tolerance
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.interventions import Row
from secondary_sinks.intervene.row_attention import RowAttention
from secondary_sinks.intervene.rows import Place, RowMeter, RowStates, edit_hooks


def run_cached(model: Any, clean: CleanRun, rows: Sequence[Row]) -> RowStates:
    """Run all rows in one forward pass over themselves; see the module's description.

    Args:
        model: a `TransformerBridge` whose attention can be replaced.
        clean: the clean run of the text, made with `KeepText`.
        rows: what to edit.

    Raises:
        ModelError: the unedited last token differs from that of the clean run.
    """
    kept = clean.kept
    if kept is None:
        raise ModelError("the clean run kept no attention; rows cannot be run without the text")
    n_rows, n_tokens = len(rows), len(clean.tokens)
    positions = torch.tensor([*(row[0].position for row in rows), n_tokens - 1])
    places: list[Place] = [(0, index) for index in range(n_rows)]
    begin = clean.latest_begin(rows)
    residual = kept.residual_at(positions, begin)[None]
    meter = RowMeter(clean, places, begin=begin)
    attention = RowAttention(clean, kept.attention, positions, begin)
    errors: list[float] = []

    def compare(layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            expected = kept.last[layer]
            errors.append(float((activation[0, -1] - expected).norm() / expected.norm()))

        return read

    layers = range(begin, clean.n_layers)
    with ExitStack() as stack:
        if begin:
            stack.enter_context(skipping(model, begin))
        stack.enter_context(replaced_attention(model, attention))
        forward(
            model,
            clean.tokens[positions][None],
            [
                (Site("resid_pre", begin), lambda _: residual),
                *edit_hooks(rows, places, clean, kept.activations),
                *meter.editors(),
                *((Site("resid_post", layer), compare(layer)) for layer in layers),
            ],
            position_ids=positions[None],
        )
    error = float(torch.tensor(errors).max())  # NaN, if there is one
    if not error <= tolerance(model):
        raise ModelError(
            f"the last token, run alone over the kept text, differs by {error:.1e} without any "
            f"edit: {name_of(model)!r}, or a hook on it, cannot be run that way; use "
            "method='packed' or method='full'"
        )
    return meter.states(positions[:-1], attention.direct_score[:-1])
