"""Peak memory of a trace, over a plain forward pass, against `run_with_cache`.

Claims: (a) collecting residual norms, alignment, sink scores, key, value, MLP and attention norms
and massive activations of every layer and head takes at most 1.2 times the peak of a plain forward
pass, weights included, and above the weights at least 20 times less than `run_with_cache`, at 512
tokens of Qwen2.5-0.5B; (b) with streamed attention 16,384 tokens of SmolLM2-135M and of
Qwen2.5-0.5B stay within 8 GB above the weights. The eager sides, which do not run beyond 2,048
tokens here, would hold 10 and 15 GB for each copy of one layer's scores.

The plain pass is TransformerLens' with eager attention, and Hugging Face's with fast attention
(SDPA), which holds no pattern; the trace is eager and streamed.

Each side runs in a separate process, one after the other, and reports the peak of its resident
memory during the pass (from Linux), the ratio to the first side's, and how far the peak is above
what the process had before, with the model loaded and warmed up on a few tokens. The C library is
set to return freed tensors at once (`MALLOC_MMAP_THRESHOLD_`); what it would otherwise keep differs
by hundreds of megabytes from run to run.

    python benchmarks/memory_of_a_trace.py [--model smollm2-135m --tokens 512 4096] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

PLAIN = "plain, eager"
CACHE = "run_with_cache"
SIDES = {
    PLAIN: "the last position's logits only, no key-value cache",
    "plain, SDPA": "Hugging Face alone, likewise",
    "trace, eager": "all built-in collectors of one activation at a time",
    "trace, streamed": "the same collectors",
    CACHE: "TransformerLens keeps every activation",
}

CLAIMED = {"qwen2.5-coder-0.5b": [512, 16384], "smollm2-135m": [16384]}

EAGER_UP_TO = 2048  # tokens of the sides that hold whole patterns
REPEATED_UP_TO = 4096  # tokens; beyond them a side takes minutes, and is run once


class Measured(NamedTuple):
    """One run of one side."""

    growth: float
    """MB of the peak above the loaded model."""
    peak: float
    """MB of the peak."""
    seconds: float


def sides_at(n_tokens: int) -> list[str]:
    """The sides that run at a length: long texts only without a pattern."""
    flat = ("plain, SDPA", "trace, streamed")
    return [side for side in SIDES if n_tokens <= EAGER_UP_TO or side in flat]


def resident(what: Literal["VmRSS", "VmHWM"]) -> float:
    """MB of this process's memory now, or its peak since `forget_the_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{what}:")[1].split()[0]) / 1024


def forget_the_peak() -> None:
    """Measure the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(side: str, model_name: str, n_tokens: int) -> None:
    """Print growth of the peak, and the peak, in MB, and seconds of one side."""
    import torch

    import secondary_sinks as ss

    if side == "plain, SDPA":
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from secondary_sinks.loading.fetch import fetch

        logging.disable_progress_bar()
        folder = str(fetch(model_name, None, False))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        vocabulary = model.config.vocab_size
    else:
        model = ss.load_model(model_name, progress=False)
        vocabulary = int(model.cfg.d_vocab)
        # Texts beyond the model's context take as much memory as any.
        model.cfg.n_ctx = max(model.cfg.n_ctx, n_tokens)
    tokens = (torch.arange(n_tokens) * 7919 % vocabulary)[None]
    collectors = [
        ss.ResidualNorms(),
        ss.ResidualGeometry(),
        ss.SinkScores(),
        ss.SinkScores("gu", name="gu"),
        ss.MassiveActivations(),
        *(ss.Norms(site) for site in ("k", "v", "mlp_out", "attn_out")),
    ]
    plain = {"use_cache": False, "logits_to_keep": 1}

    def run(text: torch.Tensor) -> object:
        with torch.no_grad():
            if side == "plain, SDPA":
                return model(text, **plain).logits
            if side == PLAIN:
                return model(text, return_type=None, **plain)
            if side == CACHE:
                return model.run_with_cache(text, return_type=None)
            attention = "eager" if side == "trace, eager" else "streaming"
            return ss.trace(model, text, collectors, attention=attention)

    run(tokens[:, :64])  # includes the comparison before a model's first streamed pass
    # Weights are mapped from disk and become resident when first read: read them all now.
    touched = sum(float(p.detach().sum()) for p in model.parameters())
    forget_the_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    result = run(tokens)
    took, peak = time.perf_counter() - began, resident("VmHWM")
    print(peak - before, peak, took, touched != 0, type(result).__name__)


def measured(side: str, model_name: str, n_tokens: int) -> Measured:
    """Run one side in a separate process."""
    command = [sys.executable, __file__, "--side", side, "--model", model_name]
    command += ["--tokens", str(n_tokens)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return Measured(*map(float, output.split()[:3]))


def report(model_name: str, n_tokens: int, repeats: int) -> None:
    """Measure all sides at one length, in turn, and print their table."""
    sides = sides_at(n_tokens)
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(repeats):  # interleaved, so that drift of the machine cancels
        for side in sides:
            runs[side].append(measured(side, model_name, n_tokens))
    middle = {
        side: Measured(*(statistics.median(column) for column in zip(*of_side, strict=True)))
        for side, of_side in runs.items()
    }
    base = middle[sides[0]]
    print(f"\n{model_name}, {n_tokens} tokens, median of {repeats} run{'s' * (repeats > 1)}")
    print(f"{'':<17}{'peak MB':>9}{'ratio':>7}{'above weights MB':>18}{'seconds':>9}")
    for side, median in middle.items():
        print(
            f"{side:<17}{median.peak:>9.0f}{median.peak / base.peak:>7.2f}{median.growth:>18.0f}"
            f"{median.seconds:>9.2f}   {SIDES[side]}"
        )
    if CACHE in middle:
        for side in ("trace, eager", "trace, streamed"):
            times = middle[CACHE].growth / max(middle[side].growth, 1)
            print(f"{CACHE} over {side}, above the weights: {times:.1f}")


def main() -> None:
    """Measure all models and lengths in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="An alias; without, the models and lengths of the claims.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options.side, options.model, options.tokens[0])
        return
    import torch
    import transformers

    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"transformer-lens {version('transformer-lens')}"
    )
    chosen = {options.model: options.tokens} if options.model else CLAIMED
    for model, lengths in chosen.items():
        for n_tokens in lengths:
            report(model, n_tokens, options.repeats if n_tokens <= REPEATED_UP_TO else 1)


if __name__ == "__main__":
    main()
