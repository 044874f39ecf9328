"""Run every benchmark in turn and write what they print to docs/performance.md.

    python benchmarks/performance.py [--only NAME ...]

With `--only` the other sections of the page stay as they are. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
ARGUMENTS = {"growth_of_rows": ["--out", str(HERE.parent / "docs" / "images")]}
HEAD = """# Performance

Every table on this page is the output of a script in `benchmarks/`; `make benchmarks` rewrites the
page. Compared sides run in turn, within one process or in separate ones, so that the drift of a
machine cancels. The numbers are those of the machine that each table names; a ratio carries over to
other machines better than a time. Nothing here was measured on a GPU.
"""


def section(script: Path) -> str:
    """The claim of a benchmark, how to run it, and its output."""
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    title, _, rest = docstring.partition("\n")
    about = rest.rsplit("\n\n    python", 1)[0].strip()
    command = [sys.executable, str(script), *ARGUMENTS.get(script.stem, [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figure = f"\n![{title}](images/{script.stem}.png)\n" if script.stem in ARGUMENTS else ""
    return (
        f"## {title.rstrip('.')}\n\n{about}\n\n`python benchmarks/{script.name}`\n\n"
        f"```text\n{done.stdout.strip()}\n```\n{figure}"
    )


def main() -> None:
    """Run the benchmarks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of scripts, without .py")
    options = parser.parse_args()
    scripts = sorted(path for path in HERE.glob("*.py") if path.stem != Path(__file__).stem)
    known = _sections(PAGE.read_text()) if PAGE.exists() else {}
    for script in scripts:
        if not options.only or script.stem in options.only:
            print(script.stem, flush=True)
            known[script.stem] = section(script)
            # After each, so that an interruption loses only one.
            ordered = [known[other.stem] for other in scripts if other.stem in known]
            PAGE.write_text("\n".join([HEAD, *ordered]))


def _sections(page: str) -> dict[str, str]:
    """The sections of a page by the script that wrote them."""
    parts = re.split(r"(?m)^(?=## )", page)[1:]
    named = {re.search(r"`python benchmarks/(\w+)\.py`", part): part for part in parts}
    return {match[1]: part.rstrip("\n") + "\n" for match, part in named.items() if match}


if __name__ == "__main__":
    main()
