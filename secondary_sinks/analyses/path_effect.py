"""By which path does a writer's output work: later keys, later values, or later MLPs?

What an MLP writes stays in the residual stream, and every later layer reads it, through its keys,
its values, its queries and its MLP. To weigh one of these paths, the write is taken out of what
that one receiver reads, and of nothing else:

    clean          key of layer l  <-  residual before layer l
    without path   key of layer l  <-  residual before layer l  -  write

The receiver's reading at the edited token is then exactly what the path leaves of it, because keys
and values of layer l depend on nothing but the residual before it, and the MLP on nothing but that
and the attention's output, which is put back to the clean one.

>>> path = ss.path_effect(model, sinks, sinks.secondary[0], receiver="k")
>>> path.effect.mean(dim=1), path.share            # by layer: lost by this path alone, of the whole
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.host.text_input import Text
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.counterfactuals import counterfactuals
from secondary_sinks.intervene.edits import Add, Edit, Resample, Scale, Zero
from secondary_sinks.intervene.interventions import Intervention, Row, apply_edit, check_rows
from secondary_sinks.intervene.rows import Place, edit_hooks
from secondary_sinks.intervene.whole_text import MEMORY_BUDGET, texts_per_pass
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import sink_map_of
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

SILENCE = Zero()

"""The default edit: nothing in the place of the writer's output."""

Receiver = Literal["k", "v", "mlp"]

MEASURES: dict[str, str] = {
    "k": "direct sink score",
    "v": "norm of the value",
    "mlp": "MLP output along the sink direction",
}

"""What is measured of each receiver."""


def path_effect(
    model: Any,
    text: Text | SinkMap,
    sink: Sink | int,
    *,
    receiver: Receiver = "k",
    receiver_layer: int | Iterable[int] | None = None,
    writer: int | None = None,
    edit: Edit = SILENCE,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> PathEffect:
    """Effect of a writer's output on one later receiver alone, at the token where it was written.

    For "k" it is the direct sink score (attention of the clean queries to that key), for "v" the
    norm of each value head, for "mlp" the MLP's output along the sink direction of its layer (the
    primary's residual after it). Effects of single paths need not add up to the total: norms and
    softmax are not linear, and what a receiver writes is read by further ones.

    A large path effect says that the receiver reads the write; not that the model's output needs
    the receiver.

    Args:
        model: any TransformerLens model.
        text: one text (see `detect_sinks`), or a sink map, whose tokens are taken.
        sink: one of the map's sinks, or a position.
        receiver: "k", "v" or "mlp".
        receiver_layer: layers to look at, each by itself; by default those that read the sink
            while it lives, or all after the writer for a token that is no sink. Where a later MLP
            has erased the write, taking it out leaves its negative, and the effect says nothing of
            the sink.
        writer: layer of the MLP whose output is followed; by default the sink's onset.
        edit: what takes the place of the output; the write is the difference.
        chat: the string goes through the chat template.
        fwd_hooks: hooks of your own, in force in every run.

    Raises:
        InputError: an unknown receiver, a layer that is not after the writer, a position that is no
            sink without `writer`, a sink map of another model.
        ModelError: a model that cannot be measured.
    """
    if receiver not in get_args(Receiver):
        raise InputError(f"no receiver {receiver!r}; use 'k', 'v' or 'mlp'")
    found = sink_map_of(model, text, None, chat=chat, fwd_hooks=fwd_hooks)
    position, writer = _written(found, sink, writer)
    removed = Intervention("mlp_out", writer, position, edit)
    check_rows(model, [(removed,)], found.n_tokens)
    alive = [layer for one in found.sinks if one.position == position for layer in one.layers]
    layers = _layers(receiver_layer, writer, alive, describe(model).n_layers)
    clean = CleanRun.of(model, found, fwd_hooks=fwd_hooks)
    write = _write(model, clean, removed, fwd_hooks)
    minus = Add(-write)
    rows: list[Row] = [
        (Intervention("mlp_out", writer, position, Scale(1.0)),),
        (Intervention("mlp_out", writer, position, minus),),
    ]
    rows += [_cut(receiver, layer, position, minus) for layer in layers]
    if receiver == "k":
        scores = counterfactuals(model, found, rows, fwd_hooks=fwd_hooks, progress=False)
        read = list(scores.direct_score.unbind())
    else:
        read = _readings(model, clean, rows, receiver, fwd_hooks)
    at = list(layers)
    return PathEffect(
        model=found.model,
        token=found.token_strings[position],
        position=position,
        writer=writer,
        edit=repr(edit),
        write_norm=float(write.float().norm()),
        receiver=receiver,
        layers=layers,
        clean=read[0][at],
        without_write=read[1][at],
        without_path=torch.stack([read[2 + n][layer] for n, layer in enumerate(layers)]),
    )


def _cut(receiver: Receiver, layer: int, position: int, minus: Add) -> Row:
    """The edits after which a receiver reads the residual without the write."""
    before = Intervention("resid_pre", layer, position, minus)
    if receiver != "mlp":
        return (before,)
    # The attention between the residual and the MLP has read the edited residual too: its clean
    # output is put back, so that only what the MLP reads has changed.
    return before, Intervention("attn_out", layer, position, Resample(position))


def _readings(
    model: Any,
    clean: CleanRun,
    rows: Sequence[Row],
    receiver: Receiver,
    fwd_hooks: Sequence[UserHook],
) -> list[Float[Tensor, "layer part"]]:
    """What each row's value or MLP says in every layer, as many rows in a pass as memory allows."""
    position = rows[0][0].position
    # Nothing after a token can change what it reads itself, so the text ends with it.
    n_tokens = position + 1
    size = texts_per_pass(model, n_tokens, MEMORY_BUDGET, logits=False)
    found: list[Tensor] = []
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        places: list[Place] = [(1 + row, position) for row in range(len(chunk))]
        meter = _ReceiverMeter(clean, receiver, position)
        tokens = clean.tokens[:n_tokens].expand(1 + len(chunk), -1)
        forward(
            model,
            tokens,
            [*edit_hooks(chunk, places, clean), *meter.editors()],
            fwd_hooks=fwd_hooks,
            attention_mask=torch.ones_like(tokens),
        )
        found.extend(torch.stack(meter.found, dim=1).unbind())
    return found


class _ReceiverMeter:
    """Reads one token's values, or MLP outputs, in every layer of every edited copy."""

    def __init__(self, clean: CleanRun, receiver: Receiver, position: int):
        self._clean, self._receiver, self._position = clean, receiver, position
        self.found: list[Float[Tensor, "row part"]] = []

    def editors(self) -> list[tuple[Site, Editor]]:
        """The functions that read."""
        site = "v" if self._receiver == "v" else "mlp_out"
        layers = range(self._clean.primary.shape[0])
        return [(Site(site, layer), self._reader(layer)) for layer in layers]

    def _reader(self, layer: int) -> Editor:
        direction = torch.nn.functional.normalize(self._clean.primary[layer], dim=-1)

        def read(activation: Tensor) -> None:
            own = activation[1:, self._position].float().cpu()
            along = self._receiver == "mlp"
            self.found.append((own @ direction)[:, None] if along else own.norm(dim=-1))

        return read


def _write(
    model: Any, clean: CleanRun, removed: Intervention, fwd_hooks: Sequence[UserHook]
) -> Float[Tensor, "d_model"]:
    """What the edit takes out of the residual stream."""
    found: list[Tensor] = []

    def read(activation: Tensor) -> None:
        value = activation[0, removed.position]
        found.append(value - apply_edit(removed, value, activation[0], clean.ordinary))

    tokens = clean.tokens[None]
    site = Site(removed.site, removed.layer)
    mask = torch.ones_like(tokens)
    forward(model, tokens, [(site, read)], fwd_hooks=fwd_hooks, attention_mask=mask)
    return found[0]


def _written(found: SinkMap, sink: Sink | int, writer: int | None) -> tuple[int, int]:
    position = sink.position if isinstance(sink, Sink) else int(sink)
    lives = [one for one in found.sinks if one.position == position]
    if isinstance(sink, Sink) and sink.layers not in [one.layers for one in lives]:
        raise InputError(f"{sink!r} is no sink of this text")
    if writer is None:
        if not lives:
            raise InputError(f"token {position} is no sink, so `writer` must be given")
        writer = sink.l_start if isinstance(sink, Sink) else lives[0].l_start
    return position, writer


def _layers(
    given: int | Iterable[int] | None, writer: int, alive: Sequence[int], n_layers: int
) -> tuple[int, ...]:
    if given is None:
        # The life that the writer begins; the layer behind its end still reads it.
        end = writer + 1
        while end in alive:
            end += 1
        layers = tuple(range(writer + 1, min(end + 1, n_layers) if writer in alive else n_layers))
    else:
        layers = (given,) if isinstance(given, int) else tuple(given)
    wrong = [layer for layer in layers if not writer < layer < n_layers]
    if wrong or not layers:
        raise InputError(
            f"receiver layers {wrong or layers} do not lie after the writer {writer} and before "
            f"{n_layers}: nothing earlier can read what it writes"
        )
    return layers


@dataclass(frozen=True)
class PathEffect(Result):
    """A receiver's reading of one token: clean, with one path cut, and with all of them cut.

    The last axis is the head for keys, the key-value head for values, and of length 1 for MLPs.
    """

    model: dict[str, Any]
    """Name, generation, depth and weight processing of the model (`host.sites.ModelInfo`)."""
    token: str
    position: int
    writer: int
    """Layer whose MLP output is taken out."""
    edit: str
    """What takes its place."""
    write_norm: float
    """Norm of what is taken out: the clean output minus what takes its place."""
    receiver: Receiver
    layers: tuple[int, ...]
    """Layers of the receivers, each of them cut by itself."""
    clean: Float[Tensor, "layer part"]
    without_path: Float[Tensor, "layer part"]
    """With the write gone from what this receiver alone reads, all else clean."""
    without_write: Float[Tensor, "layer part"]
    """With the writer itself edited, and the token's whole trajectory recomputed."""

    @property
    def effect(self) -> Float[Tensor, "layer part"]:
        """Effect of the write through this receiver alone: clean minus `without_path`."""
        return self.clean - self.without_path

    @property
    def total(self) -> Float[Tensor, "layer part"]:
        """Effect of the write on the same reading by all paths: clean minus `without_write`."""
        return self.clean - self.without_write

    @property
    def share(self) -> Float[Tensor, "layer"]:
        """Effect over total, both averaged over parts. Not confined to [0, 1]: paths may work
        against each other. NaN where the write has no effect at all."""
        total = self.total.mean(dim=1)
        return self.effect.mean(dim=1) / total.masked_fill(total == 0, torch.nan)

    def __repr__(self) -> str:
        strongest = int(self.effect.mean(dim=1).abs().nan_to_num().argmax())
        where = (
            ", ".join(map(str, self.layers))
            if len(self.layers) < 4
            else (f"{self.layers[0]}-{self.layers[-1]}")
        )
        return (
            f"PathEffect(MLP {self.writer} -> {self.receiver} of layers {where} at token "
            f"{self.position}: {MEASURES[self.receiver]} {self.clean[strongest].mean():.4g} -> "
            f"{self.without_path[strongest].mean():.4g} at {self.layers[strongest]})"
        )

    def _notebook_frame(self) -> pd.DataFrame:
        return self.to_frame().drop(columns="part").groupby("layer", as_index=False).mean()

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer and part (head, key-value head, or the MLP)."""
        import pandas as pd

        n_parts = self.clean.shape[1]
        columns = {
            name: getattr(self, name).flatten().numpy()
            for name in ("clean", "without_path", "without_write", "effect", "total")
        }
        layers = [layer for layer in self.layers for _ in range(n_parts)]
        parts = list(range(n_parts)) * len(self.layers)
        return pd.DataFrame({"layer": layers, "part": parts, **columns})
