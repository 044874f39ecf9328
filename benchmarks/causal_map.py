"""Time of a whole causal map: about 5,000 counterfactual rows in one call.

Claim: seven sinks, every layer's MLP and attention output ablated in four ways, 21 doses of every
MLP near the onset, and every layer's write transplanted into 18 control tokens, on 400 tokens of
Qwen2.5-0.5B, take less than a minute on two cores.

Before its first edit a row equals its clean token, so passes of rows that are edited late begin
late. The same call with all passes begun at the first block shows what that saves. Rows packed
behind the text (`method="packed"`) are measured as well.

    python benchmarks/causal_map.py [--model qwen2.5-coder-0.5b] [--tokens 400]
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import time
from importlib import import_module
from unittest import mock

import torch

import secondary_sinks as ss
from secondary_sinks.cli.detect import demo_messages

# The module, which has the name of its function.
counterfactuals = import_module("secondary_sinks.intervene.counterfactuals")

DOSES = [0.125 * step for step in range(21)]


def interventions(sink_map: ss.SinkMap) -> list[ss.Intervention]:
    """The rows of the map."""
    taken = {sink.position for sink in sink_map.sinks}
    free = [p for p in range(24, sink_map.n_tokens - 16) if p not in taken]
    controls = free[:: max(1, len(free) // 18)][:18]
    rows = []
    for sink in sink_map.secondary[:7]:
        direction = torch.zeros(sink_map.provenance.model.d_model)
        direction[0] = 1.0
        edits = (ss.Zero(), ss.Mean(), ss.Scale(0.5), ss.ProjectOut(direction))
        for layer in range(sink_map.n_layers):
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
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    model = ss.load_model(options.model, progress=False)
    sink_map = ss.detect_sinks(model, demo_messages(), max_tokens=options.tokens)
    rows = interventions(sink_map)
    ss.counterfactuals(model, sink_map, rows[:2])  # the self-test, once a model

    keep = counterfactuals.clean_run_for_rows

    def all_blocks(*args: object, **kwargs: object) -> object:
        return dataclasses.replace(keep(*args, **kwargs), begin_by=0)

    def seconds(method: str = "auto") -> float:
        began = time.perf_counter()
        ss.counterfactuals(model, sink_map, rows, method=method, progress=False)
        return time.perf_counter() - began

    def from_the_first_block() -> float:
        with mock.patch.object(counterfactuals, "clean_run_for_rows", all_blocks):
            return seconds()

    sides = {
        "passes begin at their first edit": seconds,
        "all blocks run": from_the_first_block,
        "packed behind the text": lambda: seconds("packed"),
    }
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            runs[name].append(side())
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.model}, {sink_map.n_tokens} tokens, {len(rows)} rows")
    first = runs["passes begin at their first edit"]
    for name, times in runs.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
        each = 1000 * median / len(rows)
        print(f"{name:<34}{median:6.1f} s, {each:.1f} ms a row, {ratio:.2f} x")
    print(f"median of {options.repeats} interleaved run{'s' * (options.repeats > 1)}")


if __name__ == "__main__":
    main()
