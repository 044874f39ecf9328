"""Time of an import, of `--help` and of loading a cached model, over what cannot be avoided.

Claims: importing the package costs a few hundredths of a second over an interpreter that does
nothing, and `secondary-sinks --help` less than a fifth, because nothing heavy is imported before it
is used; a cached model of half a billion parameters is ready in less than three seconds, imports
aside, which is little more than reading the same folder with Hugging Face alone.

Every side is a separate process; the sides take turns, and the shortest time of each counts,
because the first reads its files from disk and later ones from the system's cache. A ratio is to
the side named after it. Loading twice in one process leaves imports out.

    python benchmarks/loading.py [--model qwen2.5-coder-0.5b] [--repeats 5]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from importlib.metadata import version

HUGGING_FACE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({folder!r})
AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="eager")
"""
LOAD = "import secondary_sinks\nsecondary_sinks.load_model({model!r}, progress=False)"
AGAIN = """
import time
{load}
began = time.perf_counter()
{load}
print(time.perf_counter() - began)
"""
HELP = """
import sys
from secondary_sinks.cli.app import main
sys.argv = ["secondary-sinks", "--help"]
main()
"""

PASS = "python -c pass"
LIBRARIES = "import torch, transformers, transformer_lens"
READ = "the same, and read the folder with transformers"
READ_AGAIN = "read it once more in the same process"


def sides(model: str, folder: str) -> dict[str, tuple[str, str]]:
    """Code of each side, and the side that it is compared with."""
    read = HUGGING_FACE.format(folder=folder)
    load = LOAD.format(model=model)
    return {
        PASS: ("pass", PASS),
        "import secondary_sinks": ("import secondary_sinks", PASS),
        "secondary-sinks --help": (HELP, PASS),
        LIBRARIES: (LIBRARIES, PASS),
        READ: (LIBRARIES + read, LIBRARIES),
        f"load_model({model!r})": (load, READ),
        READ_AGAIN: (AGAIN.format(load=read), READ_AGAIN),
        "load_model once more in the same process": (AGAIN.format(load=load), READ_AGAIN),
    }


def seconds(code: str) -> float:
    """Wall time of a new interpreter that runs `code`, or the time that `code` prints of a part."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    took = time.perf_counter() - began
    return float(done.stdout) if "time.perf_counter" in code else took


def main() -> None:
    """Measure all sides in turn and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="An alias that needs no hub.")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    from secondary_sinks.loading.fetch import fetch

    folder = str(fetch(options.model, None, False))  # in the cache from now on
    compared = sides(options.model, folder)
    times: dict[str, list[float]] = {side: [] for side in compared}
    for _ in range(options.repeats):  # interleaved, so that drift of the machine cancels
        for side, (code, _) in compared.items():
            times[side].append(seconds(code))
    shortest = {side: min(runs) for side, runs in times.items()}
    packages = ("torch", "transformers", "transformer-lens")
    print(f"shortest of {options.repeats}; {platform.machine()}, Python", end=" ")
    print(platform.python_version(), *(f"{name} {version(name)}" for name in packages), sep=", ")
    print(f"{'':<50}{'seconds':>9}{'ratio':>8}   to")
    for side, (_, base) in compared.items():
        ratio = shortest[side] / shortest[base]
        print(f"{side:<50}{shortest[side]:>9.2f}{ratio:>8.2f}   {base}")


if __name__ == "__main__":
    main()
