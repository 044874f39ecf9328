"""How time and memory of counterfactual rows grow with their number and with the text.

Each cell of the table is a whole call of `counterfactuals` (with its clean run): seconds, and the
largest resident memory during the call above what the process had before (Linux). Cells are
visited in turn in every repetition. Rows beyond twice the tokens are run in several passes, so
memory stops growing there. The C library is told to give freed tensors back at once.

    python benchmarks/growth_of_rows.py [--model qwen2.5-coder-0.5b] [--out folder for the figure]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from memory_of_a_trace import forget_the_peak, resident

LENGTHS = (200, 400, 800)
COUNTS = (24, 168, 672)
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}


def measure(model: Any, sinks: Any, n_rows: int) -> tuple[float, float]:
    """Seconds of one call, and MB above what the process had before."""
    import secondary_sinks as ss

    n_layers = int(sinks.model["n_layers"])
    step = max(1, (sinks.n_tokens - 2) // -(-n_rows // n_layers))
    rows = [
        ss.Intervention("mlp_out", i % n_layers, 1 + i // n_layers * step, ss.Zero())
        for i in range(n_rows)
    ]
    forget_the_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    ss.counterfactuals(model, sinks, rows, progress=False)
    return time.perf_counter() - began, resident("VmHWM") - before


def draw(found: dict[tuple[int, int], tuple[float, float]], path: Path) -> None:
    """Seconds and memory over the number of rows, a curve for each length."""
    from secondary_sinks.report.style import add_panel, new_figure, save_figure, styled

    with styled():
        figure = new_figure(6.4, 2.7)
        for number, label in enumerate(("seconds", "MB above the model")):
            axes = add_panel(figure, 0.7 + number * 3.1, 0.25, 2.4, 1.9)
            for shade, length in zip((0.4, 0.7, 1.0), LENGTHS, strict=True):
                values = [found[length, count][number] for count in COUNTS]
                color = (0, 0.45 * shade, 0.7 * shade)
                axes.plot(
                    COUNTS, values, marker="o", markersize=3, color=color, label=f"{length} tokens"
                )
            axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        axes.legend(loc="upper left")
        save_figure(figure, path)


def main() -> None:
    """Measure every cell in turn, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for growth_of_rows.png")
    options = parser.parse_args()
    if not RETURN_MEMORY.items() <= os.environ.items():
        # The C library reads it when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | RETURN_MEMORY)
    import torch

    import secondary_sinks as ss

    model = ss.load_model(options.model, progress=False)
    maps = {n: ss.detect_sinks(model, torch.arange(1000, 1000 + n)) for n in LENGTHS}
    cells = [(length, count) for length in LENGTHS for count in COUNTS]
    runs: dict[tuple[int, int], list[tuple[float, float]]] = {cell: [] for cell in cells}
    measure(model, maps[LENGTHS[0]], 1)  # the self-test, once a model
    for _ in range(options.repeats):
        for length, count in cells:
            runs[length, count].append(measure(model, maps[length], count))
    found = {
        cell: (statistics.median(s for s, _ in own), statistics.median(m for _, m in own))
        for cell, own in runs.items()
    }
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.model}, median of {options.repeats} runs: seconds (MB above the model)")
    print(f"{'tokens':<8}" + "".join(f"{count:>13,} rows" for count in COUNTS))
    for length in LENGTHS:
        texts = (f"{found[length, c][0]:.1f} ({found[length, c][1]:.0f})" for c in COUNTS)
        print(f"{length:<8,}" + "".join(f"{text:>18}" for text in texts))
    if options.out:
        draw(found, options.out / "growth_of_rows.png")


if __name__ == "__main__":
    main()
