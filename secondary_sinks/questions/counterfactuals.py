"""What would a token have been, had one of its activations been another?"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.errors import InputError, ModelError
from secondary_sinks.explain.sinks import SinkMap
from secondary_sinks.intervene.batched import run_batched
from secondary_sinks.intervene.clean import CleanRun
from secondary_sinks.intervene.edits import Scale, Zero
from secondary_sinks.intervene.full import TotalEffects, run_full
from secondary_sinks.intervene.interventions import Intervention, Row, check_rows, rows_of
from secondary_sinks.intervene.packed import run_packed
from secondary_sinks.intervene.rows import RowStates
from secondary_sinks.models.host import UserHook, describe
from secondary_sinks.models.text import Text
from secondary_sinks.questions.given import sink_map_of

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["auto", "packed", "batched", "full"]
Engine = Literal["packed", "batched", "full"]
_FAST: tuple[Engine, ...] = ("packed", "batched")  # in the order in which they are tried

MEMORY_BUDGET = 1 << 30
"""Bytes that the attention of one packed pass may take, by default."""


@dataclass(frozen=True)
class CounterfactualRows:
    """The trajectories of edited tokens, one row for each intervention (or group of them)."""

    rows: tuple[Row, ...]
    sinks: SinkMap
    """The clean text's sinks, whose primary, phases and thresholds judge the rows."""
    alignment: Float[Tensor, "row layer"]
    """Cosine of the edited token's residual with the clean primary's."""
    centered_alignment: Float[Tensor, "row layer"]
    """The same after the clean text's common component was taken off both."""
    norm: Float[Tensor, "row layer"]
    """Residual norm."""
    centered_norm: Float[Tensor, "row layer"]
    """Residual norm without the common component."""
    is_sink: Bool[Tensor, "row layer"]
    """Whether the edited token is a sink after each block, by the criterion that judged the clean
    text."""
    direct_score: Float[Tensor, "row layer head"]
    """Sink score that the row's keys would draw from the clean queries, all else clean; NaN for the
    last token."""
    engine: str
    """Which engine ran: "packed", "batched" or "full"."""
    self_test: float | None
    """Largest relative difference of that engine from a full pass in this model, measured before
    its first use. Where "auto" had to run full passes, the smallest difference of the engines that
    failed; None where no other was tried."""
    totals: TotalEffects | None = field(default=None, repr=False)
    """Effects on the rest of the text, with everything recomputed (`method="full"`)."""

    @property
    def positions(self) -> Int[Tensor, "row"]:
        """The edited token of each row."""
        return torch.tensor([row[0].position for row in self.rows])

    @property
    def lifetime(self) -> Int[Tensor, "row"]:
        """Number of layers after which the edited token is a sink."""
        return self.is_sink.sum(dim=1)

    @property
    def clean_lifetime(self) -> Int[Tensor, "row"]:
        """The same of the unedited token."""
        alive = dict.fromkeys(self.positions.tolist(), 0)
        for sink in self.sinks.sinks:
            if sink.position in alive:
                alive[sink.position] += sink.lifetime
        return torch.tensor([alive[position] for position in self.positions.tolist()])

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        test = "" if self.self_test is None else f", self-test {self.self_test:.0e}"
        gone = int(((self.lifetime == 0) & (self.clean_lifetime > 0)).sum())
        made = int(((self.lifetime > 0) & (self.clean_lifetime == 0)).sum())
        return (
            f"CounterfactualRows({len(self)} rows, {self.engine} engine{test}: "
            f"{gone} sinks removed, {made} made)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each intervention: what was done, and what became of the token.

        `norm` and `direct_score` are means over the layers of the primary phases (all layers where
        there is none), `direct_score` over heads as well; `clean_...` are the unedited token's.
        """
        import pandas as pd

        inside = self._inside_phases()
        positions = self.positions
        clean_norm = _required(self.sinks.norm)[:, positions].T
        frame = pd.DataFrame(
            {
                "site": [" + ".join(one.site for one in row) for row in self.rows],
                "layer": [row[0].layer for row in self.rows],
                "position": positions.tolist(),
                "token": [self.sinks.token_strings[p] for p in positions.tolist()],
                "edit": [" + ".join(_spell(one) for one in row) for row in self.rows],
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

    def _inside_phases(self) -> list[int]:
        inside = [layer for start, end in self.sinks.phases for layer in range(start, end)]
        return inside or list(range(self.norm.shape[1]))


def counterfactuals(
    model: Any,
    text: Text | SinkMap,
    interventions: Sequence[Intervention | Sequence[Intervention]],
    *,
    method: Method = "auto",
    sinks: SinkMap | None = None,
    chat: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    fwd_hooks: Sequence[UserHook] = (),
    progress: bool | None = None,
) -> CounterfactualRows:
    """Recompute single tokens of a text under interventions, hundreds in one forward pass.

    For every intervention: the token's alignment, norm and whether it is a sink after each block,
    and the direct sink score of every head. All of it is exact, and none of it is a statement on
    later tokens: for those (the primary's new score, the loss, the output) run `method="full"`.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or a sink map, whose tokens are taken.
        interventions: one row each; a sequence in their place is several edits of one token that
            happen together.
        method: "packed" puts rows behind the text in one pass; "batched" runs them over the kept
            keys and values of the text, for architectures that cannot be masked from outside
            (bridges only; see `intervene.batched` for what it cannot give); "full" runs a pass over
            the whole text for each row, and adds total effects; "auto" takes the first of the three
            that a test of this model against the full pass, made once, finds right.
        sinks: the text's sink map, if it is there already.
        chat: the string goes through the chat template.
        memory_budget: bytes that the attention of a packed pass may take; decides how many rows
            share a pass, and nothing else.
        fwd_hooks: hooks of your own, in force in the clean run as well.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        InputError: no interventions, an index out of range, an edit of the wrong shape, several
            texts, or a sink map of another model, text or criterion.
        ModelError: the model cannot be measured; or `method` is "packed" or "batched" and the test
            fails.
    """
    if method not in ("auto", *_FAST, "full"):
        raise InputError(f"no method {method!r}; use 'auto', 'packed', 'batched' or 'full'")
    if method == "batched" and fwd_hooks:
        raise InputError("batched rows run one token at a time, where fwd_hooks cannot be trusted")
    sinks = sink_map_of(model, text, sinks, chat=chat, fwd_hooks=fwd_hooks)
    rows = rows_of(interventions)
    check_rows(model, rows, sinks.n_tokens)
    clean = CleanRun.of(model, sinks, fwd_hooks=fwd_hooks)
    engine, error = _choose(model, clean, method, fwd_hooks)
    totals = None
    if engine == "full":
        show = len(rows) > 1 if progress is None else progress
        bar = tqdm(rows, desc="full passes", disable=not show)
        states, totals = run_full(model, clean, bar, fwd_hooks=fwd_hooks)
    else:
        states = _in_chunks(engine, model, clean, rows, memory_budget, fwd_hooks, progress)
    positions = [row[0].position for row in rows]
    return CounterfactualRows(
        rows=tuple(rows),
        sinks=sinks,
        alignment=states.alignment,
        centered_alignment=states.centered_alignment,
        norm=states.norm,
        centered_norm=states.centered_norm,
        is_sink=clean.judge(
            states.centered_alignment, states.centered_norm, states.direct_score, positions
        ),
        direct_score=states.direct_score,
        engine=engine,
        self_test=error,
        totals=totals,
    )


def rows_per_pass(n_tokens: int, n_heads: int, memory_budget: int) -> int:
    """How many rows share a packed pass: what fits into the budget, but at most as many as make the
    attention of the rows cost about as much as that of the text twice over."""
    # The eager attention holds about five float32 copies of its scores at once.
    length = int((memory_budget / (20 * n_heads)) ** 0.5)
    return max(1, min(length - n_tokens, 2 * max(n_tokens, 128)))


def _rows_kept(model: Any, n_tokens: int, memory_budget: int) -> int:
    """How many rows' copies of all keys and values fit into the budget, one beside the other."""
    cfg = model.cfg
    heads = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
    return max(1, memory_budget // (8 * int(cfg.n_layers) * heads * int(cfg.d_head) * n_tokens))


def _in_chunks(
    engine: Engine,
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    memory_budget: int,
    fwd_hooks: Sequence[UserHook],
    progress: bool | None,
) -> RowStates:
    n_tokens = len(clean.tokens)
    if engine == "packed":
        size = rows_per_pass(n_tokens, clean.score.shape[1], memory_budget)
    else:
        size = _rows_kept(model, n_tokens, memory_budget)
    show = len(rows) > size if progress is None else progress
    done: list[RowStates] = []
    first = 0
    with tqdm(total=len(rows), desc="counterfactual rows", disable=not show) as bar:
        while first < len(rows):
            chunk = rows[first : first + size]
            try:
                if engine == "packed":
                    done.append(run_packed(model, clean, chunk, fwd_hooks=fwd_hooks))
                else:
                    done.append(run_batched(model, clean, chunk, memory_budget=memory_budget))
            except (MemoryError, torch.OutOfMemoryError) as error:
                if size == 1:
                    raise ModelError(
                        f"not even one row fits into memory behind {n_tokens} tokens; shorten it"
                    ) from error
                size = max(1, len(chunk) // 2)
                continue
            first += len(chunk)
            bar.update(len(chunk))
    return _concatenate(done)


def _concatenate(parts: Sequence[RowStates]) -> RowStates:
    names = [entry.name for entry in dataclasses.fields(RowStates)]
    return RowStates(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def _choose(
    model: Any, clean: CleanRun, method: Method, fwd_hooks: Sequence[UserHook]
) -> tuple[Engine, float | None]:
    """The engine to run, and what its self-test measured."""
    if method == "full":
        return "full", None
    errors: list[float] = []
    for engine in _FAST:
        if method not in ("auto", engine) or (engine == "batched" and fwd_hooks):
            continue
        error = _self_test(model, clean, engine)
        if error is not None and error <= _tolerance(model):
            return engine, error
        errors += [] if error is None else [error]
    if method == "auto":
        return "full", min(errors, default=None)
    raise ModelError(
        f"{method} rows are wrong in {describe(model).name!r} (relative error "
        f"{min(errors, default=None)}): its attention cannot be run that way; use method='full'"
    )


_tested: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], float]] = weakref.WeakKeyDictionary()

_LONGEST_TEST = 600
"""Tokens of the self-test of models that do not show which keys a query sees."""


def _self_test(model: Any, clean: CleanRun, engine: Engine) -> float | None:
    """Largest relative difference of an engine's rows from a full pass; None if it cannot run.

    Measured once a model, and once more when a text first exceeds a sliding window, because that
    is where a host masks differently and says nothing.
    """
    generation = describe(model).generation
    if generation == "other" or (engine == "batched" and generation != "bridge"):
        return None
    n_tokens = len(clean.tokens)
    longest = 0  # of the sliding windows that this text exceeds
    if clean.shows_scores:
        widths = [int(kind.sum(dim=1).max()) for kind in clean.visible]
        longest = max((width for width in widths if width < n_tokens), default=0)
        n_tested = min(n_tokens, longest + 48)
    else:
        n_tested = longest = min(n_tokens, _LONGEST_TEST)
    known = _tested.setdefault(model, {})
    if (engine, longest) not in known:
        known[engine, longest] = _measure_difference(model, clean, engine, n_tested)
    return known[engine, longest]


def _measure_difference(model: Any, clean: CleanRun, engine: Engine, n_tokens: int) -> float:
    sinks = dataclasses.replace(
        clean.sinks,
        tokens=clean.tokens[:n_tokens],
        token_strings=clean.sinks.token_strings[:n_tokens],
        n_tokens=n_tokens,
        sinks=(),
    )
    short = CleanRun.of(model, sinks)
    layer = describe(model).n_layers // 3
    rows = rows_of(
        [
            Intervention("mlp_out", layer, (n_tokens - 1) // 2, Zero()),
            Intervention("attn_out", 0, max(0, n_tokens - 2), Scale(2.0)),
        ]
    )
    try:
        fast = (run_packed if engine == "packed" else run_batched)(model, short, rows)
    except (ModelError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return float("inf")  # the host does not take the mask, the positions, or the cache
    full, _ = run_full(model, short, rows, totals=False)
    largest = full.direct_score.nan_to_num(0).max().clamp_min(1e-30)
    pairs = [
        ((fast.norm - full.norm) / full.norm, full.norm),
        (fast.centered_alignment - full.centered_alignment, full.centered_alignment),
        ((fast.direct_score - full.direct_score) / largest, full.direct_score),
    ]
    # NaN is right where the oracle has it too: the last token of a text is never looked at.
    return max(
        float(difference[~torch.isnan(oracle)].abs().nan_to_num(nan=float("inf")).max())
        for difference, oracle in pairs
        if not torch.isnan(oracle).all()
    )


def _tolerance(model: Any) -> float:
    """Largest difference from a full pass that rounding may explain: 1e-4 in float32, 6e-2 in
    bfloat16, 8e-3 in float16.

    Measured in bfloat16 on tiny models of nine families: up to 4e-3 in self-tests and 9e-3 over
    many edits, all of it in direct scores; a mask that is ignored gives differences near one.
    """
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    return max(1e-4, 8 * eps)


def _required(value: Tensor | None) -> Tensor:
    if value is None:
        raise InputError("the sink map holds no measurements (it was read from a published record)")
    return value


def _spell(one: Intervention) -> str:
    part = f" head {one.head}" if one.head is not None else ""
    part += f" neuron {one.neuron}" if one.neuron is not None else ""
    return f"{one.edit!r} at {one.site} {one.layer}{part}"
