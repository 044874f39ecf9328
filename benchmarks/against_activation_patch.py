"""Counterfactual rows against TransformerLens' activation patching, for the same ablations.

`transformer_lens.patching.generic_activation_patch` runs the model once for each cell of its sweep;
its metric is a number computed from the logits. The sweep here is its intended use: one MLP output
at a time, layer by position, replaced from a cache. A few cells are run and scaled to all of them.
It answers another question than a row (how the logits change, not the token), so the ratio is the
cost of asking about the token's own trajectory in this way.

    python benchmarks/against_activation_patch.py [--model qwen2.5-coder-0.5b] [--tokens 400]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version

import pandas as pd
import torch
from transformer_lens import patching

import secondary_sinks as ss
from secondary_sinks.cli.detect import demo_messages

CELLS = 2


def main() -> None:
    """Interleave the two sides and print their times for the whole sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = ss.load_model(options.model, progress=False)
    sink_map = ss.detect_sinks(model, demo_messages(), max_tokens=options.tokens)
    tokens = sink_map.tokens[None]
    n_layers = sink_map.n_layers
    positions = [sink.position for sink in sink_map.secondary]
    cells = [(layer, position) for position in positions for layer in range(n_layers)]
    rows = [ss.Intervention("mlp_out", layer, p, ss.Zero()) for layer, p in cells]
    zeros = {f"blocks.{layer}.hook_mlp_out": torch.zeros(1) for layer in range(n_layers)}

    def setter(activation, index, cache):
        activation[:, index[1]] = 0
        return activation

    sampled = pd.DataFrame(cells[:: len(cells) // CELLS][:CELLS], columns=["layer", "pos"])
    ss.counterfactuals(model, sink_map, rows[:2])  # the self-test, once a model
    ours, theirs = [], []
    for _ in range(options.repeats):
        began = time.perf_counter()
        ss.counterfactuals(model, sink_map, rows, progress=False)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with torch.no_grad():
            patching.generic_activation_patch(
                model,
                tokens,
                zeros,
                lambda logits: logits[0, -1, 0],
                setter,
                "mlp_out",
                index_df=sampled,
            )
        theirs.append((time.perf_counter() - began) * len(cells) / len(sampled))
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformer-lens {version('transformer-lens')}"
    )
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"{options.model}, {sink_map.n_tokens} tokens, {len(cells)} cells, {options.repeats} runs"
    )
    print(f"counterfactuals            {statistics.median(ours):8.1f} s")
    print(f"generic_activation_patch   {statistics.median(theirs):8.1f} s (scaled), {ratio:.0f} x")


if __name__ == "__main__":
    main()
