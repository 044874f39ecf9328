"""Settings of the documentation: `sphinx-build -W --keep-going docs docs/_build/html`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pygments.lexers.python import PythonLexer
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parent.parent))

import secondary_sinks

project = "secondary_sinks"
author = "secondary_sinks authors"
project_copyright = author
version = release = secondary_sinks.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
nitpicky = False

html_theme = "furo"
html_title = "secondary_sinks"
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "fieldlist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"  # docstrings write `name`, as Markdown does
python_use_unqualified_type_names = True


def _as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn docstrings, which are light Markdown, into reStructuredText.

    An indented block after an empty line is code (a Google section has no empty line after its
    title), and vertical bars outside of code are escaped.
    """
    rst: list[str] = []
    in_code = False
    for index, line in enumerate(lines):
        before = lines[index - 1] if index else ""
        indented = line.startswith("    ") or line.startswith(">>>")
        if in_code and line.strip() and not indented:
            in_code = False
        starts = line.startswith("    ") and not before.strip() and index > 1
        if starts and not in_code and not _inside_list_or_section(lines, index):
            rst += ["::", ""]
            in_code = True
        if not in_code and not line.lstrip().startswith((">>>", "...")):
            line = re.sub(r"(?<!\\)\|", r"\\|", _outside_code(line))
        rst.append(line.replace("\x00", "|"))
    lines[:] = rst


def _outside_code(line: str) -> str:
    """The line with the bars inside of backticks hidden."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\x00"), line)


def _inside_list_or_section(lines: list[str], index: int) -> bool:
    """Whether an indented line continues a list item or a Google section."""
    for line in reversed(lines[:index]):
        if line.strip() and not line.startswith(" "):
            return bool(re.match(r"(\*|-|\d+\.) |\w[\w ]*:$", line))
    return False


def _keep_colon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Hide colons in an attribute's first line: napoleon would read them as `type: text`."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", "\x01")


def _restore_colon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = [line.replace("\x01", ":") for line in lines]


def _short_signature(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    result: str | None,
) -> tuple[str | None, str | None]:
    """Show names without their modules; Sphinx fails to where a default is `<factory>`."""
    if signature and "<factory>" in signature:
        signature = re.sub(r"~(?:\w+\.)+", "", signature).replace("<factory>", "{}")
    return signature, result


def _without_overloads(analyze: Callable[[ModuleAnalyzer], None]) -> Callable[..., None]:
    """Show the function's own signature: overloads would hide the defaults of its arguments."""

    def analyzed(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads = {}

    return analyzed


def setup(app: Any) -> None:
    ModuleAnalyzer.analyze = _without_overloads(ModuleAnalyzer.analyze)
    app.add_lexer("python-norun", PythonLexer)
    app.connect("autodoc-process-signature", _short_signature)
    # Napoleon comes at 500.
    app.connect("autodoc-process-docstring", _as_rst, priority=400)
    app.connect("autodoc-process-docstring", _keep_colon, priority=410)
    app.connect("autodoc-process-docstring", _restore_colon, priority=600)
