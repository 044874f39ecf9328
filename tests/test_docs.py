"""The documentation: its Python runs, its outputs and tables are true, and Sphinx builds it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parent.parent / "docs"


def _module(name: str) -> ModuleType:
    """A script of the documentation, which is no package."""
    sys.path.insert(0, str(DOCS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(DOCS))


pages = _module("pages")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_gives_the_output_that_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in pages.blocks(page):
        output = pages.run(block, namespace, page)
        if block.shown is not None:
            wrong = pages.differences(block.shown, output)
            assert not wrong, f"{page.name}, line {block.line}: {wrong}"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_every_python_fence_of_a_page_is_found(page: Path) -> None:
    fences = re.findall(r"^```python$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(list(pages.blocks(page))) == len(fences)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_pictures_and_tables_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)|\{literalinclude\} (\S+)", text)
    for name in ("".join(pair) for pair in named):
        assert (page.parent / name).is_file(), name
        assert (page.parent / name).stat().st_size < 200_000, name


def test_the_tables_of_the_larger_model_are_what_it_gives(qwen: Any) -> None:
    tables = _module("figures").measured(qwen)
    assert {path.stem for path in (DOCS / "measured").iterdir()} == set(tables)
    for name, table in tables.items():
        shown = (DOCS / "measured" / f"{name}.txt").read_text(encoding="utf-8")
        assert not pages.differences(shown, table), name


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        ("norm 1.63e+03 at 4", "norm  1.64e+03  at 4\n", True),
        ("score 0.118", "score 0.119", True),
        ("score 0.118", "score 0.125", False),
        ("layers 5", "layers 6", False),
        ("'a' 1.0", "'b' 1.0", False),
        ("one", "one\ntwo", False),
    ],
)
def test_outputs_are_compared_up_to_rounding(shown: str, output: str, same: bool) -> None:
    assert (not pages.differences(shown, output)) == same
