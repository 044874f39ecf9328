"""One style for all figures and tables: colors, sizes, and legible tokens.

A kind of token has one color, defined here, in every figure. The colors are three of Okabe and
Ito's, which remain distinct for color-blind readers and in gray print; ordinary tokens are gray.

    >>> COLORS["secondary"]
    '#D55E00'
    >>> visible("\\n You")
    '\\\\n·You'

Figures are made without pyplot: they need no window or backend, and are freed when the caller drops
them. Sizes are in inches and points, for print at that size: no text is smaller than 7 points, and
panels are placed explicitly (`add_panel`) so that labels do not overlap with longer texts or deeper
models.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secondary_sinks.errors import InputError
from secondary_sinks.storage import write_atomically

COLORS: dict[str, str] = {
    "primary": "#0072B2",
    "secondary": "#D55E00",
    "noise": "#CC79A7",
    "ordinary": "#7A7A7A",
}
"""Color of each kind of token, in every figure and table."""

ALIVE = "#FBE6D8"
"""Shading of the layers in which secondary sinks live: a light tint of their color."""

SMALL = 7.0
"""Size of the smallest text in points."""

_MONO_WIDTH = 0.602  # of the font size, for every character of DejaVu Sans Mono

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # editable text, which journals ask for
    "ps.fonttype": 42,
    "svg.fonttype": "none",
}

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", " ": "·", "·": "\\xb7"}


def styled() -> AbstractContextManager[None]:
    """Context in which figures are made and saved in the style of the library."""
    return matplotlib.rc_context(_RC)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    return Figure(figsize=(width, height), dpi=150, facecolor="white")


def add_panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a position in inches, from the figure's left and top edges."""
    full_width, full_height = figure.get_size_inches()
    bottom = full_height - top - height
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height)
    )


def check_panel(panel: float) -> None:
    """Raise `InputError` for a panel size, in inches, that is not above 0."""
    if not panel > 0:
        raise InputError(f"panel is {panel} inches; it must be above 0")


def add_legend(
    figure: Figure,
    handles: Sequence[Artist],
    left: float,
    top: float = 0.08,
    *,
    ncols: int,
    handlelength: float = 1.4,
) -> None:
    """A legend at a place given in inches, from the figure's left and top edges."""
    width, height = figure.get_size_inches()
    figure.legend(
        handles=list(handles),
        loc="upper left",
        bbox_to_anchor=(left / width, 1 - top / height),
        ncols=ncols,
        borderpad=0,
        borderaxespad=0,
        handlelength=handlelength,
        columnspacing=1.2,
    )


def mlp_names(layers: Iterable[int]) -> str:
    """The MLPs of at most three layers by name: "MLP 3, 5, 6 ..."."""
    unique = sorted(set(layers))
    return f"MLP {', '.join(map(str, unique[:3]))}{' ...' if len(unique) > 3 else ''}"


def save_figure(figure: Figure, path: str | Path, *, dpi: float = 200) -> Path:
    """Write a figure in the format of the file's suffix (png, pdf, svg).

    Raises:
        InputError: the folder cannot be written to.
    """
    # Without the date, two runs write the same bytes.
    dated = {".pdf": "CreationDate", ".svg": "Date"}.get(Path(path).suffix.lower())
    metadata = {dated: None} if dated else None

    def write(part: Path) -> None:
        with styled():
            figure.savefig(part, dpi=dpi, metadata=metadata)

    return write_atomically(path, write)


def visible(token: str, *, limit: int | None = None, any_glyph: bool = False) -> str:
    """Spell a token so that every character of it can be seen.

    A space becomes `·`; newlines, tabs, other control characters, lone combining marks and
    undecodable bytes become escapes (`\\n`, `\\x1b`, `\\ufffd`); a backslash is doubled, so that a
    newline and the two characters of LaTeX's `\\n` differ.

    Args:
        token: the token's string.
        limit: cut to at most this many characters, the last of them `…`.
        any_glyph: keep characters that the figures' font cannot draw, such as Chinese ones, for a
            terminal; in figures they would be empty boxes and become `\\u4f60`.
    """
    if not token:
        return "''"
    shown = [_visible_character(character, any_glyph) for character in token]
    if limit is not None and sum(map(len, shown)) > limit:
        while sum(map(len, shown)) > limit - 1:  # whole escapes only
            shown.pop()
        shown.append("…")
    return "".join(shown)


def text_width(text: str, size: float = SMALL) -> float:
    """Width in inches of `text` set in the fixed-width font of the token labels."""
    return len(text) * _MONO_WIDTH * size / 72


def alive_spans(layers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs [start, end) of consecutive layers.

    >>> alive_spans([5, 6, 9])
    [(5, 7), (9, 10)]
    """
    spans: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if spans and spans[-1][1] == layer:
            spans[-1] = (spans[-1][0], layer + 1)
        else:
            spans.append((layer, layer + 1))
    return spans


def _visible_character(character: str, any_glyph: bool) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    drawable = any_glyph or ord(character) in _font_characters()
    combining = unicodedata.category(character).startswith("M")
    if character.isprintable() and character != "\ufffd" and not combining and drawable:
        return character
    code = ord(character)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


@functools.cache
def _font_characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    # The copy that matplotlib ships is the same on every machine.
    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())
