"""What would a token have been, had one of its activations been different?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.memory import MEMORY_BUDGET
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.intervene.engine import Method, choose_engine, clean_run_for_rows
from secondary_sinks.intervene.full_passes import TotalEffects, run_full
from secondary_sinks.intervene.interventions import Intervention, Row, check_rows, rows_of
from secondary_sinks.intervene.rows import sites_of_other_tokens
from secondary_sinks.intervene.run_rows import first_edits, run_rows
from secondary_sinks.result import counted
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd


def counterfactuals(
    model: Model,
    sink_map: SinkMap,
    interventions: Sequence[Intervention | Sequence[Intervention]],
    *,
    method: Method = "auto",
    memory_budget: int = MEMORY_BUDGET,
    fwd_hooks: Sequence[UserHook] = (),
    progress: bool | None = None,
) -> CounterfactualRows:
    """What would a token have been, had one of its activations been different?

    Recomputes single tokens of a text under interventions, hundreds in one forward pass. For every
    intervention: the token's alignment, norm and whether it is a sink after each block, and the
    direct sink score of every head.

    >>> sink_map = detect_sinks(model, text)
    >>> edit = Intervention("mlp_out", layer=5, position=3, edit=Zero())
    >>> counterfactuals(model, sink_map, [edit]).to_frame()

    All of it is exact. Not evidence for: effects on later tokens (the primary's new score, the
    loss, the output); for those run `method="full"`.

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model; its tokens are run, and its criterion judges
            the rows.
        interventions: one row each; a sequence of them is several edits of one token that happen
            together.
        method: "cached" runs rows alone, over the kept queries, keys and values of the text, where
            attention can be replaced (bridges only), and is the fastest on texts of any length;
            "packed" puts rows behind the text in one pass; "full" runs a pass over the whole text
            for each row, and adds total effects; "auto" takes "cached" where attention can be
            replaced and there are no hooks, "packed" otherwise, and "full" if a test of this
            model against full passes, made once, finds the faster engine wrong.
        memory_budget: bytes that a pass with rows may take; decides how many rows share a pass,
            and nothing else. What is kept of the text for cached rows comes on top (see
            `docs/long_contexts.md`).
        fwd_hooks: the hooks with which the map was made, in force here as well; rows are packed
            then. A hook that edits certain positions does not edit the rows; "auto" detects this
            and runs full passes.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        InputError: no interventions, an index out of range, an edit that returns the wrong shape,
            or a sink map that does not belong to this model (`sinks.selection.check_map`).
        ModelError: the model cannot be measured; or `method` is one of the fast engines and its
            test fails.
    """
    if method not in get_args(Method):
        raise InputError(f"no method {method!r}; use 'auto', 'cached', 'packed' or 'full'")
    if method == "cached" and fwd_hooks:
        raise InputError(
            "cached rows run without the text, so hooks could edit the wrong tokens; use "
            "method='packed' or method='full' with fwd_hooks"
        )
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    rows = rows_of(interventions)
    check_rows(model, rows, sink_map.n_tokens)
    positions = [row[0].position for row in rows]
    clean = clean_run_for_rows(
        model,
        sink_map,
        method,
        positions=positions,
        sites=sites_of_other_tokens(rows),
        begin_at=first_edits(model, rows, sink_map.n_tokens, memory_budget),
        fwd_hooks=fwd_hooks,
    )
    engine, error = choose_engine(model, clean, method, positions, fwd_hooks)
    totals = None
    if engine == "full":
        states, totals = run_full(model, clean, rows, fwd_hooks=fwd_hooks, progress=progress)
    else:
        states = run_rows(
            engine,
            model,
            clean,
            rows,
            memory_budget=memory_budget,
            fwd_hooks=fwd_hooks,
            progress=progress,
        )
    return CounterfactualRows(
        rows=tuple(rows),
        sink_map=sink_map,
        alignment=states.alignment,
        centered_alignment=states.centered_alignment,
        norm=states.norm,
        centered_norm=states.centered_norm,
        is_sink=states.is_sink(clean.judge, torch.tensor(positions)),
        direct_score=states.direct_score,
        provenance=sink_map.provenance.extended(engine=engine),
        self_test=error,
        totals=totals,
    )


@dataclass(frozen=True)
class CounterfactualRows:
    """The trajectories of edited tokens, one row for each intervention (or group of them)."""

    rows: tuple[Row, ...]
    sink_map: SinkMap
    """The clean text's sinks, whose primary, phases and thresholds judge the rows."""
    alignment: Float[Tensor, " row layer"]
    """Cosine of the edited token's residual with the clean primary's."""
    centered_alignment: Float[Tensor, " row layer"]
    """The same after the clean text's common component was subtracted from both."""
    norm: Float[Tensor, " row layer"]
    """Residual norm."""
    centered_norm: Float[Tensor, " row layer"]
    """Residual norm without the common component."""
    is_sink: Bool[Tensor, " row layer"]
    """Whether the edited token is a sink after each block, by the criterion that judged the clean
    text."""
    direct_score: Float[Tensor, " row layer head"]
    """Sink score that the row's keys would draw from the clean queries, all else clean; NaN for the
    last token."""
    provenance: Provenance
    """With the engine that ran."""
    self_test: float | None
    """Largest relative difference of that engine from full passes in this model, measured before
    its first use. Where "auto" had to run full passes, the difference of the engine that failed;
    None where no other engine was tested."""
    totals: TotalEffects | None = field(default=None, repr=False)
    """Effects on the rest of the text, with everything recomputed (full passes only)."""

    @property
    def engine(self) -> str:
        """Which engine ran: "cached", "packed" or "full"."""
        return str(self.provenance.engine)

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """The edited token of each row."""
        return torch.tensor([row[0].position for row in self.rows])

    @property
    def lifetime(self) -> Int[Tensor, " row"]:
        """Number of layers after which the edited token is a sink."""
        return self.is_sink.sum(dim=1)

    @property
    def clean_lifetime(self) -> Int[Tensor, " row"]:
        """The same of the unedited token."""
        lifetime = torch.zeros(self.sink_map.n_tokens, dtype=torch.long)
        for sink in self.sink_map.sinks:
            lifetime[sink.position] += sink.lifetime
        return lifetime[self.positions]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        test = "" if self.self_test is None else f", self-test {self.self_test:.0e}"
        removed = int(((self.lifetime == 0) & (self.clean_lifetime > 0)).sum())
        made = int(((self.lifetime > 0) & (self.clean_lifetime == 0)).sum())
        return (
            f"CounterfactualRows({counted(len(self), 'row')}, {self.engine} engine{test}: "
            f"{counted(removed, 'sink')} removed, {counted(made, 'sink')} made)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each intervention: what was done, and what became of the token.

        `norm` and `direct_score` are means over the layers of the primary phases (all layers where
        there is none), `direct_score` over heads as well; `clean_...` are the unedited token's.
        """
        import pandas as pd

        inside = [layer for start, end in self.sink_map.phases for layer in range(start, end)]
        inside = inside or list(range(self.norm.shape[1]))
        positions = self.positions.tolist()
        clean_norm = self.sink_map.array("norm")[:, positions].T
        frame = pd.DataFrame(
            {
                "site": [" + ".join(edit.site for edit in row) for row in self.rows],
                "layer": [row[0].layer for row in self.rows],
                "position": positions,
                "token": [self.sink_map.token_strings[position] for position in positions],
                "edit": [" + ".join(_spell(edit) for edit in row) for row in self.rows],
                "lifetime": self.lifetime.tolist(),
                "clean_lifetime": self.clean_lifetime.tolist(),
                "norm": self.norm[:, inside].mean(dim=1).tolist(),
                "clean_norm": clean_norm[:, inside].mean(dim=1).tolist(),
                "alignment": self.alignment[:, inside].mean(dim=1).tolist(),
                "direct_score": self.direct_score[:, inside].mean(dim=(1, 2)).tolist(),
            }
        )
        if self.totals is not None:
            frame["loss"] = self.totals.loss.tolist()
            frame["kl"] = self.totals.kl.tolist()
        return frame


def _spell(intervention: Intervention) -> str:
    part = "" if intervention.head is None else f" head {intervention.head}"
    part += "" if intervention.neuron is None else f" neuron {intervention.neuron}"
    return f"{intervention.edit!r} at {intervention.site} {intervention.layer}{part}"
