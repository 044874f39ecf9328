"""Time of a whole causal map: about 5,000 counterfactual rows in one call.

Claim: seven sinks, every layer's MLP and attention output ablated in four ways, 21 doses of every
MLP near the onset, and every layer's write transplanted into 18 control tokens, on 400 tokens of
Qwen2.5-0.5B, take less than a minute and a half on two cores.

A row is its clean token before its first edit, so passes of rows that are edited late begin late.
What that saves is measured beside it: the same call with all passes made to begin at the first
block.

    python benchmarks/causal_map.py [--model qwen2.5-coder-0.5b] [--tokens 400]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib import import_module
from unittest import mock

import torch

import secondary_sinks as ss
from secondary_sinks.cli import demo_messages

# The module, which has the name of its function.
counterfactuals = import_module("secondary_sinks.questions.counterfactuals")

DOSES = [0.125 * step for step in range(21)]


def interventions(sinks: ss.SinkMap, n_layers: int) -> list[ss.Intervention]:
    """The rows of the map."""
    taken = {sink.position for sink in sinks.sinks}
    free = [p for p in range(24, sinks.n_tokens - 16) if p not in taken]
    controls = free[:: max(1, len(free) // 18)][:18]
    rows = []
    for sink in sinks.secondary[:7]:
        direction = torch.zeros(int(sinks.model["d_model"]))
        direction[0] = 1.0
        edits = (ss.Zero(), ss.Mean(), ss.Scale(0.5), ss.ProjectOut(direction))
        for layer in range(n_layers):
            for site in ("mlp_out", "attn_out"):
                rows += [ss.Intervention(site, layer, sink.position, edit) for edit in edits]
            rows += [
                ss.Intervention("mlp_out", layer, p, ss.Resample(sink.position)) for p in controls
            ]
        for layer in range(max(0, sink.l_start - 3), sink.l_start + 1):
            rows += [
                ss.Intervention("mlp_out", layer, sink.position, ss.Scale(dose)) for dose in DOSES
            ]
    return rows


def main() -> None:
    """Time one call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    model = ss.load_model(options.model, progress=False)
    sinks = ss.detect_sinks(model, demo_messages(), max_tokens=options.tokens)
    rows = interventions(sinks, int(sinks.model["n_layers"]))
    ss.counterfactuals(model, sinks, rows[:2])  # the self-test, once a model

    def seconds() -> tuple[float, ss.CounterfactualRows]:
        began = time.perf_counter()
        found = ss.counterfactuals(model, sinks, rows, progress=False)
        return time.perf_counter() - began, found

    late, whole, found = [], [], None
    for _ in range(options.repeats):
        took, found = seconds()
        late.append(took)
        with mock.patch.object(counterfactuals, "beginnings", return_value=set()):
            whole.append(seconds()[0])
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.model}, {sinks.n_tokens} tokens: {found}")
    ratio = statistics.median(b / a for a, b in zip(late, whole, strict=True))
    for name, times in (("passes begin at their first edit", late), ("all blocks run", whole)):
        median = statistics.median(times)
        each = 1000 * median / len(rows)
        print(f"{name:<34}{len(rows)} rows in {median:6.1f} s, {each:.1f} ms a row")
    print(f"median of {options.repeats} interleaved runs, {ratio:.2f} x")


if __name__ == "__main__":
    main()
