"""How time and memory of counterfactual rows grow with their number and with the text.

Every cell of the table is a process of its own, so that peaks of memory do not mix: it loads the
model, answers two rows (with the self-test), and then reports the seconds of a whole call of
`counterfactuals` and the growth of its peak resident memory. Cells are visited in turn in every
repetition. Rows beyond twice the tokens are run in several passes, so memory stops growing there.

    python benchmarks/growth_of_rows.py [--model qwen2.5-coder-0.5b] [--out folder for the figure]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = (200, 400, 800)
COUNTS = (24, 168, 672)


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(model_name: str, n_tokens: int, n_rows: int) -> None:
    """Print seconds, and MB above what the process had before."""
    import torch

    import secondary_sinks as ss

    model = ss.load_model(model_name, progress=False)
    text = torch.arange(1000, 1000 + n_tokens)
    sinks = ss.detect_sinks(model, text[:64])
    n_layers, n_positions = int(sinks.model["n_layers"]), -(-n_rows // int(sinks.model["n_layers"]))
    step = max(1, (n_tokens - 2) // n_positions)
    rows = [
        ss.Intervention("mlp_out", i % n_layers, 1 + i // n_layers * step, ss.Zero())
        for i in range(n_rows)
    ]
    ss.counterfactuals(model, sinks, [ss.Intervention("mlp_out", 0, 1, ss.Zero())])
    sinks = ss.detect_sinks(model, text)
    touched = sum(float(p.sum()) for p in model.parameters())  # weights are read when first used
    before, began = peak_megabytes(), time.perf_counter()
    ss.counterfactuals(model, sinks, rows, progress=False)
    print(time.perf_counter() - began, peak_megabytes() - before, touched != 0)


def draw(found: dict[tuple[int, int], tuple[float, float]], path: Path) -> None:
    """Seconds and memory over the number of rows, a curve for each length."""
    from secondary_sinks.report.style import add_panel, new_figure, save_figure, styled

    with styled():
        figure = new_figure(6.4, 2.7)
        for number, label in enumerate(("seconds", "MB above the model")):
            axes = add_panel(figure, 0.7 + number * 3.1, 0.25, 2.4, 1.9)
            for shade, length in zip((0.4, 0.7, 1.0), LENGTHS, strict=True):
                values = [found[length, count][number] for count in COUNTS]
                axes.plot(
                    COUNTS, values, marker="o", markersize=3, color=(0, 0.45 * shade, 0.7 * shade),
                    alpha=shade, label=f"{length:,} tokens",
                )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        axes.legend(loc="upper left")
        save_figure(figure, path)


def main() -> None:
    """Measure every cell in turn, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for growth_of_rows.png")
    parser.add_argument("--cell", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        measure(options.model, *options.cell)
        return
    import torch

    cells = [(length, count) for length in LENGTHS for count in COUNTS]
    runs: dict[tuple[int, int], list[tuple[float, float]]] = {cell: [] for cell in cells}
    for _ in range(options.repeats):
        for cell in cells:
            command = [sys.executable, __file__, "--model", options.model, "--cell"]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
            output = subprocess.run(
                [*command, *map(str, cell)],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            ).stdout
            seconds, megabytes = output.split()[:2]
            runs[cell].append((float(seconds), float(megabytes)))
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
