"""Time of a streamed trace, over a plain forward pass and over the ways without streaming.

Claims, for sink scores, alignment and norms of every layer and head: (a) at 1,024 to 4,096 tokens
about 1.15 times the time of the plain Hugging Face forward pass with its fast attention (SDPA) on
Qwen2.5-0.5B and about 1.2 times on SmolLM2-135M, and about 1.3 times at 8,192; (b) many times
faster than three steps: a pass for the hidden states, a pass for keys and values, and one more
eager pass for the attention of each layer.

All sides run in one process, in turn, in every repetition. Two ratios are printed for each: of the
shortest times, and the median of the ratios within a repetition; other work on the machine makes
both larger, and the second more. `--cpu-time` takes the time of one thread instead. Only the last
logits are computed, and no key-value cache. The three steps are timed with two of the eager passes,
and scaled to all layers.

    python benchmarks/attention_streaming.py [--model smollm2-135m --tokens 1024 2048 4096 8192]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import secondary_sinks as ss
from secondary_sinks.loading.fetch import fetch

Clock = Callable[[], float]
Side = Callable[[], float]

FLOOR = "plain forward, SDPA"

EAGER_UP_TO = 1024  # tokens of the sides that hold whole patterns
CLAIMED = {"smollm2-135m": [1024, 2048, 4096, 8192], "qwen2.5-coder-0.5b": [1024, 2048, 4096]}
SAMPLED = 2  # layers whose attention pass is run


def seconds(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Time of one call without gradients."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = clock()
    with torch.no_grad():
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def in_three_steps(hf: Any, tokens: torch.Tensor, clock: Clock) -> float:
    """Seconds of hidden states, keys and values, and every layer's attention, each by a pass.

    `hf` is an eager model. A layer's attention is read from a pass of the whole model and the
    others' is discarded, so that no more than one pattern is kept.
    """
    n_layers = hf.config.num_hidden_layers
    plain = {"use_cache": False, "logits_to_keep": 1}

    def hidden_states() -> None:
        for state in hf(tokens, output_hidden_states=True, **plain).hidden_states:
            state.norm(dim=-1)
            torch.cosine_similarity(state, state[:, :1], dim=-1)

    def keys_and_values() -> None:
        hf(tokens, use_cache=True, logits_to_keep=1)

    def attention_of_one_layer() -> None:
        def read(module: Any, inputs: Any, output: Any) -> None:
            columns.append(output[1].sum(dim=2) - output[1].diagonal(dim1=2, dim2=3))

        columns: list[torch.Tensor] = []
        handle = hf.model.layers[n_layers // 2].self_attn.register_forward_hook(read)
        hf(tokens, **plain)
        handle.remove()

    once = seconds(hidden_states, clock) + seconds(keys_and_values, clock)
    sampled = [seconds(attention_of_one_layer, clock) for _ in range(SAMPLED)]
    return once + n_layers * statistics.mean(sampled)


def sides_at(models: dict[str, Any], n_tokens: int, clock: Clock) -> dict[str, Side]:
    """Everything that is compared at one length; each side returns its seconds."""
    bridge = models["bridge"]
    device = next(bridge.parameters()).device
    tokens = (torch.arange(n_tokens) * 7919 % int(bridge.cfg.d_vocab)).to(device)
    measured = [ss.SinkScores(), ss.ResidualGeometry()]
    plain = {"use_cache": False, "logits_to_keep": 1}

    def trace(collectors: list[Any], attention: Any = "streaming") -> float:
        return seconds(lambda: ss.trace(bridge, tokens, collectors, attention=attention), clock)

    sides: dict[str, Side] = {
        FLOOR: lambda: seconds(lambda: models["sdpa"](tokens[None], **plain), clock),
        "streamed trace": lambda: trace(measured),
    }
    if n_tokens <= EAGER_UP_TO:
        sides |= {
            "with maximum and count": lambda: trace([*measured, ss.ReceivedAttention()]),
            "plain bridge, eager": lambda: seconds(
                lambda: bridge(tokens[None], return_type=None, **plain), clock
            ),
            "eager trace": lambda: trace(measured, "eager"),
            "in three steps (scaled)": lambda: in_three_steps(models["eager"], tokens[None], clock),
        }
    return sides


def compare(sides: dict[str, Side], repeats: int) -> None:
    """Run the sides in turn and print their table."""
    for name, side in sides.items():
        if "steps" not in name:
            side()  # warm up, and make the comparison before the first streamed pass
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(side())
    floor = runs[FLOOR]
    print(f"{'':<30}{'shortest s':>12}{'of shortest':>13}{'median ratio':>14}")
    for name, times in runs.items():
        ratio = statistics.median(t / f for t, f in zip(times, floor, strict=True))
        print(f"{name:<30}{min(times):>12.2f}{min(times) / min(floor):>13.2f}{ratio:>14.2f}")


def load(alias: str) -> dict[str, Any]:
    """The model in a bridge, and as a Hugging Face model with either attention."""
    bridge = ss.load_model(alias, progress=False)
    device = next(bridge.parameters()).device
    folder = fetch(alias, None, False)
    models = {
        attention: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        for attention in ("sdpa", "eager")
    }
    return {name: hf.to(device).eval() for name, hf in models.items()} | {"bridge": bridge}


def main() -> None:
    """Print one table for each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="an alias; without, the models and lengths of the claims")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="parts of the names of the sides to run")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread: on a machine with other work"
    )
    options = parser.parse_args()
    clock: Clock = time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{'CPU' if options.cpu_time else 'wall'} time; torch {torch.__version__}, "
        f"transformers {version('transformers')}, transformer-lens {version('transformer-lens')}"
    )
    wanted = options.only or [""]
    chosen = {options.model: options.tokens} if options.model else CLAIMED
    for model, lengths in chosen.items():
        models = load(model)
        for n_tokens in lengths:
            print(f"\n{model}, {n_tokens} tokens, {options.repeats} repetitions")
            sides = sides_at(models, n_tokens, clock)
            compare(
                {n: s for n, s in sides.items() if n == FLOOR or any(o in n for o in wanted)},
                options.repeats,
            )


if __name__ == "__main__":
    main()
