"""Whole texts under edits of many tokens at once, with everything after them recomputed.

Counterfactual rows say what becomes of one edited token. What becomes of the *others* (the primary
sink when the secondary sinks are gone, the loss, the output) takes a forward pass over the text
itself. A batch holds the clean text in row 0 and, in each further row, a copy in which any number
of tokens are edited where they stand:

>>> zero = [Intervention("mlp_out", 5, position, Zero()) for position in (2, 3, 7)]
>>> clean_state, (edited,) = run_whole_texts(model, clean, [zero])
>>> edited.sink_score[:, :, 0] - clean_state.sink_score[:, :, 0]    # the primary, [layer, head]

Row 0 is there because an edit may ask what the clean tokens have at its site, and because clean and
edited numbers of one batch are rounded alike. Of each row only a `TextState` is kept: no residual
outlives its layer, logits are reduced to three numbers a token, and the attention of long texts is
streamed (`observe.attention_path`), so that thousands of tokens fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from secondary_sinks.errors import ModelError
from secondary_sinks.host.forward import Editor, forward
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.interventions import Intervention, Row
from secondary_sinks.intervene.rows import Place, edit_hooks
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest
from secondary_sinks.observe.attention_path import (
    AttentionChoice,
    AttentionPath,
    path_of_attention,
    streamed_attention,
)

MEMORY_BUDGET = 1 << 30
"""Bytes that the attention and the logits of one pass may take, by default."""

_CHUNK = 128  # tokens whose distributions over the vocabulary are compared at once


@dataclass(frozen=True)
class OutputChange:
    """What an edit does to the next-token distributions of a text."""

    token_loss: Float[Tensor, "token-1"]
    """Cross-entropy of each next token, nats."""
    token_kl: Float[Tensor, "token"]
    """KL(clean || edited) at each position, nats."""
    top1_changed: Bool[Tensor, "token"]
    """Whether the most likely next token is another."""

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
        """Share of positions whose most likely next token is another."""
        return float(self.top1_changed.float().mean())


@dataclass(frozen=True)
class TextState:
    """One run of a text, reduced to what is asked of sinks."""

    sink_score: Float[Tensor, "layer head token"]
    """Mean attention from later queries; NaN for the last token."""
    norm: Float[Tensor, "layer token"]
    """Norm of the residual after each block."""
    alignment: Float[Tensor, "layer token"]
    """Its cosine with the *clean* text's primary."""
    centered_norm: Float[Tensor, "layer token"]
    """Its norm without the clean text's common component."""
    centered_alignment: Float[Tensor, "layer token"]
    """Its cosine with the clean primary, both without the common component."""
    output: OutputChange | None = None
    """What became of the output, where it was asked for."""
    logits: Float[Tensor, "token d_vocab"] | None = None
    """The output itself, where it was asked for."""

    def is_sink(self, clean: CleanRun, positions: Sequence[int]) -> Bool[Tensor, "item layer"]:
        """In which layers each token is a sink in this run, judged as the clean text was."""
        at = list(positions)
        return clean.judge.is_sink(
            self.centered_alignment[:, at],
            self.centered_norm[:, at],
            self.sink_score[:, :, at],
            torch.tensor(at),
        )


class TextMeter:
    """Reduces the activations of a batch of texts to one `TextState` a row.

    All arithmetic is differentiable and nothing is written in place, so that the same meter serves
    a pass with gradients.
    """

    def __init__(self, clean: CleanRun):
        self._clean = clean
        self._score: list[Tensor] = []
        self._residual: list[tuple[Tensor, ...]] = []

    def editors(self) -> list[tuple[Site, Editor]]:
        """The functions that read every layer's pattern and residual."""
        layers = range(self._clean.n_layers)
        patterns = [(Site("pattern", layer), self._read_pattern) for layer in layers]
        return [*patterns, *self.residual_editors()]

    def residual_editors(self) -> list[tuple[Site, Editor]]:
        """Those of the residual alone, for a pass whose attention is streamed to `receive`."""
        layers = range(self._clean.n_layers)
        return [(Site("resid_post", layer), self._reader(layer)) for layer in layers]

    def receive(self, layer: int, columns: Sequence[AttentionColumns]) -> None:
        """Take in the attention of a layer, one text a row."""
        self._keep_score(torch.stack([one.received for one in columns]))

    def states(self) -> list[TextState]:
        """One state for each row of the batch."""
        score = torch.stack(self._score, dim=1)
        norm, alignment, centered_norm, centered_alignment = (
            torch.stack(parts, dim=1) for parts in zip(*self._residual, strict=True)
        )
        rows = zip(score, norm, alignment, centered_norm, centered_alignment, strict=True)
        return [TextState(*row) for row in rows]

    def _read_pattern(self, pattern: Tensor) -> None:
        weight = pattern.float()
        self._keep_score(weight.sum(dim=2) - weight.diagonal(dim1=2, dim2=3))

    def _keep_score(self, total: Float[Tensor, "row head token"]) -> None:
        n_later = torch.arange(total.shape[-1] - 1, -1, -1, device=total.device)
        # Clamped, then masked: dividing by 0 would make the gradient of every token NaN.
        score = (total / n_later.clamp_min(1)).masked_fill(n_later == 0, torch.nan)
        self._score.append(score.cpu())

    def _reader(self, layer: int) -> Editor:
        def read(activation: Tensor) -> None:
            residual = activation.float()
            primary = self._clean.primary[layer].to(residual.device)
            common = self._clean.common[layer].to(residual.device)
            centered = residual - common
            measured = (
                residual.norm(dim=-1),
                torch.cosine_similarity(residual, primary, dim=-1),
                centered.norm(dim=-1),
                torch.cosine_similarity(centered, primary - common, dim=-1),
            )
            self._residual.append(tuple(value.cpu() for value in measured))

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
    """Run the clean text, and copies of it with edits, in as few passes as memory allows.

    Args:
        model: any TransformerLens model.
        clean: the clean run of the text.
        texts: for each copy, the interventions in it, at as many tokens as wanted. Edits at one
            site of one token run in the order given. Indices must have been checked.
        output: measure loss, divergence and changed first choices.
        logits: keep the logits in each state.
        reduce: applied to each state at once, so that a long scan keeps no more than it needs.
        fwd_hooks: hooks of the user's own, in force for all rows.
        attention: how it is computed; see `observe.trace.trace`.
        memory_budget: bytes for attention and logits; decides how many copies share a pass.
        progress: show a progress bar; None shows one for more than one pass.

    Returns:
        The state of the clean text, and those of the copies in order (`reduce`d, where it is set).

    Raises:
        ModelError: a site cannot be measured, or not even one copy fits into memory.
    """
    keep = reduce or (lambda state: state)
    sites = {Site(one.site, one.layer) for text in texts for one in text}
    way = path_of_attention(model, clean.tokens, attention, sites=sites, fwd_hooks=fwd_hooks)
    size = texts_per_pass(
        model, len(clean.tokens), memory_budget, logits=output or logits, attention=way
    )
    first, clean_state = 0, None
    done: list[Any] = []
    show = len(texts) > size if progress is None else progress
    with tqdm(total=len(texts), desc="edited texts", disable=not show) as bar:
        while clean_state is None or first < len(texts):
            chunk = texts[first : first + size]
            try:
                states = _one_pass(model, clean, chunk, output, logits, fwd_hooks, way)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ModelError(
                        f"two copies of {len(clean.tokens)} tokens do not fit into memory: shorten "
                        "the text"
                    ) from error
                size = max(1, len(chunk) // 2)
                continue
            clean_state = keep(states[0]) if clean_state is None else clean_state
            done.extend(keep(state) for state in states[1:])
            first += len(chunk)
            bar.update(len(chunk))
    return clean_state, done


def texts_per_pass(
    model: Any,
    n_tokens: int,
    memory_budget: int,
    *,
    logits: bool,
    attention: AttentionPath = "eager",
) -> int:
    """How many edited copies of a text share a pass with the clean one."""
    # Eager attention holds about five float32 copies of its scores. Streamed, the most are the
    # residuals and MLP activations of one block, three of each at once.
    if attention == "eager":
        block = 20 * describe(model).n_heads * n_tokens**2
    else:
        width = int(model.cfg.d_model) + int(getattr(model.cfg, "d_mlp", None) or 0)
        block = 12 * width * n_tokens
    # The output is in memory once in the model's own precision and once more in float32.
    output = 8 * int(model.cfg.d_vocab) * n_tokens if logits else 0
    return max(1, memory_budget // (block + output) - 1)


def output_change(
    reference: Float[Tensor, "token d_vocab"],
    edited: Float[Tensor, "token d_vocab"],
    tokens: Int[Tensor, "token"],
) -> OutputChange:
    """Compare the logits of an edited run with those of the clean one, a few tokens at a time."""
    n_tokens = len(tokens)
    following = torch.cat([tokens[1:], tokens[:1]]).to(edited.device)
    parts = []
    for start in range(0, n_tokens, _CHUNK):
        at = slice(start, start + _CHUNK)
        before = reference[at].float().log_softmax(dim=-1)
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


def _one_pass(
    model: Any,
    clean: CleanRun,
    texts: Sequence[Sequence[Intervention]],
    output: bool,
    logits: bool,
    fwd_hooks: Sequence[UserHook],
    way: AttentionPath,
) -> list[TextState]:
    rows: list[Row] = []
    places: list[Place] = []
    for copy, interventions in enumerate(texts, start=1):
        for one in interventions:
            rows.append((one,))
            places.append((copy, one.position))
    tokens = clean.tokens.expand(1 + len(texts), -1)
    meter = TextMeter(clean)
    lengths = [len(clean.tokens)] * len(tokens)
    streamed = way != "eager"
    readers = meter.residual_editors() if streamed else meter.editors()
    with (
        streamed_attention(model, lengths, ColumnRequest(), meter.receive, way)
        if streamed
        else nullcontext()
    ):
        found = forward(
            model,
            tokens,
            [*edit_hooks(rows, places, clean), *readers],
            fwd_hooks=fwd_hooks,
            attention_mask=torch.ones_like(tokens),
            logits=output or logits,
        )
    states = meter.states()
    if found is None:
        return states
    changes = [output_change(found[0], one, clean.tokens) if output else None for one in found]
    return [
        TextState(**(vars(state) | {"output": change, "logits": one if logits else None}))
        for state, change, one in zip(states, changes, found, strict=True)
    ]
