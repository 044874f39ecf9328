"""Small language models whose attention sinks, and the MLPs that write them, are known.

In a trained model nobody knows the true sinks, so an analysis cannot be checked against them. A
planted model is an ordinary Hugging Face `LlamaForCausalLM` or `Qwen2ForCausalLM` whose weights are
constructed, not trained. Its sinks are known completely, and their mechanism is that of trained
models:

* the MLP of `PlantedPhase.start` reads the feature of `<bos>` in the residual stream and writes a
  large vector along the *sink direction*; the MLP of `PlantedPhase.end` erases it;
* the MLP of `PlantedSink.writer` does the same for another token, if every one of the `feeders`
  (MLPs of earlier layers) has written its part of the feature that the writer reads. The vector is
  erased at once after its lifetime, or `fades` by the same length in every layer;
* in every layer at least half of the heads are *sink heads*: each query attends to tokens whose
  normalized residual points along the sink direction. The other heads attend to random features;
* *aligned decoys* get a vector along the sink direction and a mark that makes keys repel queries;
  *large decoys* are massive in another direction. Neither draws attention;
* a *common component*, the same in every token, may have a cosine of up to 0.95 with the sink
  direction. Ordinary tokens then pass a simple cosine test, although keys do not read it.

An analysis that ablates, transplants or scales an MLP's output must therefore find exactly what was
planted. See `circuits` and `weights` for how the weights do this.

    model = planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=400),),
        secondary=(PlantedSink(token=9, writer=5, norm=80, lifetime=4, feeders=(2, 3)),),
    )
    tokens = model.tokens(64)              # <bos>, ordinary words, and "t9" at random positions
    truth = model.truth(tokens)            # truth.sinks[0]: onset 5, lifetime 4, written by MLP 5
    bridge = model.load("bridge")          # the same weights in TransformerLens
    with torch.no_grad():
        hidden = model.hf(tokens, output_hidden_states=True).hidden_states
    hidden[5 + 1][0, truth.sinks[0].position].norm()      # after block 5: 80
    hidden[9 + 1][0, truth.sinks[0].position].norm()      # after block 9: ordinary again, about 2

Layers are counted as everywhere in the library: a sink with onset 5 and lifetime 4 is a sink in the
residuals after blocks 5, 6, 7 and 8, so the attention that shows it is that of blocks 6 to 9.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.planted.circuits import Layout
from secondary_sinks.planted.plan import (
    SPECIAL_WORDS,
    Architecture,
    PlantedPhase,
    PlantedPlan,
    PlantedSink,
    check,
)
from secondary_sinks.planted.truth import (
    PlantedOccurrence,
    PlantedTruth,
    random_tokens,
    truth_of_text,
)
from secondary_sinks.planted.weights import Solver, empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "PlantedModel",
    "PlantedOccurrence",
    "PlantedPhase",
    "PlantedPlan",
    "PlantedSink",
    "PlantedTruth",
    "planted_model",
    "random_planted",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedModel:
    """A model with known sinks, its tokenizer, and the sinks of any text."""

    hf: PreTrainedModel
    """The Hugging Face model: float32, eval mode, eager attention, no gradients."""
    tokenizer: PreTrainedTokenizerFast
    """Each word is one token (`t17` is token 17); puts `<bos>` before a text."""
    plan: PlantedPlan
    """What was planted."""
    sink_direction: Float[Tensor, " d_model"]
    """Unit vector along which writers write."""
    common: Float[Tensor, " d_model"]
    """The component that every token's residual contains (zeros if there is none)."""

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"PlantedModel({plan.architecture}, layers={plan.n_layers}, d_model={plan.d_model}, "
            f"phases={[(p.start, p.end) for p in plan.phases]}, secondary={len(plan.secondary)}, "
            f"seed={plan.seed})"
        )

    def truth(self, tokens: Int[Tensor, " token"] | Int[Tensor, " 1 token"]) -> PlantedTruth:
        """Say which sinks an analysis of `tokens` must find.

        Raises:
            InputError: the tensor holds more than one text, does not begin with the primary
                tokens, or holds one of them again later (which would be another sink, neither
                primary nor secondary).
        """
        return truth_of_text(self.plan, tokens)

    def tokens(self, n: int, *, seed: int = 0) -> Int[Tensor, " 1 token"]:
        """Draw a random text of `n` tokens: primary tokens, then ordinary and planted tokens.

        Every planted token occurs once or twice, at random positions that leave at least the last
        eighth of the text as later queries.

        Raises:
            InputError: `n` is too small for a text with every planted token.
        """
        return random_tokens(self.plan, n, seed)

    def text(self, n: int, *, seed: int = 0) -> str:
        """The text of `tokens(n, seed=seed)`, without the `<bos>` that the tokenizer adds."""
        words = self.tokenizer.convert_ids_to_tokens(self.tokens(n, seed=seed)[0, 1:].tolist())
        return " ".join(words)

    def load(self, kind: Literal["bridge", "hooked"] = "bridge") -> Any:
        """Load a copy of the model into TransformerLens, on the CPU; `kind` as in `load_model`."""
        from secondary_sinks.loading.load_model import load_model

        hf = copy.deepcopy(self.hf)  # a bridge changes the model that it wraps
        return load_model(hf, tokenizer=self.tokenizer, kind=kind, progress=False)


def planted_model(
    *,
    n_layers: int = 12,
    d_model: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    vocab: int = 64,
    phases: Sequence[PlantedPhase] | None = None,
    secondary: Sequence[PlantedSink] | None = None,
    primary_positions: int = 1,
    common: float = 0.0,
    common_alignment: float = 0.0,
    aligned_decoys: Sequence[int] = (),
    large_decoys: Sequence[int] = (),
    aligned_decoy_norm: float = 60.0,
    large_decoy_norm: float = 40.0,
    noise: float = 1.0,
    seed: int = 0,
    architecture: Architecture = "llama",
) -> PlantedModel:
    """Build a small causal language model whose attention sinks are known.

    Args:
        n_layers: Number of blocks.
        d_model: Width of the residual stream. Every planted token, feeder and erasure takes an
            axis of its own; 64 suffices for most plans.
        n_heads: Number of query heads in every layer.
        n_kv_heads: Number of key and value heads in every layer.
        vocab: Number of tokens.
        phases: Primary phases, in order, at least one layer apart. None: one, of norm 400, from
            layer 1 to the last layer but one.
        secondary: Secondary sinks; `()` for none. None: tokens 9 and 17, written at a third of the
            depth; the second has two feeders (needs 5 layers or more).
        primary_positions: 1, or 2 for two primary tokens (`<bos> <bos2>`) written by the same MLP.
        common: Norm of a component that all tokens share.
        common_alignment: Its cosine (0 to 0.95) with the sink direction.
        aligned_decoys: Token ids that align with the sink direction but draw no attention.
        large_decoys: Token ids that are massive in another direction and draw no attention.
        aligned_decoy_norm: Norm of the aligned decoys, written by the first phase's first MLP and
            kept to the last layer.
        large_decoy_norm: Norm of the large decoys, in the embedding.
        noise: Norm that the random writes of all layers together add to an ordinary token, whose
            embedding has a norm of about 1.4 without the common component.
        seed: Determines every random weight. The global generator is neither read nor changed.
        architecture: "llama" or "qwen2".

    Raises:
        InputError: the arguments contradict each other, or would plant something that is not a
            sink; the message names it.

    Example:
        >>> model = planted_model(n_layers=8, seed=1)
        >>> [sink.writer for sink in model.truth(model.tokens(64)).sinks]
        [3, 3]
    """
    plan = PlantedPlan(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab=vocab,
        phases=_default_phases(n_layers) if phases is None else tuple(phases),
        secondary=_default_secondary(n_layers) if secondary is None else tuple(secondary),
        primary_positions=primary_positions,
        common=common,
        common_alignment=common_alignment,
        aligned_decoys=tuple(aligned_decoys),
        large_decoys=tuple(large_decoys),
        aligned_decoy_norm=aligned_decoy_norm,
        large_decoy_norm=large_decoy_norm,
        noise=noise,
        seed=seed,
        architecture=architecture,
    )
    check(plan)
    layout = Layout.of(plan)
    if plan.d_model < layout.required:
        raise InputError(f"d_model={plan.d_model}; this plan needs {layout.required} axes")
    length = max(48, plan.least_tokens)
    probe = torch.cat([random_tokens(plan, length, seed + 1 + row) for row in range(6)])
    with torch.no_grad():
        hf = empty_model(plan, layout)
        solver = Solver(hf, plan, layout, probe)
        solver.solve()
    return PlantedModel(
        hf=hf,
        tokenizer=_tokenizer(vocab),
        plan=plan,
        sink_direction=(solver.rotation @ layout.direction).float(),
        common=(solver.rotation @ layout.unit(layout.common) * common).float(),
    )


def _default_phases(n_layers: int) -> tuple[PlantedPhase, ...]:
    return (PlantedPhase(start=1, end=n_layers - 1, norm=400.0),)


def _default_secondary(n_layers: int) -> tuple[PlantedSink, ...]:
    writer = max(3, n_layers // 3)
    lifetime = max(min(2, n_layers - 1 - writer), (n_layers - writer) // 2)
    return (
        PlantedSink(token=9, writer=writer, norm=80.0, lifetime=lifetime),
        PlantedSink(token=17, writer=writer, norm=150.0, lifetime=lifetime, feeders=(1, 2)),
    )


def _tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_WORDS, *(f"t{i}" for i in range(len(SPECIAL_WORDS), vocab))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        add_bos_token=True,
        name_or_path="planted",
    )


def random_planted(seed: int, *, architecture: Architecture | None = None) -> PlantedModel:
    """Draw a planted model from a broad family, for property tests.

    Models have 8 to 30 layers, one or two primary phases, one or two primary tokens, and 0 to 6
    secondary sinks with their own norms (20 to 400), lifetimes (2 or more) and feeders, with or
    without a common component and decoys.

    Args:
        seed: The same seed draws the same model.
        architecture: "llama" or "qwen2"; drawn if None.

    Example:
        >>> random_planted(3)
        PlantedModel(qwen2, layers=15, d_model=96, phases=[(2, 13)], secondary=4, seed=3)
    """
    draw = random.Random(seed)
    n_layers = draw.randint(8, 30)
    phases = _random_phases(draw, n_layers)
    common = draw.choice([0.0, draw.uniform(8, 40)])
    tokens = draw.sample(range(len(SPECIAL_WORDS), 64), 10)
    n_sinks = draw.randint(0, 6)
    long_phases = [p for p in phases if min(p.end, n_layers - 1) - p.start >= 3]
    secondary = tuple(
        _random_sink(draw, n_layers, draw.choice(long_phases), token, least=max(20.0, common))
        for token in tokens[:n_sinks]
        if long_phases
    )
    n_kv_heads = draw.choice([1, 2, 4])
    drawn: Architecture = "llama" if draw.random() < 0.5 else "qwen2"
    return planted_model(
        n_layers=n_layers,
        d_model=draw.choice([64, 96]),
        n_heads=4,
        n_kv_heads=n_kv_heads,
        phases=phases,
        secondary=secondary,
        primary_positions=draw.choice([1, 1, 2]),
        common=common,
        common_alignment=draw.choice([0.0, draw.uniform(0, 0.6), draw.uniform(0.6, 0.95)]),
        aligned_decoys=tokens[6 : 6 + draw.randint(0, 2)],
        large_decoys=tokens[8 : 8 + draw.randint(0, 2)],
        noise=draw.uniform(0.3, 1.2),
        seed=seed,
        architecture=architecture or drawn,
    )


def _random_phases(draw: random.Random, n_layers: int) -> tuple[PlantedPhase, ...]:
    def norm() -> float:
        return math.exp(draw.uniform(math.log(100), math.log(2000)))

    start = draw.randint(0, 2)
    last = draw.choice([n_layers, n_layers - 1, n_layers - 2])
    if n_layers < 12 or draw.random() < 0.6:
        return (PlantedPhase(start=start, end=last, norm=norm()),)
    end = draw.randint(start + 3, n_layers // 2)
    second_start = end + draw.randint(1, 3)
    return (
        PlantedPhase(start=start, end=end, norm=norm()),
        PlantedPhase(start=second_start, end=last, norm=norm()),
    )


def _random_sink(
    draw: random.Random, n_layers: int, phase: PlantedPhase, token: int, *, least: float
) -> PlantedSink:
    writer = min(draw.randint(phase.start + 1, min(phase.end, n_layers - 1) - 1), phase.end - 2)
    feeders: tuple[int, ...] = ()
    if draw.random() < 0.4:
        feeders = tuple(sorted(draw.sample(range(writer), min(writer, draw.randint(1, 3)))))
    return PlantedSink(
        token=token,
        writer=writer,
        norm=math.exp(draw.uniform(math.log(least), math.log(400))),
        lifetime=draw.randint(2, phase.end - writer),
        feeders=feeders,
    )
