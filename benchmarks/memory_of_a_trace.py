"""Peak memory of one observed pass, over a plain forward pass, against `run_with_cache`.

Claim: collecting residual norms, alignment, sink scores, key, value, MLP and attention norms and
massive activations of every layer and head costs less than 150 MB above a plain forward pass at
512 tokens of Qwen2.5-0.5B, where `run_with_cache` keeps some 4 GB.

Each side runs in a process of its own, one after the other, and reports the growth of its peak
resident memory over what it had with the model loaded and warmed up on two tokens. The C library is
told to give freed tensors back at once (`MALLOC_MMAP_THRESHOLD_`); what it would otherwise keep for
later differs by hundreds of megabytes from run to run.

    python benchmarks/memory_of_a_trace.py [--model qwen2.5-coder-0.5b] [--tokens 512] [--repeats 3]
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
from importlib.metadata import version

SIDES = {
    "plain forward": "the last position's logits only, no key-value cache",
    "trace": "all built-in collectors",
    "run_with_cache": "TransformerLens keeps every activation",
}


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str, model_name: str, n_tokens: int) -> None:
    """Print growth of the peak in MB and seconds of one side."""
    import torch

    import secondary_sinks as ss

    model = ss.load_model(model_name, progress=False)
    tokens = torch.arange(1000, 1000 + n_tokens)[None]
    collectors = [
        ss.ResidualNorms(),
        ss.ResidualGeometry(),
        ss.SinkScores(),
        ss.SinkScores("gu", name="gu"),
        ss.MassiveActivations(),
        *(ss.Norms(site) for site in ("k", "v", "mlp_out", "attn_out")),
    ]

    def run(these: torch.Tensor) -> object:
        with torch.no_grad():
            if side == "plain forward":
                return model(these, return_type=None, use_cache=False, logits_to_keep=1)
            if side == "trace":
                return ss.trace(model, these, collectors)
            return model.run_with_cache(these, return_type=None)

    run(tokens[:, :2])
    # Weights are mapped from disk and become resident when first read: read them all now.
    touched = sum(float(p.sum()) for p in model.parameters())
    before, began = peak_megabytes(), time.perf_counter()
    kept = run(tokens)
    print(peak_megabytes() - before, time.perf_counter() - began, touched != 0, type(kept).__name__)


def main() -> None:
    """Measure all sides in turn and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options.side, options.model, options.tokens)
        return
    import torch
    import transformers

    runs: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):  # interleaved, so that drift of the machine cancels
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--model", options.model]
            command += ["--tokens", str(options.tokens)]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            memory, seconds = output.split()[:2]
            runs[side].append((float(memory), float(seconds)))
    plain = statistics.median(memory for memory, _ in runs["plain forward"])
    print(f"{options.model}, {options.tokens} tokens, median of {options.repeats} runs")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"transformer-lens {version('transformer-lens')}"
    )
    print(f"{'':<16}{'peak MB':>10}{'above plain MB':>16}{'seconds':>10}")
    for side, what in SIDES.items():
        memory = statistics.median(m for m, _ in runs[side])
        seconds = statistics.median(s for _, s in runs[side])
        print(f"{side:<16}{memory:>10.0f}{memory - plain:>16.0f}{seconds:>10.2f}   {what}")


if __name__ == "__main__":
    main()
