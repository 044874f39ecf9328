"""Counterfactual rows against nnsight, for the same ablations read at the same token.

nnsight runs a Hugging Face model and traces edits of it. It can measure the effect of zeroing one
MLP output on a token in two ways: one trace for each ablation, or one trace with an invoke for each
ablation (a batch with a copy of the text for each). Both read the token's residual norm after every
layer, which is a part of what a row gives. A few ablations are run and scaled to all.

nnsight is not a dependency of this project: `pip install nnsight` first.

    python benchmarks/against_nnsight.py [--model qwen2.5-coder-0.5b] [--tokens 400]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

import secondary_sinks as ss
from secondary_sinks.cli.detect import demo_messages
from secondary_sinks.loading.fetch import fetch

TRACES = 3  # ablations that are run one at a time in each repetition
INVOKES = 4  # ablations that share a trace


def one_trace_each(
    model: Any, tokens: torch.Tensor, cells: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """One traced pass for each ablation; norms by layer."""
    by_cell = []
    for layer, position in cells:
        with torch.no_grad(), model.trace(tokens):
            norms = ablate_and_read(model, layer, position).save()
        by_cell.append(norms)
    return by_cell


def one_trace(
    model: Any, tokens: torch.Tensor, cells: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """One traced pass with an invoke for each ablation."""
    with torch.no_grad(), model.trace() as tracer:
        by_cell = list().save()  # noqa: C408
        for layer, position in cells:
            with tracer.invoke(tokens):
                by_cell.append(ablate_and_read(model, layer, position))
    return by_cell


def ablate_and_read(model: Any, layer: int, position: int) -> Any:
    """Zero one MLP output at one token, and the norm of its residual after every block."""
    norms = []
    for number, block in enumerate(model.model.layers):
        if number == layer:
            block.mlp.output[:, position] = 0
        output = block.output
        residual = output[0] if isinstance(output, tuple) else output
        norms.append(residual[..., position, :].norm())
    return torch.stack(norms)


def main() -> None:
    """Interleave the sides and print their times for the whole sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    try:
        from nnsight import LanguageModel
    except ImportError:
        print("nnsight is not installed, so there is nothing to compare with: pip install nnsight")
        return
    from transformers import AutoModelForCausalLM

    model = ss.load_model(options.model, progress=False)
    hf = AutoModelForCausalLM.from_pretrained(fetch(options.model)).eval()
    theirs = LanguageModel(hf, tokenizer=model.tokenizer)
    sink_map = ss.detect_sinks(model, demo_messages(), max_tokens=options.tokens)
    tokens = sink_map.tokens[None]
    positions = [sink.position for sink in sink_map.secondary]
    cells = [(layer, p) for p in positions for layer in range(sink_map.n_layers)]
    rows = [ss.Intervention("mlp_out", layer, p, ss.Zero()) for layer, p in cells]
    sampled = cells[:: len(cells) // INVOKES][:INVOKES]
    indices = [cells.index(cell) for cell in sampled]

    sides: dict[str, tuple[Callable[[], Any], int]] = {
        "counterfactuals": (lambda: ss.counterfactuals(model, sink_map, rows, progress=False), 1),
        "nnsight, a trace each": (
            lambda: one_trace_each(theirs, tokens, sampled[:TRACES]),
            len(cells) // TRACES,
        ),
        f"nnsight, {INVOKES} invokes a trace": (
            lambda: one_trace(theirs, tokens, sampled),
            len(cells) // INVOKES,
        ),
    }
    ours = sides["counterfactuals"][0]()  # with the self-test, once a model
    for name in list(sides)[1:]:
        for index, norms in zip(indices, sides[name][0](), strict=False):
            error = float(((norms - ours.norm[index]) / norms).abs().max())
            print(f"{name}: largest relative difference of a norm {error:.0e}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, (run, factor) in sides.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) * factor)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"nnsight {version('nnsight')}"
    )
    print(f"{options.model}, {sink_map.n_tokens} tokens, {len(cells)} rows, {options.repeats} runs")
    for name, runs in times.items():
        pairs = zip(runs, times["counterfactuals"], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        print(f"{name:<30}{statistics.median(runs):8.1f} s{ratio:8.1f} x")


if __name__ == "__main__":
    main()
