"""Small language models whose attention sinks, and the MLPs that write them, are known.

An analysis of attention sinks can be checked against nothing but itself on a trained model. A
planted model is an ordinary Hugging Face `LlamaForCausalLM` or `Qwen2ForCausalLM` whose weights
are constructed, not trained, so that the whole truth is known, while the mechanism is the real one:

* the MLP of `PlantedPhase.start` reads the feature of `<bos>` in the residual stream and writes a
  large vector along the *sink direction*; the MLP of `PlantedPhase.end` erases it;
* the MLP of `PlantedSink.writer` does the same for another token, if every one of the `feeders`
  (MLPs of earlier layers) has written its part of the feature that the writer reads. It is erased
  at once after its lifetime, or `fades` by the same length in every layer;
* in every layer at least half of the heads are *sink heads*: each query asks for tokens whose
  normalized residual points along the sink direction. The other heads attend to random features;
* *aligned decoys* get a vector along the sink direction and a mark that keys read as "do not look";
  *large decoys* are massive in another direction. Neither draws attention;
* a *common component*, the same in every token, may share up to 0.95 of the sink direction, which
  makes ordinary tokens pass a naive cosine test although keys are blind to it.

Whatever ablates, transplants or scales an MLP's output must therefore find exactly what was
planted. How the weights do it is told in `planted_weights`.

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

Layers are counted as everywhere in the library: a sink with onset 5 and lifetime 4 is one in the
residuals after blocks 5, 6, 7 and 8, so the attention that shows it is that of blocks 6 to 9.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.planted import weights
from secondary_sinks.planted.plan import (
    SPECIAL_WORDS,
    Architecture,
    PlantedPhase,
    PlantedPlan,
    PlantedSink,
    check,
)

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


class PlantedOccurrence(NamedTuple):
    """One secondary sink in one text."""

    position: int
    token: int
    onset: int
    lifetime: int
    writer: int
    feeders: tuple[int, ...]
    norm: float


@dataclass(frozen=True, kw_only=True)
class PlantedTruth:
    """What an analysis of one text must recover."""

    primary: tuple[int, ...]
    """Positions of the primary tokens."""
    phases: tuple[tuple[int, int], ...]
    """The primary phases, each `[start, end)`."""
    sinks: tuple[PlantedOccurrence, ...]
    """Secondary sinks, by position."""
    decoys_aligned: tuple[int, ...]
    """Positions aligned with the sink direction that draw no attention."""
    decoys_large: tuple[int, ...]
    """Positions massive in another direction that draw no attention."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedModel:
    """A model with known sinks, its tokenizer, and the truth about any text."""

    hf: PreTrainedModel
    """The Hugging Face model: float32, eval mode, eager attention, no gradients."""
    tokenizer: PreTrainedTokenizerFast
    """One word a token (`t17` is token 17); puts `<bos>` in front."""
    plan: PlantedPlan
    """What was planted."""
    sink_direction: Float[Tensor, " d_model"]
    """Unit vector that writers write along."""
    common: Float[Tensor, " d_model"]
    """The component that every token's residual contains (zeros if there is none)."""

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"PlantedModel({plan.architecture}, layers={plan.n_layers}, d_model={plan.d_model}, "
            f"phases={[(p.start, p.end) for p in plan.phases]}, secondary={len(plan.secondary)}, "
            f"seed={plan.seed})"
        )

    def truth(self, tokens: Int[Tensor, " pos"] | Int[Tensor, "1 pos"]) -> PlantedTruth:
        """What an analysis of `tokens` must find.

        Raises `InputError` if the tensor holds more than one text, does not begin with the primary
        tokens, or holds one of them again later (which would plant a sink that is neither).
        """
        ids = tokens[0] if tokens.ndim == 2 and len(tokens) == 1 else tokens
        if ids.ndim != 1:
            raise InputError(f"tokens have shape {tuple(tokens.shape)}; expected [pos] or [1, pos]")
        listed: list[int] = ids.tolist()
        plan, prefix = self.plan, list(self.plan.primary_tokens)
        if listed[: len(prefix)] != prefix:
            raise InputError(f"tokens begin with {listed[: len(prefix)]}; expected {prefix}")
        if again := [p for p, t in enumerate(listed) if t in prefix and p >= len(prefix)]:
            raise InputError(f"primary tokens occur again at positions {again}")
        by_token = {sink.token: sink for sink in plan.secondary}
        found = [(p, by_token[t]) for p, t in enumerate(listed) if t in by_token]
        return PlantedTruth(
            primary=tuple(range(len(prefix))),
            phases=tuple((phase.start, phase.end) for phase in plan.phases),
            sinks=tuple(
                PlantedOccurrence(p, s.token, s.writer, s.lifetime, s.writer, s.feeders, s.norm)
                for p, s in found
            ),
            decoys_aligned=tuple(p for p, t in enumerate(listed) if t in plan.aligned_decoys),
            decoys_large=tuple(p for p, t in enumerate(listed) if t in plan.large_decoys),
        )

    def tokens(self, n: int, *, seed: int = 0) -> Int[Tensor, "1 pos"]:
        """A random text of `n` tokens: the primary tokens, then ordinary ones with the planted.

        Every planted token occurs once, or twice by chance, at random positions that leave at
        least the last eighth of the text as later queries. Raises `InputError` if `n` is too small.
        """
        plan = self.plan
        least = plan.primary_positions + 3 * len(plan.planted_tokens) + 8
        if n < least:
            raise InputError(f"n={n} tokens hold no text with every planted token; least {least}")
        generator = torch.Generator().manual_seed(seed)
        taken = {*range(len(SPECIAL_WORDS)), *plan.planted_tokens}
        ordinary = torch.tensor([t for t in range(plan.vocab) if t not in taken])
        ids = ordinary[torch.randint(len(ordinary), (n,), generator=generator)]
        ids[: plan.primary_positions] = torch.tensor(plan.primary_tokens)
        last = n - max(2, n // 8)
        free = torch.randperm(last - plan.primary_positions, generator=generator)
        positions = iter((free + plan.primary_positions).tolist())
        for token in plan.planted_tokens:
            ids[next(positions)] = token
        for token in plan.planted_tokens:
            if torch.rand(1, generator=generator) < 0.4 and (spot := next(positions, None)):
                ids[spot] = token
        return ids[None]

    def text(self, n: int, *, seed: int = 0) -> str:
        """The text of `tokens(n, seed=seed)`, without the `<bos>` that the tokenizer puts there."""
        words = self.tokenizer.convert_ids_to_tokens(self.tokens(n, seed=seed)[0, 1:].tolist())
        return " ".join(words)

    def load(self, kind: Literal["bridge", "hooked"] = "bridge") -> Any:
        """A copy of the model in TransformerLens, on the CPU.

        "bridge" is a `TransformerBridge`, "hooked" a `HookedTransformer`, which only
        TransformerLens 3 has (`ModelError` in later ones). Raises `InputError` for another `kind`.
        """
        hf, tokenizer = copy.deepcopy((self.hf, self.tokenizer))  # a bridge changes what it wraps
        model: Any
        if kind == "bridge":
            from transformer_lens.model_bridge import TransformerBridge

            model = TransformerBridge.boot_transformers(
                "planted", hf_model=hf, tokenizer=tokenizer, device="cpu"
            )
        elif kind == "hooked":
            from secondary_sinks.loading.hooked_transformer import to_hooked

            model = to_hooked(hf, tokenizer, "cpu", torch.float32)
        else:
            raise InputError(f"kind={kind!r}; expected 'bridge' or 'hooked'")
        # For Qwen2, TransformerLens strips `<bos>` from texts: trained Qwen2 models have none.
        model.cfg.default_prepend_bos = True
        return model


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

    Parameters
    ----------
    n_layers, d_model, n_heads, n_kv_heads, vocab:
        Shape of the model. `d_model` needs an axis for every planted thing; 64 suffices for most.
    phases:
        Primary phases, in order, at least one layer apart. Default: one, of norm 400, from layer 1
        to the last layer but one.
    secondary:
        Secondary sinks. Default: tokens 9 and 17, written at a third of the depth; the second has
        two feeders (needs 5 layers or more). Pass `()` for none.
    primary_positions:
        1, or 2 for two primary tokens (`<bos> <bos2>`), written by the same MLP.
    common, common_alignment:
        Norm of a component that all tokens share, and its cosine (0 to 0.95) with the sink
        direction.
    aligned_decoys, large_decoys:
        Token ids, with the norms `aligned_decoy_norm` (written by the first phase's first MLP,
        kept to the end) and `large_decoy_norm` (in the embedding).
    noise:
        Norm that the random writes of all layers together add to an ordinary token, whose
        embedding has a norm of about 1.4 without the common component.
    seed:
        Decides every random weight. The global generator is neither read nor changed.
    architecture:
        "llama" or "qwen2".

    Raises
    ------
    InputError
        If the arguments contradict each other, or would plant something that is not honestly a
        sink, naming which.
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
    return _build(plan)


def _default_phases(n_layers: int) -> tuple[PlantedPhase, ...]:
    return (PlantedPhase(start=1, end=n_layers - 1, norm=400.0),)


def _default_secondary(n_layers: int) -> tuple[PlantedSink, ...]:
    writer = max(3, n_layers // 3)
    lifetime = max(1, (n_layers - writer) // 2)
    return (
        PlantedSink(token=9, writer=writer, norm=80.0, lifetime=lifetime),
        PlantedSink(token=17, writer=writer, norm=150.0, lifetime=lifetime, feeders=(1, 2)),
    )


def _build(plan: PlantedPlan) -> PlantedModel:
    layout = weights.Layout.of(plan)
    if plan.d_model < layout.required:
        raise InputError(f"d_model={plan.d_model}; this plan needs {layout.required} axes")
    with torch.no_grad():
        hf = weights.empty_model(plan, layout)
        model = PlantedModel(
            hf=hf,
            tokenizer=_tokenizer(plan.vocab),
            plan=plan,
            sink_direction=torch.zeros(plan.d_model),
            common=torch.zeros(plan.d_model),
        )
        length = max(48, plan.primary_positions + 3 * len(plan.planted_tokens) + 8)
        probe = torch.cat([model.tokens(length, seed=plan.seed + 1 + row) for row in range(6)])
        solver = weights.Solver(hf, plan, layout, probe)
        solver.solve()
    return PlantedModel(
        hf=hf,
        tokenizer=model.tokenizer,
        plan=plan,
        sink_direction=(solver.rotation @ layout.direction).float(),
        common=(solver.rotation @ layout.unit(layout.common) * plan.common).float(),
    )


def _tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_WORDS, *(f"t{i}" for i in range(len(SPECIAL_WORDS), vocab))]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        add_bos_token=True,
        name_or_path="planted",
    )


def random_planted(seed: int, *, architecture: Architecture | None = None) -> PlantedModel:
    """Draw a planted model from a broad family, for property tests.

    8 to 30 layers; one or two primary phases and one or two primary tokens; 0 to 6 secondary sinks
    with their own norms (20 to 400), lifetimes and feeders; with or without a common component and
    decoys. The same `seed` draws the same model; `architecture` is drawn unless given.
    """
    draw = random.Random(seed)
    n_layers = draw.randint(8, 30)
    phases = _random_phases(draw, n_layers)
    common = draw.choice([0.0, draw.uniform(8, 40)])
    tokens = draw.sample(range(len(SPECIAL_WORDS), 64), 10)
    count = draw.randint(0, 6)
    room = [p for p in phases if min(p.end, n_layers - 1) - p.start >= 2]
    secondary = tuple(
        _random_sink(draw, n_layers, draw.choice(room), token, least=max(20.0, common))
        for token in tokens[:count]
        if room
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
    again = end + draw.randint(1, 3)
    return (
        PlantedPhase(start=start, end=end, norm=norm()),
        PlantedPhase(start=again, end=last, norm=norm()),
    )


def _random_sink(
    draw: random.Random, n_layers: int, phase: PlantedPhase, token: int, *, least: float
) -> PlantedSink:
    writer = draw.randint(phase.start + 1, min(phase.end, n_layers - 1) - 1)
    feeders: tuple[int, ...] = ()
    if draw.random() < 0.4:
        feeders = tuple(sorted(draw.sample(range(writer), min(writer, draw.randint(1, 3)))))
    return PlantedSink(
        token=token,
        writer=writer,
        norm=math.exp(draw.uniform(math.log(least), math.log(400))),
        lifetime=draw.randint(1, phase.end - writer),
        feeders=feeders,
    )
