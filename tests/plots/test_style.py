"""Tokens that can be read, colors that mean one thing, files that are whole."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import matplotlib
import pytest
from matplotlib.colors import to_rgb

import secondary_sinks as ss
from secondary_sinks.plots.style import (
    COLORS,
    add_panel,
    alive_spans,
    new_figure,
    save_figure,
    styled,
    visible,
)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", r"\n"),
        (" the", "·the"),
        ("\t\r", r"\t\r"),
        ("\\n", r"\\n"),
        ("·", r"\xb7"),
        ("\x00\x1b", r"\x00\x1b"),
        ("\ufffd", r"\ufffd"),
        ("\u200b", r"\u200b"),
        ("\u0301", r"\u0301"),
        ("é", "é"),
        ("你", r"\u4f60"),
        ("🙂", r"\U0001f642"),
        ("", "''"),
        ("$x_1$", "$x_1$"),
    ],
)
def test_every_character_of_a_token_can_be_seen(token, shown):
    assert visible(token) == shown


def test_a_terminal_keeps_what_the_figures_font_lacks():
    assert visible("你 ", any_glyph=True) == "你·"


def test_distinct_tokens_look_distinct():
    tokens = ["\n", "\\n", " ", "·", "\t", "\\t", "", "\x07", "\\x07"]
    assert len({visible(token) for token in tokens}) == len(tokens)


def test_a_cut_never_splits_an_escape():
    for limit in range(2, 14):
        shown = visible("ab你c你d", limit=limit)
        assert len(shown) <= limit
        assert visible("ab你c你d").startswith(shown.removesuffix("…"))
        assert shown.removesuffix("…").replace(r"\u4f60", "").isalpha()


def test_kinds_differ_in_lightness_or_hue_enough_to_tell_apart():
    def lightness(color):
        red, green, blue = to_rgb(color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len(set(COLORS.values())) == len(COLORS)
    assert lightness(COLORS["secondary"]) - lightness(COLORS["primary"]) > 0.05


def test_spans():
    assert alive_spans([9, 5, 6, 6]) == [(5, 7), (9, 10)]
    assert alive_spans([]) == []


def test_the_style_ends_with_its_block():
    before = dict(matplotlib.rcParams)
    with styled():
        assert matplotlib.rcParams["font.size"] == 8
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_figures_need_no_pyplot_and_are_freed(invented):
    code = (
        "import sys, secondary_sinks.plots.plot_sink_map, secondary_sinks.plots.plot_sink_levels\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    figure = invented(3).plot()
    gone = weakref.ref(figure)
    del figure
    gc.collect()
    assert gone() is None


def test_panels_stand_where_they_are_put():
    figure = new_figure(5, 4)
    box = add_panel(figure, 1, 0.5, 2, 1).get_position()
    assert (box.x0 * 5, box.x1 * 5) == pytest.approx((1, 3))
    assert ((1 - box.y1) * 4, (1 - box.y0) * 4) == pytest.approx((0.5, 1.5))


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_saving_writes_the_named_format_and_always_the_same(tmp_path, invented, ending, magic):
    figure = invented(2).plot()
    one = save_figure(figure, tmp_path / f"new/one.{ending}").read_bytes()
    two = save_figure(figure, tmp_path / f"two.{ending}").read_bytes()
    assert one.startswith(magic)
    assert one == two


def test_saving_where_nothing_can_be_written_says_so(tmp_path, invented):
    (tmp_path / "file").touch()
    with pytest.raises(ss.InputError, match="cannot write"):
        save_figure(invented(0).plot(), tmp_path / "file" / "x.png")
