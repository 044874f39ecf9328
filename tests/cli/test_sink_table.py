"""Tables for the terminal: every sink, readable tokens, and what was missed."""

from __future__ import annotations

import dataclasses
import io

import secondary_sinks as ss
from secondary_sinks.cli.sink_table import levels_table, sink_report, sink_table, texts_table
from secondary_sinks.plots.style import COLORS


def printed(renderable, width=80, **kwargs):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, **kwargs)
    console.print(renderable)
    return console.file.getvalue()


def rows(text):
    """The words of every line that begins with a position; a title's second line may, too."""
    lines = [line.split() for line in text.splitlines()]
    return [words for words in lines if len(words) > 5 and words[0].isdigit()]


def test_one_row_a_life_with_the_numbers_of_the_frame(invented):
    sinks = invented(3, primary_lives=((1, 6), (10, 20)))
    found = rows(printed(sink_table(sinks)))
    assert len(found) == 5
    for row, (_, entry) in zip(found, sinks.to_frame().iterrows(), strict=True):
        assert row[0] == str(entry.position)
        assert row[2:6] == [
            entry.kind,
            str(entry.onset),
            str(entry.lifetime),
            f"{entry.onset}-{entry.last_layer}",
        ]
        assert row[6:] == [
            f"{entry.norm:.0f}",
            f"{entry.norm_ratio:.1f}",
            f"{entry.sink_score:.3f}",
            f"{entry.attention_ratio:.0f}",
        ]


def test_it_fits_into_80_columns_uncut(invented):
    text = printed(sink_table(invented(5, 16_000)))
    assert max(map(len, text.splitlines())) <= 80
    assert "secondary" in text
    assert "8-17" in text
    # Only long tokens are cut, by their own limit.
    assert all(line.count("…") <= 1 for line in text.splitlines())


def test_tokens_are_visible_and_no_markup(invented):
    sinks = invented(1)
    odd = dataclasses.replace(sinks.sinks[1], token="[bold]\n")
    text = printed(sink_table(dataclasses.replace(sinks, sinks=(sinks.sinks[0], odd))))
    assert "[bold]\\n" in text
    assert rows(text)[0][1] == "\\n"


def test_kinds_have_the_colors_of_the_figures(invented):
    text = printed(sink_table(invented(1)), force_terminal=True, color_system="truecolor")
    for kind in ("primary", "secondary"):
        red, green, blue = bytes.fromhex(COLORS[kind][1:])
        assert f"38;2;{red};{green};{blue}m{kind}" in text


def test_long_lists_are_cut_and_say_so(invented):
    text = printed(sink_table(invented(70), max_rows=60))
    assert len(rows(text)) == 60
    assert "and 11 more" in text


def test_without_secondary_sinks_the_nearest_misses_are_listed(invented):
    sinks = invented(0)
    text = printed(sink_report(sinks))
    assert "No secondary sinks." in text
    nearest = sinks.margins(5)
    listed = [row[0] for row in rows(text)[1:]]
    assert listed == [str(position) for position in nearest.position]
    assert "No secondary" not in printed(sink_report(invented(1)))


def test_published_maps_have_no_numbers_and_no_misses(published):
    text = printed(sink_report(published))
    assert "16-18, 21-22" in text
    assert rows(text)[1][-4:] == ["-"] * 4
    alone = dataclasses.replace(published, sinks=published.sinks[:1])
    assert "No secondary sinks." in printed(sink_report(alone))


def test_notes_are_printed(invented):
    noted = dataclasses.replace(invented(1), notes=("weights are not raw",))
    assert "Note: weights are not raw" in printed(sink_report(noted))


def test_levels_and_texts(invented):
    maps = [invented(3), invented(0)]
    text = printed(levels_table([ss.sink_levels(maps), ss.sink_levels(maps[1])]), width=120)
    assert "8 10 " in " ".join(text.split())
    assert "no secondary sinks" in text
    listed = printed(texts_table(maps, ["one", "two"]))
    line = next(line.split() for line in listed.splitlines() if line.startswith("one"))
    assert line == ["one", "400", "0", "2-21", "3", "8"]
    assert "and 1 more" in printed(texts_table(maps, ["one", "two"], max_rows=1))
