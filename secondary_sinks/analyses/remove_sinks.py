"""What does a text lose, or gain, without its secondary sinks?

The primary sink draws less attention while secondary sinks live. That it does so *because* of them
is a claim about causes, and is answered by an experiment: the MLP that wrote each sink is silenced
at that token, all sinks of the text at once, and the whole text is run again.

>>> removal = ss.remove_sinks(model, text)
>>> removal.primary_clean, removal.primary_edited       # over the layers where sinks were looked at
(0.14, 0.44)
>>> removal.to_frame()                                  # layer by layer, beside the controls

Silencing an MLP at a few tokens changes a text in any case, so the same edit is made at as many
ordinary tokens nearby, several times over. `reverse=True` asks the other way round: what the MLP
wrote into each sink is written into an ordinary token, which makes more sinks.

The result of `remove_sinks`: sink scores, losses and divergences of the runs, and what follows from
them. Nothing here touches a model.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.edits import Edit, Resample, Zero
from secondary_sinks.intervene.interventions import Intervention, check_rows
from secondary_sinks.intervene.whole_text import (
    MEMORY_BUDGET,
    OutputChange,
    TextState,
    run_whole_texts,
)
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

SILENCE = Zero()

"""The default edit: nothing in the place of the writer's output."""

N_NEAREST = 16

"""A control token is drawn from this many ordinary tokens, those nearest to the one it stands
for: position decides how much attention a token draws."""


def remove_sinks(
    model: Any,
    text: Text | SinkMap,
    sinks: SinkMap | Sequence[Sink] | None = None,
    *,
    writers: Mapping[int, int | Sequence[int]] | None = None,
    edit: Edit = SILENCE,
    reverse: bool = False,
    n_controls: int = 5,
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> SinkRemoval:
    """Silence the writers of all secondary sinks at once, and say what becomes of the text.

    Exact: the edited text is run in full, so later tokens, the primary's score, and the output are
    what the model makes of it. The claim that it tests is claim 3 of arXiv 2512.22213.

    A change of the loss is not evidence that sinks are good or bad for the model: the edit takes a
    whole MLP output away, not the sink alone (`edit=ProjectOut(direction)` takes less), and one
    text is one sample. A p-value is over control tokens of this text, not over texts.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or a sink map, whose tokens are taken.
        sinks: the text's sink map, or those of its secondary sinks that are meant.
        writers: layer (or layers) of the MLP to edit at a position; by default each sink's onset
            layer, which is its writer because the residual is a sink for the first time after it.
        edit: what takes the place of the MLP's output.
        reverse: add sinks: write the clean MLP output of each sink's writer at that sink into an
            ordinary token nearby. The controls get the output of an ordinary token instead.
        n_controls: runs in which as many ordinary tokens, matched in position, are edited so.
        seed: decides which.
        chat: the string goes through the chat template.
        fwd_hooks: hooks of your own, in force in every run.
        memory_budget: bytes that attention and logits of one pass may take.
        progress: show a progress bar; None shows one for more than one pass.

    Raises:
        InputError: a text without secondary sinks, sinks that are none of this text, a writer out
            of range, too few ordinary tokens, a sink map of another model or text.
        ModelError: a model that cannot be measured.
    """
    if reverse and edit is not SILENCE:
        raise InputError("reverse=True writes the sinks' own MLP outputs; it takes no other edit")
    if n_controls < 0:
        raise InputError(f"n_controls is {n_controls}; 0 or more are meant")
    chosen = None if isinstance(sinks, SinkMap) or sinks is None else list(sinks)
    known = sinks if isinstance(sinks, SinkMap) else None
    found = sink_map_of(model, text, known, chat=chat, fwd_hooks=fwd_hooks)
    meant = _chosen(found, chosen)
    written = _writers(meant, writers)
    clean = CleanRun.of(model, found, fwd_hooks=fwd_hooks)
    draw = random.Random(seed)
    if reverse:
        texts, where = _transplants(clean, written, n_controls, draw)
    else:
        where = [written, *(_matched(clean, written, draw) for _ in range(n_controls))]
        texts = [[Intervention("mlp_out", x, p, edit) for p, x in one] for one in where]
    for one in texts:
        check_rows(model, [(each,) for each in one], found.n_tokens)
    states = run_whole_texts(
        model, clean, texts, fwd_hooks=fwd_hooks, memory_budget=memory_budget, progress=progress
    )
    return _result(clean, meant, written, where, states, repr(edit), seed, reverse)


def _result(
    clean: CleanRun,
    meant: Sequence[Sink],
    written: list[tuple[int, int]],
    where: list[list[tuple[int, int]]],
    states: tuple[TextState, list[TextState]],
    edit: str,
    seed: int,
    reverse: bool,
) -> SinkRemoval:
    before, (edited, *controls) = states
    primary = clean.sink_map.primary_position
    positions = [position for position, _ in where[0]]
    outputs = [_output(state) for state in (edited, *controls)]
    scores = [state.sink_score[:, :, primary] for state in controls]
    losses = [output.token_loss for output in outputs[1:]]
    return SinkRemoval(
        model=clean.sink_map.model,
        token_strings=clean.sink_map.token_strings,
        primary_position=primary,
        sinks=tuple(dataclasses.replace(sink, evidence=None) for sink in meant),
        where=tuple(where[0]),
        control_where=tuple(tuple(one) for one in where[1:]),
        donors=tuple(position for position, _ in written) if reverse else (),
        edit="transplant" if reverse else edit,
        seed=seed,
        clean_score=before.sink_score,
        edited_score=edited.sink_score,
        control_score=_stack(scores, before.sink_score.shape[:2]),
        edited_norm=edited.norm[:, positions],
        is_sink=edited.is_sink(clean, positions),
        clean_loss=_output(before).token_loss,
        edited_loss=outputs[0].token_loss,
        control_loss=_stack(losses, outputs[0].token_loss.shape),
        kl=torch.tensor([output.kl for output in outputs]),
        top1_changed=torch.tensor([output.top1_share for output in outputs]),
    )


def _chosen(found: SinkMap, chosen: list[Sink] | None) -> list[Sink]:
    if chosen is None:
        if not found.secondary:
            raise InputError(
                f"the text has no secondary sinks ({found!r}); see the map's margins() for the "
                "tokens that came nearest"
            )
        return found.secondary
    known = {(sink.position, sink.layers) for sink in found.secondary}
    wrong = [s for s in chosen if not isinstance(s, Sink) or (s.position, s.layers) not in known]
    if wrong or not chosen:
        raise InputError(
            f"{wrong[0]!r} is no secondary sink of this text" if wrong else "no sinks to remove"
        )
    return chosen


def _writers(
    sinks: Sequence[Sink], writers: Mapping[int, int | Sequence[int]] | None
) -> list[tuple[int, int]]:
    """(position, layer) of every MLP output to edit."""
    given = dict(writers or {})
    strange = sorted(set(given) - {sink.position for sink in sinks})
    if strange:
        raise InputError(f"`writers` names positions {strange}, which are no sinks to remove")
    where: set[tuple[int, int]] = set()
    for sink in sinks:
        layers = given.get(sink.position, sink.l_start)
        for layer in (layers,) if isinstance(layers, int) else layers:
            where.add((sink.position, layer))
    return sorted(where)


def _matched(
    clean: CleanRun,
    where: Sequence[tuple[int, int]],
    draw: random.Random,
    taken: Sequence[int] = (),
) -> list[tuple[int, int]]:
    """An ordinary token nearby for each edited one, with the same layers; each is used once."""
    n_tokens = len(clean.tokens)
    # The last tokens are left out, as for sink scores: too few later tokens see what is done there.
    last = n_tokens - int(clean.sink_map.thresholds["min_queries"])
    ordinary = [p for p in clean.ordinary.nonzero().flatten().tolist() if p < last]
    free = set(ordinary) - set(taken)
    stands_for: dict[int, int] = {}
    for position in dict.fromkeys(position for position, _ in where):
        nearest = sorted(free, key=lambda p: (abs(p - position), p))[:N_NEAREST]
        if not nearest:
            raise InputError(
                f"the text has too few ordinary tokens ({len(ordinary)}) to match its sinks: use "
                "a longer text, fewer sinks, or n_controls=0"
            )
        stands_for[position] = draw.choice(nearest)
        free.discard(stands_for[position])
    return [(stands_for[position], layer) for position, layer in where]


def _transplants(
    clean: CleanRun, written: list[tuple[int, int]], n_controls: int, draw: random.Random
) -> tuple[list[list[Intervention]], list[list[tuple[int, int]]]]:
    """Each sink's write into an ordinary token; in the controls, ordinary writes into the same."""
    recipients = _matched(clean, written, draw)
    taken = [position for position, _ in recipients]
    texts = []
    for control in range(1 + n_controls):
        donors = written if control == 0 else _matched(clean, written, draw, taken)
        texts.append(
            [
                Intervention("mlp_out", layer, position, Resample(donor))
                for (position, layer), (donor, _) in zip(recipients, donors, strict=True)
            ]
        )
    return texts, [recipients] * (1 + n_controls)


def _output(state: TextState) -> OutputChange:
    if state.output is None:
        raise InputError("the output was not measured")
    return state.output


def _stack(parts: list[Tensor], shape: Sequence[int]) -> Tensor:
    return torch.stack(parts) if parts else torch.zeros(0, *shape)


@dataclass(frozen=True)
class SinkRemoval(Result):
    """The text with its secondary sinks, without them, and with as many other tokens edited.

    `where` axes run over the edits; `control` axes over the seeded control runs.
    """

    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""
    token_strings: tuple[str, ...]
    primary_position: int
    sinks: tuple[Sink, ...]
    """The secondary sinks that were removed, or that were copied (without their evidence)."""
    where: tuple[tuple[int, int], ...]
    """(position, layer) of each edited MLP output."""
    control_where: tuple[tuple[tuple[int, int], ...], ...]
    """The same of each control run."""
    donors: tuple[int, ...]
    """With `reverse`, the sink whose write each edited token got; empty otherwise."""
    edit: str
    """What was done, in words."""
    seed: int
    clean_score: Float[Tensor, "layer head token"]
    """Sink scores of the clean text; NaN for the last token."""
    edited_score: Float[Tensor, "layer head token"]
    """The same after the edit."""
    control_score: Float[Tensor, "control layer head"]
    """The primary's sink scores in each control run."""
    edited_norm: Float[Tensor, "layer where"]
    """Residual norm of each edited token after the edit."""
    is_sink: Bool[Tensor, "where layer"]
    """Whether each edited token is a sink after the edit, judged as the clean text was."""
    clean_loss: Float[Tensor, "token-1"]
    """Cross-entropy of each next token in the clean text, nats."""
    edited_loss: Float[Tensor, "token-1"]
    """The same after the edit."""
    control_loss: Float[Tensor, "control token-1"]
    """The same in each control run."""
    kl: Float[Tensor, "1+control"]
    """Mean KL(clean || edited) of the next-token distributions, nats: the edit's, then each
    control's."""
    top1_changed: Float[Tensor, "1+control"]
    """Share of positions whose most likely next token is another, in the same order."""

    @property
    def reverse(self) -> bool:
        """Whether sinks were added, not removed."""
        return bool(self.donors)

    @property
    def live_layers(self) -> list[int]:
        """Layers whose attention saw the sinks of the clean text that were removed or copied: those
        after each layer in which one of them lives. The edit's own outcome has no say in it."""
        n_layers = self.clean_score.shape[0]
        alive = {layer for sink in self.sinks for layer in sink.layers}
        return sorted(layer + 1 for layer in alive if layer + 1 < n_layers)

    @property
    def primary_clean(self) -> float:
        """The primary's sink score in the clean text, mean over heads and `live_layers`."""
        return self._live(self.clean_score[:, :, self.primary_position])

    @property
    def primary_edited(self) -> float:
        """The same after the edit."""
        return self._live(self.edited_score[:, :, self.primary_position])

    @property
    def primary_control(self) -> Float[Tensor, "control"]:
        """The same in each control run."""
        return torch.tensor([self._live(one) for one in self.control_score])

    @property
    def p_value(self) -> float:
        """Permutation p-value: the share of runs, the edit's own among them, whose primary changed
        at least as much. With n controls it cannot fall below 1 / (n + 1)."""
        change = abs(self.primary_edited - self.primary_clean)
        others = (self.primary_control - self.primary_clean).abs()
        return (1 + int((others >= change).sum())) / (1 + len(others))

    def __repr__(self) -> str:
        done = "added" if self.reverse else "removed"
        alive = self.is_sink.any(dim=1)
        count = int(alive.sum()) if self.reverse else int((~alive).sum())
        return (
            f"SinkRemoval({count} of {len(self.where)} sinks {done}: primary "
            f"{self.primary_clean:.3f} -> {self.primary_edited:.3f}, loss "
            f"{self.clean_loss.mean():.3f} -> {self.edited_loss.mean():.3f}, "
            f"{len(self.control_where)} controls)"
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

    def heads(self) -> pd.DataFrame:
        """One row for each layer and head: the primary's sink score, clean and edited."""
        import pandas as pd

        primary = self.primary_position
        n_layers, n_heads = self.clean_score.shape[:2]
        layer, head = torch.meshgrid(torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
        clean = self.clean_score[:, :, primary].flatten()
        edited = self.edited_score[:, :, primary].flatten()
        return pd.DataFrame(
            {
                "layer": layer.flatten().numpy(),
                "head": head.flatten().numpy(),
                "clean": clean.numpy(),
                "edited": edited.numpy(),
                "change": (edited - clean).numpy(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row for each run (clean, edited, every control): primary, loss, output."""
        import pandas as pd

        names = ["clean", "edited", *(f"control {n}" for n in range(len(self.control_where)))]
        losses = torch.cat([self.clean_loss[None], self.edited_loss[None], self.control_loss])
        return pd.DataFrame(
            {
                "run": names,
                "primary": [
                    self.primary_clean,
                    self.primary_edited,
                    *self.primary_control.tolist(),
                ],
                "loss": losses.mean(dim=1).tolist(),
                "kl": [0.0, *self.kl.tolist()],
                "top1_changed": [0.0, *self.top1_changed.tolist()],
            }
        )

    def _live(self, score: Float[Tensor, "layer head"]) -> float:
        return float(score[self.live_layers].mean())


def _pairs(listed: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(position), int(layer)) for position, layer in listed)
