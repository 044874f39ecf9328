"""How time and memory of counterfactual rows grow with their number and with the text.

Each cell of the table is a whole call of `counterfactuals` including its clean run, which is most
of the cost of few rows: seconds, and the largest resident memory during the call above what the
process had before (Linux). Rows are run 256 at a time. Cells are visited in turn in every
repetition. Seconds and memory come from two processes, one after the other, because the memory is
measured with a C library that returns freed tensors at once, which costs time.

    python benchmarks/growth_of_rows.py [--model qwen2.5-coder-0.5b] [--out folder for the figure]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_of_a_trace import forget_the_peak, resident

LENGTHS = (200, 400, 800)
COUNTS = (0, 24, 168, 672)
CELLS = [(length, count) for length in LENGTHS for count in COUNTS]
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}

ByCell = dict[tuple[int, int], float]


def measure(model: Any, sink_map: Any, n_rows: int) -> tuple[float, float]:
    """Seconds of one call, and MB above what the process had before; of a trace for no rows."""
    import secondary_sinks as ss

    n_layers = sink_map.n_layers
    step = max(1, (sink_map.n_tokens - 2) // -(-max(n_rows, 1) // n_layers))
    rows = [
        ss.Intervention("mlp_out", i % n_layers, 1 + i // n_layers * step, ss.Zero())
        for i in range(n_rows)
    ]
    forget_the_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    if rows:
        ss.counterfactuals(model, sink_map, rows, progress=False)
    else:
        ss.trace(model, sink_map.tokens, [ss.ResidualGeometry()])
    return time.perf_counter() - began, resident("VmHWM") - before


def visit(model_name: str, repeats: int) -> list[tuple[float, float]]:
    """Medians of seconds and MB in every cell, from one process."""
    import torch

    import secondary_sinks as ss

    model = ss.load_model(model_name, progress=False)
    maps = {n: ss.detect_sinks(model, torch.arange(1000, 1000 + n)) for n in LENGTHS}
    measure(model, maps[LENGTHS[0]], 1)  # the self-test, once a model
    runs = [[measure(model, maps[length], n) for length, n in CELLS] for _ in range(repeats)]
    cells = zip(*runs, strict=True)
    return [
        tuple(statistics.median(column) for column in zip(*cell, strict=True)) for cell in cells
    ]


def in_a_process(model_name: str, repeats: int, **environment: str) -> list[tuple[float, float]]:
    """The result of `visit` in a separate process."""
    command = [sys.executable, __file__, "--visit", "--model", model_name]
    done = subprocess.run(
        [*command, "--repeats", str(repeats)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
    )
    return [tuple(cell) for cell in json.loads(done.stdout.splitlines()[-1])]


def draw(seconds: ByCell, megabytes: ByCell, path: Path) -> None:
    """Seconds and memory over the number of rows, a curve for each length."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    from secondary_sinks.plots.style import add_panel, new_figure, save_figure, styled

    counts = [count for count in COUNTS if count]
    with styled():
        figure = new_figure(6.4, 2.7)
        panels = {"seconds": seconds, "MB above the model": megabytes}
        for number, (label, by_cell) in enumerate(panels.items()):
            axes = add_panel(figure, 0.7 + number * 3.1, 0.25, 2.4, 1.9)
            for shade, length in zip((0.4, 0.7, 1.0), LENGTHS, strict=True):
                values = [by_cell[length, count] for count in counts]
                color = (0, 0.45 * shade, 0.7 * shade)
                axes.plot(
                    counts, values, marker="o", markersize=3, color=color, label=f"{length} tokens"
                )
            axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
            axes.xaxis.set_major_locator(FixedLocator(counts))
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(ScalarFormatter())
                axis.set_minor_formatter(ScalarFormatter())
        axes.legend(loc="upper left")
        save_figure(figure, path)


def main() -> None:
    """Measure every cell in turn, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for growth_of_rows.png")
    parser.add_argument("--visit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.visit:
        print(json.dumps(visit(options.model, options.repeats)))
        return
    import torch

    timed = in_a_process(options.model, options.repeats)
    weighed = in_a_process(options.model, options.repeats, **RETURN_MEMORY)
    seconds = dict(zip(CELLS, (s for s, _ in timed), strict=True))
    megabytes = dict(zip(CELLS, (m for _, m in weighed), strict=True))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.model}, median of {options.repeats} runs: seconds (MB above the model)")
    print(f"{'tokens':<8}{'trace alone':>18}" + "".join(f"{n:>13,} rows" for n in COUNTS[1:]))
    for length in LENGTHS:
        texts = (f"{seconds[length, n]:.1f} ({megabytes[length, n]:.0f})" for n in COUNTS)
        print(f"{length:<8,}" + "".join(f"{text:>18}" for text in texts))
    if options.out:
        draw(seconds, megabytes, options.out / "growth_of_rows.png")


if __name__ == "__main__":
    main()
