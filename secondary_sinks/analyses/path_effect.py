"""By which path does a writer's output act: later keys, later values, or later MLPs?

What an MLP writes stays in the residual stream, and every later layer reads it, through its keys,
its values, its queries and its MLP. To measure one of these paths, the write is subtracted from
what that one receiver reads, and from nothing else:

    clean          key of layer l  <-  residual before layer l
    without path   key of layer l  <-  residual before layer l  -  write

What the receiver then reads at the edited token is exact, because keys and values of layer l depend
only on the residual before it, and the MLP only on that and on the attention's output, which is set
to the clean one.

>>> path = ss.path_effect(model, sink_map, sink_map.secondary[0], receiver="k")
>>> path.effect.mean(dim=1), path.share       # by layer: lost by this path alone, and of the total
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.memory import MEMORY_BUDGET
from secondary_sinks.host.model_info import n_layers_of
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.counterfactuals import counterfactuals
from secondary_sinks.intervene.edits import Add, Edit, Resample, Scale, Zero
from secondary_sinks.intervene.interventions import Intervention, Row, apply_edit, check_rows
from secondary_sinks.intervene.rows import Place, edit_hooks
from secondary_sinks.intervene.whole_text import texts_per_pass
from secondary_sinks.result import Result
from secondary_sinks.sinks.selection import check_map
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.sinks.writers import WriterRule, resolve_writers

if TYPE_CHECKING:
    import pandas as pd

Receiver = Literal["k", "v", "mlp"]

MEASURES: dict[str, str] = {
    "k": "direct sink score",
    "v": "norm of the value",
    "mlp": "MLP output along the sink direction",
}
"""What is measured of each receiver."""


def path_effect(
    model: Model,
    sink_map: SinkMap,
    sink: Sink | int,
    *,
    receiver: Receiver = "k",
    receiver_layer: int | Iterable[int] | None = None,
    writer: int | None = None,
    edit: Edit | None = None,
    fwd_hooks: Sequence[UserHook] = (),
) -> PathEffect:
    """What does one later receiver alone read of a writer's output, at the token it was written to?

    For "k" it is the direct sink score (attention of the clean queries to that key), for "v" the
    norm of each value head, for "mlp" the MLP's output along the sink direction of its layer (the
    primary's residual after it). Effects of single paths need not add up to the total: norms and
    softmax are not linear, and what a receiver writes is read by further ones.

    Not evidence for: that the model's output needs the receiver. A large path effect says that the
    receiver reads the write.

    >>> path = ss.path_effect(model, sink_map, sink_map.secondary[0], receiver="v")
    >>> path.to_frame()
    >>> path.plot()

    Args:
        model: any TransformerLens model.
        sink_map: from `detect_sinks` in this model.
        sink: one of the map's sinks, or any position.
        receiver: "k", "v" or "mlp".
        receiver_layer: layers to look at, each by itself; by default those that read the sink
            while it lives, or all after the writer for a token that is not a sink. Where a later
            MLP has erased the write, subtracting it leaves its negative, and the effect says
            nothing about the sink.
        writer: layer of the MLP whose output is followed; by default the largest write
            (`resolve_writers`).
        edit: what replaces the output, by default zeros; the write is the difference.
        fwd_hooks: the hooks with which the map was made, in force here as well.

    Raises:
        InputError: an unknown receiver, a layer that is not after the writer, a position that is
            not a sink in a text without a primary sink and no `writer`, a sink map of another
            model.
        ModelError: a model that cannot be measured.
    """
    check_map(model, sink_map, fwd_hooks=fwd_hooks)
    if receiver not in get_args(Receiver):
        raise InputError(f"receiver must be 'k', 'v' or 'mlp', got {receiver!r}")
    if writer is None or isinstance(sink, Sink) or sink_map.phases:
        chosen = sink_map.select([sink])[:1]
        resolved = resolve_writers(model, sink_map, chosen, writer, fwd_hooks=fwd_hooks)
        position, (writer,), rule = chosen[0].position, resolved.layers, resolved.rule
    else:  # a text without a primary sink
        position, rule = int(sink), "given"
    removed = Intervention("mlp_out", writer, position, Zero() if edit is None else edit)
    check_rows(model, [(removed,)], sink_map.n_tokens)
    lives = [life for life in sink_map.sinks if life == sink or life.position == sink]
    layers = _layers(receiver_layer, writer, lives, n_layers_of(model))
    clean = CleanRun(sink_map)
    write = _write(model, clean, removed, fwd_hooks)
    minus = Add(-write)
    rows: list[Row] = [
        (Intervention("mlp_out", writer, position, Scale(1.0)),),
        (Intervention("mlp_out", writer, position, minus),),
        *(_cut(receiver, layer, position, minus) for layer in layers),
    ]
    provenance = sink_map.provenance
    if receiver == "k":
        result = counterfactuals(model, sink_map, rows, fwd_hooks=fwd_hooks, progress=False)
        readings, provenance = result.direct_score, result.provenance
    else:
        readings = _readings(model, clean, rows, receiver, fwd_hooks)
    at = list(layers)
    return PathEffect(
        token=sink_map.token_strings[position],
        position=position,
        writer=writer,
        writer_rule=rule,
        edit=repr(removed.edit),
        write_norm=float(write.float().norm()),
        receiver=receiver,
        layers=layers,
        clean=readings[0, at],
        without_write=readings[1, at],
        without_path=torch.stack([readings[2 + n, layer] for n, layer in enumerate(layers)]),
        provenance=provenance,
    )


@dataclass(frozen=True)
class PathEffect(Result):
    """What a receiver reads at one token: clean, with one path cut, and with all paths cut.

    The last axis is the head for keys, the key-value head for values, and of length 1 for MLPs.
    """

    token: str
    position: int
    writer: int
    """Layer whose MLP output is edited."""
    writer_rule: WriterRule
    """How it was chosen."""
    edit: str
    """What replaces it."""
    write_norm: float
    """Norm of the write: the clean output minus what replaces it."""
    receiver: Receiver
    layers: tuple[int, ...]
    """Layers of the receivers, each of them cut by itself."""
    clean: Float[Tensor, " layer part"]
    without_path: Float[Tensor, " layer part"]
    """With the write subtracted from what this receiver alone reads, all else clean."""
    without_write: Float[Tensor, " layer part"]
    """With the writer itself edited, and the token's whole trajectory recomputed."""
    provenance: Provenance

    @property
    def effect(self) -> Float[Tensor, " layer part"]:
        """Effect of the write through this receiver alone: clean minus `without_path`."""
        return self.clean - self.without_path

    @property
    def total(self) -> Float[Tensor, " layer part"]:
        """Effect of the write on the same reading by all paths: clean minus `without_write`."""
        return self.clean - self.without_write

    @property
    def share(self) -> Float[Tensor, " layer"]:
        """Effect over total, both averaged over parts. Not confined to [0, 1]: paths may act
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
            f"{self.position}: {MEASURES[self.receiver]} {self.clean[strongest].mean():.4g} to "
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


def _layers(
    given: int | Iterable[int] | None, writer: int, lives: Sequence[Sink], n_layers: int
) -> tuple[int, ...]:
    """The receiver layers; by default up to the last one that reads the life after the writer."""
    if given is None:
        last = next((x.layers[-1] for x in lives if writer <= x.layers[-1]), n_layers)
        layers = tuple(range(writer + 1, min(last + 2, n_layers)))
    else:
        layers = (given,) if isinstance(given, int) else tuple(given)
    wrong = [layer for layer in layers if not writer < layer < n_layers]
    if wrong or not layers:
        raise InputError(
            f"receiver layers {wrong or layers} do not lie after the writer {writer} and before "
            f"{n_layers}: earlier layers cannot read what it writes"
        )
    return layers


def _write(
    model: Model, clean: CleanRun, removed: Intervention, fwd_hooks: Sequence[UserHook]
) -> Float[Tensor, " d_model"]:
    """What the edit subtracts from the residual stream."""
    written: list[Tensor] = []

    def read(activation: Tensor) -> None:
        value = activation[0, removed.position]
        written.append(value - apply_edit(removed, value, activation[0], clean.ordinary))

    tokens = clean.tokens[None]
    site = Site(removed.site, removed.layer)
    mask = torch.ones_like(tokens)
    forward(model, tokens, [(site, read)], fwd_hooks=fwd_hooks, attention_mask=mask)
    return written[0]


def _cut(receiver: Receiver, layer: int, position: int, minus: Add) -> Row:
    """The edits after which a receiver reads the residual without the write."""
    before = Intervention("resid_pre", layer, position, minus)
    if receiver != "mlp":
        return (before,)
    # The attention between the residual and the MLP has read the edited residual too: its output is
    # set to the clean one, so that only what the MLP reads has changed.
    return before, Intervention("attn_out", layer, position, Resample(position))


def _readings(
    model: Model,
    clean: CleanRun,
    rows: Sequence[Row],
    receiver: Receiver,
    fwd_hooks: Sequence[UserHook],
) -> Float[Tensor, " row layer part"]:
    """Each row's value norms or MLP output in every layer, many rows to a pass."""
    position = rows[0][0].position
    # Later tokens cannot change what a token reads, so the text ends with it.
    tokens = clean.tokens[: position + 1]
    size = texts_per_pass(model, len(tokens), MEMORY_BUDGET, logits=False)
    directions = torch.nn.functional.normalize(clean.primary, dim=-1)
    site = "v" if receiver == "v" else "mlp_out"
    layers = range(clean.n_layers)
    by_layer: list[list[Tensor]] = [[] for _ in layers]

    def reader(layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            value = activation[1:, position].float().cpu()
            along = (value @ directions[layer])[:, None] if receiver == "mlp" else None
            by_layer[layer].append(value.norm(dim=-1) if along is None else along)

        return read

    readers = [(Site(site, layer), reader(layer)) for layer in layers]
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        places: list[Place] = [(1 + row, position) for row in range(len(chunk))]
        copies = tokens.expand(1 + len(chunk), -1)
        forward(
            model,
            copies,
            [*edit_hooks(chunk, places, clean), *readers],
            fwd_hooks=fwd_hooks,
            attention_mask=torch.ones_like(copies),
        )
    return torch.stack([torch.cat(parts) for parts in by_layer], dim=1)
