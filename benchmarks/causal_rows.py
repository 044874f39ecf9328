"""Time of counterfactual rows, against one intervention at a time and one plain pass.

Claim: rows for every layer at seven tokens (24 x 7 in Qwen2.5-0.5B) take less than one plain
forward pass over the text and the rows (packed behind the text: less than twice that), and are
hundreds of times faster than `run_with_hooks`, one intervention at a time.

All sides run in one process, in turn, in every repetition; ratios are taken within a repetition and
their median is printed. One intervention at a time is measured on a few interventions and scaled
to all of them. Its passes read one number only, which is the least that this way costs. The clean
run and the self-test of the rows, made once per text and once per model, are not in the time of the
rows; the last line is a whole call with the clean run.

    python benchmarks/causal_rows.py [--model qwen2.5-coder-0.5b] [--tokens 400] [--quick]
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

import secondary_sinks as ss
from secondary_sinks.intervene.engine import clean_run_for_rows
from secondary_sinks.intervene.interventions import rows_of
from secondary_sinks.intervene.run_rows import FastEngine, run_rows

CACHED = "cached rows"
N_SINKS = 7
SAMPLED = 2  # interventions that are run one at a time in each repetition


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def plain_pass(model: Any, n_tokens: int) -> None:
    """One forward pass over that many tokens, with no hooks and the last logits only."""
    tokens = torch.arange(1000, 1000 + n_tokens)[None].to(next(model.parameters()).device)
    with torch.no_grad():
        model(tokens, return_type=None, use_cache=False, logits_to_keep=1)


def one_at_a_time(model: Any, tokens: torch.Tensor, layer: int, position: int) -> None:
    """The same without this library: ablate one MLP output, read one residual."""
    norms: list[float] = []

    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, position] = 0
        return value

    def read(value: torch.Tensor, hook: Any) -> None:
        norms.append(float(value[0, position].norm()))

    last = model.cfg.n_layers - 1
    with torch.no_grad():
        model.run_with_hooks(
            tokens[None].to(next(model.parameters()).device),
            fwd_hooks=[
                (f"blocks.{layer}.hook_mlp_out", zero),
                (f"blocks.{last}.hook_resid_post", read),
            ],
            return_type=None,
            use_cache=False,
            logits_to_keep=1,
        )


class Text:
    """A clean text and rows on it."""

    def __init__(self, model: Any, n_tokens: int):
        self.model = model
        self.tokens = torch.arange(1000, 1000 + n_tokens)
        self.sink_map = ss.detect_sinks(model, self.tokens)

    def rows(self, count: int) -> list[ss.Intervention]:
        """Zero ablations of MLP outputs, layer by layer, at tokens spread over the text."""
        n_layers = self.model.cfg.n_layers
        n_positions = -(-count // n_layers)
        step = max(1, (len(self.tokens) - 2) // n_positions)
        return [
            ss.Intervention(
                "mlp_out", number % n_layers, 1 + step * (number // n_layers), ss.Zero()
            )
            for number in range(count)
        ]

    def timer(self, engine: FastEngine, count: int) -> Callable[[], float]:
        """Seconds of the rows by one engine, without the clean run."""
        rows = rows_of(self.rows(count))
        positions = [row[0].position for row in rows]
        clean = clean_run_for_rows(self.model, self.sink_map, engine, positions=positions)
        return lambda: seconds(lambda: run_rows(engine, self.model, clean, rows, progress=False))


def against_others(text: Text, repeats: int) -> None:
    """Time all sides in turn and print their table."""
    model, n_tokens = text.model, len(text.tokens)
    count = N_SINKS * model.cfg.n_layers
    sides = (
        CACHED,
        "packed rows",
        f"plain pass, {n_tokens + count} tokens",
        f"plain pass, {n_tokens} tokens",
        f"one at a time ({SAMPLED} run, scaled)",
        "counterfactuals(...), all in all",
    )
    runs: dict[str, list[float]] = {side: [] for side in sides}
    sample = text.rows(count)[:: max(1, count // SAMPLED)][:SAMPLED]
    ss.counterfactuals(model, text.sink_map, sample)  # self-test and warm-up
    cached, packed = text.timer("cached", count), text.timer("packed", count)
    for _ in range(repeats):
        times = (
            cached(),
            packed(),
            seconds(lambda: plain_pass(model, n_tokens + count)),
            seconds(lambda: plain_pass(model, n_tokens)),
            sum(
                seconds(lambda row=row: one_at_a_time(model, text.tokens, row.layer, row.position))
                for row in sample
            )
            * (count / len(sample)),
            seconds(lambda: ss.counterfactuals(model, text.sink_map, text.rows(count))),
        )
        for side, value in zip(sides, times, strict=True):
            runs[side].append(value)
    print(f"\n{count} rows on {n_tokens} tokens, median of {repeats} interleaved runs")
    print(f"{'':<36}{'seconds':>10}{'over cached':>14}")
    for side in sides:
        pairs = zip(runs[side], runs[CACHED], strict=True)
        ratio = statistics.median(value / floor for value, floor in pairs)
        print(f"{side:<36}{statistics.median(runs[side]):>10.2f}{ratio:>14.2f}")


def main() -> None:
    """Load the model and measure."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repetition, a short text")
    options = parser.parse_args()
    repeats, n_tokens = (1, 96) if options.quick else (options.repeats, options.tokens)
    model = ss.load_model(options.model, progress=False)
    device = next(model.parameters()).device
    print(f"{options.model} on {device}, {model.cfg.dtype}")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"transformer-lens {version('transformer-lens')}"
    )
    against_others(Text(model, n_tokens), repeats)


if __name__ == "__main__":
    main()
