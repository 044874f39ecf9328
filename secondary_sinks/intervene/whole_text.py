"""Whole texts under edits of many tokens at once, with everything after them recomputed.

Counterfactual rows say what becomes of one edited token. What becomes of the *others* (the primary
sink when the secondary sinks are gone, the loss, the output) takes a forward pass over the whole
text. A batch holds the clean text in row 0 and, in each further row, a copy in which any number of
tokens are edited:

>>> zero = [Intervention("mlp_out", 5, position, Zero()) for position in (2, 3, 7)]
>>> clean_state, (edited,) = run_whole_texts(model, clean, [zero])
>>> edited.sink_score[:, :, 0] - clean_state.sink_score[:, :, 0]    # the primary, [layer, head]

Row 0 is there because an edit may use the clean tokens' activations at its site, and because clean
and edited numbers of one batch have the same rounding. Only a `TextState` of each row is kept: no
residual outlives its layer, logits are reduced to three numbers a token, and the attention of long
texts is streamed (`observe.attention_path`), so that thousands of tokens fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.memory import MEMORY_BUDGET, eager_attention_bytes, in_chunks
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.interventions import Intervention, sites_of
from secondary_sinks.intervene.rows import edit_hooks
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest
from secondary_sinks.observe.attention_path import (
    AttentionChoice,
    AttentionPath,
    measured_attention,
    path_of_attention,
)
from secondary_sinks.observe.residual_geometry import TokenGeometry

_COMPARED_AT_ONCE = 128  # tokens whose distributions over the vocabulary are held


@dataclass(frozen=True)
class OutputChange:
    """What an edit does to the next-token distributions of a text."""

    token_loss: Float[Tensor, " token-1"]
    """Cross-entropy of each next token, nats."""
    token_kl: Float[Tensor, " token"]
    """KL(clean || edited) at each position, nats."""
    top1_changed: Bool[Tensor, " token"]
    """Whether the most likely next token changes."""

    @property
    def loss(self) -> float:
        """Mean next-token cross-entropy, nats."""
        return float(self.token_loss.mean())

    @property
    def kl(self) -> float:
        """Mean KL(clean || edited), nats."""
        return float(self.token_kl.mean())

    @property
    def top1_share(self) -> float:
        """Share of positions whose most likely next token changes."""
        return float(self.top1_changed.float().mean())


@dataclass(frozen=True)
class TextState:
    """One run of a text, reduced to what analyses of sinks read."""

    sink_score: Float[Tensor, " layer head token"]
    """Mean attention from the later queries that see the token; NaN for the last token and in
    layers without attention."""
    norm: Float[Tensor, " layer token"]
    """Norm of the residual after each block."""
    alignment: Float[Tensor, " layer token"]
    """Its cosine with the *clean* text's primary."""
    centered_norm: Float[Tensor, " layer token"]
    """Its norm without the clean text's common component."""
    centered_alignment: Float[Tensor, " layer token"]
    """Its cosine with the clean primary, both without the common component."""
    output: OutputChange | None = None
    """How the output changed, if asked for."""
    logits: Float[Tensor, " token d_vocab"] | None = None
    """The output, if asked for."""

    def is_sink(self, clean: CleanRun, positions: Sequence[int]) -> Bool[Tensor, " item layer"]:
        """In which layers each token is a sink in this run, judged as the clean text was."""
        index = torch.tensor(positions)
        return clean.judge.is_sink(
            self.centered_alignment[:, index],
            self.centered_norm[:, index],
            self.sink_score[:, :, index],
            index,
        )


class TextMeter:
    """Reduces the activations of a batch of texts to one `TextState` for each.

    A layer without attention has NaN scores. All arithmetic is differentiable and nothing is
    written in place, so that the same meter serves a pass with gradients.
    """

    def __init__(self, clean: CleanRun):
        self._clean = clean
        self._score: dict[int, Tensor] = {}
        self._geometry: list[TokenGeometry] = []

    def editors(self) -> list[tuple[Site, Editor]]:
        """The functions that read every layer's residual."""
        layers = range(self._clean.n_layers)
        return [(Site("resid_post", layer), self._reader(layer)) for layer in layers]

    def receive(self, layer: int, columns: Sequence[AttentionColumns]) -> None:
        """Read the attention of a layer, one entry for each text."""
        total, n_seeing = torch.stack([text.received for text in columns]), columns[0].n_seeing
        # Clamped and then masked, because a division by 0 would make all gradients NaN.
        score = total.cpu() / n_seeing.clamp_min(1)
        self._score[layer] = score.masked_fill(n_seeing == 0, torch.nan)

    def states(self) -> list[TextState]:
        """One state for each text of the batch."""
        unknown = torch.full_like(next(iter(self._score.values())), torch.nan)
        layers = range(self._clean.n_layers)
        score = torch.stack([self._score.get(layer, unknown) for layer in layers], dim=1)
        geometry = {
            name: torch.stack([getattr(layer, name).cpu() for layer in self._geometry], dim=1)
            for name in vars(self._geometry[0])
        }
        return [
            TextState(
                sink_score=score[text],
                norm=geometry["norm"][text],
                alignment=geometry["alignment"][text],
                centered_norm=geometry["centered_norm"][text],
                centered_alignment=geometry["centered_alignment"][text],
            )
            for text in range(len(score))
        ]

    def _reader(self, layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            residual = activation.float()
            primary = self._clean.primary[layer].to(residual.device)
            common = self._clean.common[layer].to(residual.device)
            self._geometry.append(TokenGeometry.of(residual, primary, common))

        return read


def run_whole_texts(
    model: Any,
    clean: CleanRun,
    texts: Sequence[Sequence[Intervention]],
    *,
    output: bool = True,
    logits: bool = False,
    reduce: Callable[[TextState], Any] | None = None,
    fwd_hooks: Sequence[UserHook] = (),
    attention: AttentionChoice = "auto",
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> tuple[Any, list[Any]]:
    """Run the clean text and copies of it with edits, in as few passes as memory allows.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        texts: for each copy its interventions, at any number of tokens. Edits at one site of one
            token run in the order given. Indices must have been checked (`check_rows`).
        output: measure loss, divergence and changes of the most likely token.
        logits: keep the logits in each state.
        reduce: applied to each state as soon as it is measured, so that a long scan keeps no more
            than it needs.
        fwd_hooks: the user's hooks, in force for all texts.
        attention: how it is computed; see `observe.trace.trace`.
        memory_budget: bytes for attention and logits; decides how many copies share a pass.
        progress: show a progress bar; None shows one for more than one pass.

    Returns:
        The state of the clean text and those of the copies in order, after `reduce`.

    Raises:
        ModelError: a site cannot be measured, or not even one copy fits into memory.
    """
    path = path_of_attention(
        model, clean.tokens, attention, sites=sites_of(texts), fwd_hooks=fwd_hooks
    )
    n_tokens = len(clean.tokens)
    passes = in_chunks(
        lambda chunk: _one_pass(model, clean, chunk, output, logits, fwd_hooks, path),
        texts,
        texts_per_pass(model, n_tokens, memory_budget, logits=output or logits, attention=path),
        too_large=f"two copies of {n_tokens} tokens do not fit into memory: shorten the text",
        description="edited texts",
        progress=progress,
    )
    clean_state: Any = None
    edited: list[Any] = []
    for number, (unedited, *states) in enumerate(passes):
        if number == 0:
            clean_state = reduce(unedited) if reduce else unedited
        edited.extend(map(reduce, states) if reduce else states)
    return clean_state, edited


def texts_per_pass(
    model: Any,
    n_tokens: int,
    memory_budget: int,
    *,
    logits: bool,
    attention: AttentionPath = "eager",
) -> int:
    """How many edited copies of a text share a pass with the clean one."""
    if attention == "eager":
        block = eager_attention_bytes(model, n_tokens)
    else:
        # The most are the residuals and MLP activations of one block, three of each at once.
        width = int(model.cfg.d_model) + int(getattr(model.cfg, "d_mlp", None) or 0)
        block = 12 * width * n_tokens
    # The output is in memory once in the model's own precision and once more in float32.
    output = 8 * int(model.cfg.d_vocab) * n_tokens if logits else 0
    return max(1, memory_budget // (block + output) - 1)


def output_change(
    clean: Float[Tensor, " token d_vocab"],
    edited: Float[Tensor, " token d_vocab"],
    tokens: Int[Tensor, " token"],
) -> OutputChange:
    """Compare the logits of an edited run with those of the clean one, a few tokens at a time."""
    n_tokens = len(tokens)
    following = tokens.roll(-1).to(edited.device)
    parts = []
    for start in range(0, n_tokens, _COMPARED_AT_ONCE):
        at = slice(start, start + _COMPARED_AT_ONCE)
        before = clean[at].float().log_softmax(dim=-1)
        after = edited[at].float().log_softmax(dim=-1)
        parts.append(
            (
                -after.gather(1, following[at, None])[:, 0].cpu(),
                (before.exp() * (before - after)).sum(dim=-1).cpu(),
                (before.argmax(dim=-1) != after.argmax(dim=-1)).cpu(),
            )
        )
    loss, kl, changed = (torch.cat(column) for column in zip(*parts, strict=True))
    return OutputChange(token_loss=loss[:-1], token_kl=kl, top1_changed=changed)


def measured_pass(
    model: Any,
    clean: CleanRun,
    n_copies: int,
    editors: Sequence[tuple[Site, Editor]],
    path: AttentionPath,
    *,
    output: bool = False,
    logits: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> list[TextState]:
    """One pass over the clean text and copies of it, whose activations functions may replace.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        n_copies: how many copies follow the clean text in the batch.
        editors: functions of the activations of the whole batch.
        path: how attention is computed; see `path_of_attention`.
        output: compare the output of each text with that of the first.
        logits: keep the logits.
        fwd_hooks: the user's hooks.

    Returns:
        The states of the clean text and its copies.
    """
    tokens = clean.tokens.expand(1 + n_copies, -1)
    meter = TextMeter(clean)
    lengths = [len(clean.tokens)] * len(tokens)
    with measured_attention(model, lengths, ColumnRequest(), meter.receive, path) as readers:
        outputs = forward(
            model,
            tokens,
            [*editors, *readers, *meter.editors()],
            fwd_hooks=fwd_hooks,
            attention_mask=torch.ones_like(tokens),
            logits=output or logits,
        )
    states = meter.states()
    if outputs is None:
        return states
    return [
        replace(
            state,
            output=output_change(outputs[0], text, clean.tokens) if output else None,
            logits=text if logits else None,
        )
        for state, text in zip(states, outputs, strict=True)
    ]


def _one_pass(
    model: Any,
    clean: CleanRun,
    texts: Sequence[Sequence[Intervention]],
    output: bool,
    logits: bool,
    fwd_hooks: Sequence[UserHook],
    path: AttentionPath,
) -> list[TextState]:
    edits = [
        (intervention, (copy, intervention.position))
        for copy, interventions in enumerate(texts, start=1)
        for intervention in interventions
    ]
    rows, places = [(intervention,) for intervention, _ in edits], [place for _, place in edits]
    editors = edit_hooks(rows, places, clean)
    return measured_pass(
        model, clean, len(texts), editors, path, output=output, logits=logits, fwd_hooks=fwd_hooks
    )
