"""The direction of imports: each room of the package builds on those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import secondary_sinks

PACKAGE = Path(secondary_sinks.__file__).parent
ORDER = ("base", "host", "loading", "planted", "observe", "sinks", "intervene", "analyses", "cli")
"""Rooms from the lowest to the highest; `base` is the modules at the root."""
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room_of(module: str) -> str:
    """`host` for `secondary_sinks.host.sites`, `base` for `secondary_sinks.errors`."""
    parts = module.split(".")[1:]
    return parts[0] if len(parts) > 1 else "base"


def imports_of(path: Path, *, at_the_top: bool) -> Iterator[str]:
    """The package's modules that a module imports; those for type checkers alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if at_the_top else ast.walk(tree):
        if id(node) in for_checkers or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "secondary_sinks":
            yield from (f"secondary_sinks.{alias.name}" for alias in node.names)
        elif node.module.startswith("secondary_sinks."):
            yield node.module


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_a_module_imports_only_rooms_below_its_own(path: Path) -> None:
    room = room_of(module_of(path))
    for imported in imports_of(path, at_the_top=False):
        if imported == "secondary_sinks.__version__":
            continue
        target = room_of(imported)
        if room == "plots":
            assert target in ("plots", "base", "sinks", "analyses"), imported
        elif target == "plots":
            assert room == "cli", f"{module_of(path)} imports {imported}"
        elif room != "base" or target != "base":
            assert ORDER.index(target) <= ORDER.index(room), imported


def test_no_two_modules_share_a_name() -> None:
    names = [path.name for path in MODULES]
    assert sorted(names) == sorted(set(names))


@pytest.mark.slow
def test_modules_import_each_other_in_no_circle() -> None:
    below = {module_of(path): set(imports_of(path, at_the_top=True)) for path in MODULES}
    while below:
        free = {module for module, needed in below.items() if not needed & set(below)}
        assert free, f"a circle among {sorted(below)}"
        below = {module: needed for module, needed in below.items() if module not in free}
