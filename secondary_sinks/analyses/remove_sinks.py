"""What does a text lose, or gain, without its secondary sinks?

The primary sink draws less attention while secondary sinks live. Whether it does so *because* of
them is answered by an experiment: the output of the MLP that wrote each sink is taken out at that
token, for all sinks of the text at once, and the whole text is run again.

>>> removal = ss.remove_sinks(model, sink_map)
>>> removal.primary_clean, removal.primary_edited       # over the layers whose attention saw sinks
(0.14, 0.44)
>>> removal.to_frame()                                  # layer by layer, beside the controls

Editing an MLP's output at a few tokens changes a text in any case, so control runs make the same
edit at as many ordinary tokens. `reverse=True` asks the opposite question: it writes what the MLP
wrote into each sink into an ordinary token, which makes more sinks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.memory import MEMORY_BUDGET
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import Edit, Resample, Zero
from secondary_sinks.intervene.interventions import Intervention, check_rows
from secondary_sinks.intervene.whole_text import run_whole_texts
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.controls import matched_controls
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkChoice, SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers

if TYPE_CHECKING:
    import pandas as pd


def remove_sinks(
    model: Model,
    sink_map: SinkMap,
    *,
    sinks: SinkChoice = "secondary",
    writers: int | Mapping[int, int | Sequence[int]] | None = None,
    edit: Edit | None = None,
    reverse: bool = False,
    n_controls: int = 5,
    seed: int = 0,
    fwd_hooks: Sequence[UserHook] = (),
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> SinkRemoval:
    """What becomes of the primary, the loss and the output when all sinks are removed at once?

    The edited text is run in full, so later tokens, the primary's score and the output are exact.
    This tests claim 3 of arXiv 2512.22213.

    Not evidence for: that sinks are good or bad for the model, if the loss changes. The edit takes
    a whole MLP output away, not the sink alone (`edit=ProjectOut(direction)` takes less), and one
    text is one sample. A p-value is over control tokens of this text, not over texts.

    >>> removal = ss.remove_sinks(model, sink_map, n_controls=3)
    >>> removal.tokens_frame()               # what became of each edited token
    >>> removal.plot()

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sinks: which tokens to edit, sinks or not; see `SinkMap.select`.
        writers: the layer whose MLP is edited: one for all, or a mapping from position to a layer
            or to several; by default the largest write of each sink (`resolve_writers`).
        edit: what replaces the MLP's output; by default zeros.
        reverse: add sinks: write the clean MLP output of each sink's writer into an ordinary token
            matched to the sink. The controls get the output of an ordinary token instead.
        n_controls: control runs, each of which edits as many ordinary tokens, matched to the sinks
            (`sinks.controls.matched_controls`).
        seed: of the draws of control tokens.
        fwd_hooks: the hooks with which the map was made, in force here as well.
        memory_budget: bytes that attention and logits of one pass may take.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        InputError: nothing is selected, a writer out of range, too few ordinary tokens, a sink map
            of another model.
        ModelError: a model that cannot be measured.
    """
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    chosen = sink_map.select(sinks)
    if reverse and edit is not None:
        raise InputError("reverse=True writes the sinks' MLP outputs; it takes no other edit")
    if n_controls < 0:
        raise InputError(f"n_controls must be 0 or more, got {n_controls}")
    written, rule = _outputs(model, sink_map, chosen, writers, fwd_hooks)
    runs = range(1, 1 + n_controls)
    if reverse:
        recipients = _matched(sink_map, chosen, written, seed=[seed, 0])
        taken = [position for position, _ in recipients]
        donors = [written, *(_matched(sink_map, chosen, written, [seed, r], taken) for r in runs)]
        where = [recipients] * len(donors)
        edits: list[list[Edit]] = [[Resample(position) for position, _ in run] for run in donors]
    else:
        edit = Zero() if edit is None else edit
        where = [written, *(_matched(sink_map, chosen, written, [seed, run]) for run in runs)]
        edits = [[edit] * len(written)] * len(where)
    texts = [
        [
            Intervention("mlp_out", layer, position, new)
            for (position, layer), new in zip(run, run_edits, strict=True)
        ]
        for run, run_edits in zip(where, edits, strict=True)
    ]
    check_rows(model, [(one,) for text in texts for one in text], sink_map.n_tokens)
    clean = CleanRun(sink_map)
    before, (edited, *controls) = run_whole_texts(
        model, clean, texts, fwd_hooks=fwd_hooks, memory_budget=memory_budget, progress=progress
    )
    primary = sink_map.primary_position
    positions = [position for position, _ in where[0]]
    is_sink = edited.is_sink(clean, positions)
    for index, position in enumerate(positions):
        for sink in sink_map.sinks:
            if sink.position == position and sink not in chosen:
                is_sink[index, list(sink.layers)] = False
    outputs = [state.output for state in (edited, *controls)]
    loss = torch.stack([output.token_loss for output in outputs])
    score = torch.stack([state.sink_score[:, :, primary] for state in (edited, *controls)])
    return SinkRemoval(
        token_strings=sink_map.token_strings,
        primary_position=primary,
        sinks=tuple(dataclasses.replace(sink, evidence=None) for sink in chosen),
        where=tuple(where[0]),
        control_where=tuple(tuple(run) for run in where[1:]),
        donors=tuple(position for position, _ in written) if reverse else (),
        edit="transplant" if reverse else repr(edit),
        writer_rule=rule,
        clean_score=before.sink_score,
        edited_score=edited.sink_score,
        control_score=score[1:],
        edited_norm=edited.norm[:, positions],
        is_sink=is_sink,
        clean_loss=before.output.token_loss,
        edited_loss=loss[0],
        control_loss=loss[1:],
        kl=torch.tensor([output.kl for output in outputs]),
        top1_changed=torch.tensor([output.top1_share for output in outputs]),
        provenance=sink_map.provenance.extended(seed=seed),
    )


@dataclass(frozen=True)
class SinkRemoval(Result):
    """A text with its sinks, without them, and with as many other tokens edited.

    `where` axes run over the edited MLP outputs, `control` axes over the control runs.
    """

    token_strings: tuple[str, ...]
    primary_position: int
    sinks: tuple[Sink, ...]
    """The sinks that were to be removed, or that were copied (without their evidence)."""
    where: tuple[tuple[int, int], ...]
    """(position, layer) of each edited MLP output."""
    control_where: tuple[tuple[tuple[int, int], ...], ...]
    """The same of each control run."""
    donors: tuple[int, ...]
    """With `reverse`, the sink whose write each edited token got; empty otherwise."""
    edit: str
    """What was done, in words."""
    writer_rule: WriterRule
    """How the layers of `where` were chosen."""
    clean_score: Float[Tensor, " layer head token"]
    """Sink scores of the clean text; NaN for the last token."""
    edited_score: Float[Tensor, " layer head token"]
    """The same after the edit."""
    control_score: Float[Tensor, " control layer head"]
    """The primary's sink scores in each control run."""
    edited_norm: Float[Tensor, " layer where"]
    """Residual norm of each edited token after the edit."""
    is_sink: Bool[Tensor, " where layer"]
    """Whether each edited token is a sink after the edit, judged as the clean text was; lives of
    the token that were not to be removed do not count."""
    clean_loss: Float[Tensor, " token-1"]
    """Cross-entropy of each next token in the clean text, nats."""
    edited_loss: Float[Tensor, " token-1"]
    """The same after the edit."""
    control_loss: Float[Tensor, " control token-1"]
    """The same in each control run."""
    kl: Float[Tensor, " 1+control"]
    """Mean KL(clean || edited) of the next-token distributions, nats: the edit's, then each
    control's."""
    top1_changed: Float[Tensor, " 1+control"]
    """Share of positions whose most likely next token changes, in the same order."""
    provenance: Provenance

    @property
    def reverse(self) -> bool:
        """Whether sinks were added, not removed."""
        return bool(self.donors)

    @property
    def live_layers(self) -> list[int]:
        """Layers whose attention saw `sinks` in the clean text: those after each layer in which one
        of them lives. They do not depend on the outcome of the edit."""
        return self._shown(self.sinks)

    @property
    def primary_clean(self) -> float:
        """The primary's sink score in the clean text, mean over heads and `live_layers`."""
        return self._live(self.clean_score[:, :, self.primary_position])

    @property
    def primary_edited(self) -> float:
        """The same after the edit."""
        return self._live(self.edited_score[:, :, self.primary_position])

    @property
    def primary_control(self) -> Float[Tensor, " control"]:
        """The same in each control run."""
        return torch.tensor([self._live(score) for score in self.control_score])

    @property
    def p_value(self) -> float:
        """Permutation p-value: the share of runs, the edit itself among them, whose primary changed
        at least as much. With n controls it cannot fall below 1 / (n + 1)."""
        change = abs(self.primary_edited - self.primary_clean)
        others = (self.primary_control - self.primary_clean).abs()
        return (1 + int((others >= change).sum())) / (1 + len(others))

    def __repr__(self) -> str:
        parts = []
        for outcome, tokens in self.tokens_frame().groupby("outcome", sort=False):
            n, text = len(tokens), str(outcome)
            noun = "sink" if text in _OF_SINKS else "token"
            parts.append(
                f"{counted(n, noun)} {text if n == 1 else text.replace('a sink', 'sinks')}: score "
                f"{tokens.clean_score.mean():.3f} to {tokens.edited_score.mean():.3f}"
            )
        return (
            f"SinkRemoval({'; '.join(parts)}; primary {self.primary_clean:.3f} to "
            f"{self.primary_edited:.3f}, loss {self.clean_loss.mean():.3f} to "
            f"{self.edited_loss.mean():.3f}, {counted(len(self.control_where), 'control')})"
        )

    def _notebook_frame(self) -> pd.DataFrame:
        return self.summary()

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer: the primary's sink score, mean over heads, in every condition.

        `control`, `control_low`, `control_high` are mean and extremes over control runs (NaN
        without); `live` says whether the layer is one of `live_layers`.
        """
        import pandas as pd

        primary = self.primary_position
        control = self.control_score.mean(dim=2)
        if not len(control):
            control = torch.full((1, self.clean_score.shape[0]), torch.nan)
        frame = pd.DataFrame(
            {
                "layer": range(self.clean_score.shape[0]),
                "clean": self.clean_score[:, :, primary].mean(dim=1).numpy(),
                "edited": self.edited_score[:, :, primary].mean(dim=1).numpy(),
                "control": control.mean(dim=0).numpy(),
                "control_low": control.amin(dim=0).numpy(),
                "control_high": control.amax(dim=0).numpy(),
            }
        )
        frame["change"] = frame["edited"] - frame["clean"]
        frame["live"] = frame["layer"].isin(self.live_layers)
        return frame

    def tokens_frame(self) -> pd.DataFrame:
        """One row for each edited token: what became of it.

        Scores are means over heads and the layers that show the sink's life, the norm is a mean
        over that life; with `reverse` it is the life of the sink whose write was copied. `lifetime`
        counts layers after the edit.
        """
        import pandas as pd

        rows = []
        positions = [position for position, _ in self.where]
        for index, position in enumerate(positions):
            if position in positions[:index]:
                continue  # another layer of the same token
            source = self.donors[index] if self.reverse else position
            lives = [sink for sink in self.sinks if sink.position == source]
            life, shown = [x for sink in lives for x in sink.layers], self._shown(lives)
            clean, edited = (
                float(score[shown, :, position].nanmean())
                for score in (self.clean_score, self.edited_score)
            )
            lifetime = int(self.is_sink[index].sum())
            was_sink = not self.reverse and any(sink.kind != "chosen" for sink in lives)
            rows.append(
                {
                    "position": position,
                    "token": self.token_strings[position],
                    "writers": tuple(layer for p, layer in self.where if p == position),
                    "clean_lifetime": sum(sink.lifetime for sink in lives) if was_sink else 0,
                    "lifetime": lifetime,
                    "clean_score": clean,
                    "edited_score": edited,
                    "edited_norm": float(self.edited_norm[life, index].mean()),
                    "outcome": _outcome(was_sink, lifetime > 0, edited < clean, self.reverse),
                }
            )
        return pd.DataFrame(rows)

    def heads(self) -> pd.DataFrame:
        """One row for each layer and head: the primary's sink score, clean and edited."""
        import pandas as pd

        layers, heads = map(range, self.clean_score.shape[:2])
        index = pd.MultiIndex.from_product([layers, heads], names=["layer", "head"])
        clean, edited = (
            score[:, :, self.primary_position].flatten()
            for score in (self.clean_score, self.edited_score)
        )
        columns = {"clean": clean, "edited": edited, "change": edited - clean}
        values = {name: value.numpy() for name, value in columns.items()}
        return pd.DataFrame(values, index=index).reset_index()

    def summary(self) -> pd.DataFrame:
        """One row for each run (clean, edited, every control): primary, loss, output."""
        import pandas as pd

        names = ["clean", "edited", *(f"control {n}" for n in range(len(self.control_where)))]
        losses = torch.cat([self.clean_loss[None], self.edited_loss[None], self.control_loss])
        primary = [self.primary_clean, self.primary_edited, *self.primary_control.tolist()]
        return pd.DataFrame(
            {
                "run": names,
                "primary": primary,
                "loss": losses.mean(dim=1).tolist(),
                "kl": [0.0, *self.kl.tolist()],
                "top1_changed": [0.0, *self.top1_changed.tolist()],
            }
        )

    def _shown(self, sinks: Sequence[Sink]) -> list[int]:
        """Layers whose attention shows the lives of some sinks."""
        n_layers = self.clean_score.shape[0]
        alive = {layer for sink in sinks for layer in sink.layers}
        return sorted(layer + 1 for layer in alive if layer + 1 < n_layers)

    def _live(self, score: Float[Tensor, " layer head"]) -> float:
        return float(score[self.live_layers].nanmean())


_OF_SINKS = ("removed", "weakened, still aligned", "still a sink")


def _outcome(was_sink: bool, is_sink: bool, weaker: bool, reverse: bool) -> str:
    """What became of an edited token, in words."""
    if was_sink:
        still = "weakened, still aligned" if weaker else "still a sink"
        return still if is_sink else "removed"
    if is_sink:
        return "became a sink"
    return "did not become a sink" if reverse else "edited, never a sink"


def _outputs(
    model: Model,
    sink_map: SinkMap,
    sinks: Sequence[Sink],
    writers: int | Mapping[int, int | Sequence[int]] | None,
    fwd_hooks: Sequence[UserHook],
) -> tuple[list[tuple[int, int]], WriterRule]:
    """(position, layer) of every MLP output to edit, and how they were chosen."""
    turns: list[Any] = [writers]
    if isinstance(writers, Mapping):
        # `resolve_writers` takes one layer for each position: the first of each, then the second.
        given = {p: x if isinstance(x, Sequence) else (x,) for p, x in writers.items()}
        several = {position: layers for position, layers in given.items() if layers}
        turns = [
            {position: layers[min(turn, len(layers) - 1)] for position, layers in several.items()}
            for turn in range(max([1, *map(len, several.values())]))
        ]
    resolved = [
        resolve_writers(model, sink_map, sinks, turn, fwd_hooks=fwd_hooks) for turn in turns
    ]
    where = {
        (sink.position, layer)
        for turn in resolved
        for sink, layer in zip(sinks, turn.layers, strict=True)
    }
    return sorted(where), resolved[0].rule


def _matched(
    sink_map: SinkMap,
    sinks: Sequence[Sink],
    where: Sequence[tuple[int, int]],
    seed: Sequence[int],
    taken: Collection[int] = (),
) -> list[tuple[int, int]]:
    """A control token for each edited one, with the same layers; no token is used twice."""
    sink_at = {sink.position: sink for sink in reversed(sinks)}
    exclude = {*sink_at, *taken}
    stands_for: dict[int, int] = {}
    for position in dict.fromkeys(position for position, _ in where):
        drawn = matched_controls(sink_map, sink_at[position], 1, seed=seed, exclude=exclude)
        if not drawn:
            raise InputError(
                f"the text has too few ordinary tokens to match {counted(len(sink_at), 'sink')}: "
                "use a longer text, fewer sinks, or n_controls=0"
            )
        stands_for[position] = drawn[0]
        exclude.add(drawn[0])
    return [(stands_for[position], layer) for position, layer in where]
