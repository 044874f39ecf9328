"""Run the Python of a documentation page, and compare what it prints with what the page shows.

The ``python`` blocks of a Markdown page run in order, in one namespace, like the cells of a
notebook: the output of a block is what it prints and the value of its last expression. A ``text``
block right after a ``python`` block shows that output. ``python-norun`` blocks are not run.

    python docs/pages.py [page ...]      # bring the shown outputs up to date
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<shown>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One piece of Python of a page."""

    line: int
    """Line of the page on which it begins."""
    code: str
    shown: str | None
    """The output that the page shows, if it shows one."""


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are run, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 2
        yield Block(line, match["code"], match["shown"])


def run(block: Block, namespace: dict[str, Any], page: Path) -> str:
    """Run one block in `namespace` and return its output."""
    # Empty lines in front let a traceback name the line of the page.
    tree = ast.parse("\n" * (block.line - 1) + block.code, filename=str(page))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(tree, str(page), "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(page), "eval"), namespace)
            if value is not None:
                output.write(_shown(value) + "\n")
    return output.getvalue()


def run_page(page: Path) -> dict[str, Any]:
    """Run all blocks of a page and return the names that they defined."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        run(block, namespace, page)
    return namespace


def differences(shown: str, output: str) -> list[str]:
    """Lines in which the output differs from what the page shows.

    Blanks do not count, and a number with a decimal point may differ by one in its last digit or by
    one per cent, because processors add up in different orders.
    """
    expected = [" ".join(line.split()) for line in shown.splitlines() if line.strip()]
    actual = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    wrong = [
        f"shown {line!r}, got {got!r}"
        for line, got in zip(expected, actual, strict=False)
        if not _alike(line, got)
    ]
    if len(expected) != len(actual):
        wrong.append(f"{len(expected)} lines shown, got {len(actual)}")
    return wrong


def _alike(shown: str, output: str) -> bool:
    if _NUMBER.sub("#", shown) != _NUMBER.sub("#", output):
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(output), strict=True)
    return all(number == got or _close(number, got) for number, got in pairs)


def _close(shown: str, output: str) -> bool:
    if "." not in shown or "." not in output:
        return False
    digits = len(shown.partition(".")[2].partition("e")[0])
    allowed = max(1.01 * 10**-digits, 0.01 * abs(float(shown)))
    return abs(float(shown) - float(output)) <= allowed


def _shown(value: Any) -> str:
    import pandas as pd

    if isinstance(value, (pd.DataFrame, pd.Series)):
        return value.to_string(float_format=lambda number: f"{number:.3g}")
    return repr(value)


def updated(page: Path) -> str:
    """The page's text with the outputs that its blocks give now."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parts: list[str] = []
    position = 0
    for block, match in zip(blocks(page), _BLOCK.finditer(text), strict=True):
        output = run(block, namespace, page)
        if block.shown is not None:
            parts += [text[position : match.start("shown")], output.rstrip() + "\n"]
            position = match.end("shown")
    return "".join([*parts, text[position:]])


if __name__ == "__main__":
    import os
    import sys
    import tempfile

    pages = [Path(name).absolute() for name in sys.argv[1:]] or PAGES
    os.chdir(tempfile.mkdtemp())  # for the files that pages write
    for page in pages:
        page.write_text(updated(page), encoding="utf-8")
