"""Sink maps and sink levels as tables for a terminal.

One row is one life of one sink. What is written is what `SinkMap.to_frame` holds, in the colors of
the figures; a map without secondary sinks also gets the tokens that came nearest to being one, so
that "none found" can be judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secondary_sinks.errors import InputError
from secondary_sinks.plots.style import COLORS, alive_spans, visible
from secondary_sinks.sinks.levels import SinkLevels
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


def sink_table(sink_map: SinkMap, *, max_rows: int = 60) -> Table:
    """The sinks of one text, one row a life, by onset and position.

    The norm and its ratio to the median token's are those of the onset layer. The sink score is the
    mean attention drawn over the life; the last column sets it against what ordinary tokens nearby
    draw. It fits into 80 columns.
    """
    table = _empty_table(repr(sink_map))
    table.add_column("pos", justify="right", no_wrap=True)
    table.add_column("token", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for name in (
        "onset",
        "life-\ntime",
        "layers",
        "norm",
        "norm\n/median",
        "sink\nscore",
        "drawn\n/nearby",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for sink in sink_map.sinks[:max_rows]:
        table.add_row(*_cells(sink))
    left = len(sink_map.sinks) - max_rows
    if left > 0:
        table.caption = f"and {left} more"
    return table


def sink_report(sink_map: SinkMap, *, max_rows: int = 60) -> Group:
    """The table of a map, its notes and, without secondary sinks, what came nearest to one."""
    parts: list[RenderableType] = [sink_table(sink_map, max_rows=max_rows)]
    parts += [Text(f"Note: {note}", style="yellow") for note in sink_map.notes]
    if sink_map.undecided:
        places = ", ".join(str(sink.position) for sink in sink_map.undecided)
        parts.append(Text(f"Undecided, as no later token can attend to it: position {places}."))
    if not sink_map.secondary:
        parts.append(Text("No secondary sinks."))
        try:
            margins = sink_map.margins(5)
        except InputError:  # published records and the published criterion have none
            margins = None
        if margins is not None and len(margins):
            parts.append(_margins_table(margins.to_dict("records")))
    return Group(*parts)


def levels_table(levels: Sequence[SinkLevels]) -> Table:
    """The sink levels of one or several models, one row a level."""
    table = _empty_table("Sink levels: sinks that share an onset and, closely, a lifetime")
    table.add_column("model", overflow="fold")
    for name in ("onset", "lifetime", "sinks", "texts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tokens", overflow="fold")
    for own in levels:
        name = f"{own.provenance.model.name} ({own.n_texts} text{'' if own.n_texts == 1 else 's'})"
        for level in own.levels:
            shortest, longest = level.lifetimes
            spread = f" ({shortest}-{longest})" if shortest != longest else ""
            tokens = ", ".join(
                f"{visible(token, limit=16, any_glyph=True)} × {count}"
                for token, count in level.tokens[:5]
            )
            table.add_row(
                Text(name),
                str(level.onset),
                f"{level.lifetime}{spread}",
                str(level.n_sinks),
                str(level.n_texts),
                Text(tokens),
            )
        if not own.levels:
            table.add_row(Text(name), *"----", "no secondary sinks")
    return table


def texts_table(maps: Sequence[SinkMap], names: Sequence[str], *, max_rows: int = 60) -> Table:
    """One row a text: how long it is, how many sinks it has."""
    table = _empty_table("Sinks by text")
    for name in ("text", "tokens", "primary at", "phases", "secondary", "onsets"):
        table.add_column(name, justify="left" if name == "text" else "right", overflow="fold")
    for sink_map, name in zip(maps[:max_rows], names, strict=False):
        phases = ", ".join(_span((start, end)) for start, end in sink_map.phases) or "none"
        onsets = ", ".join(str(onset) for onset in sorted({s.l_start for s in sink_map.secondary}))
        table.add_row(
            Text(name),
            str(sink_map.n_tokens),
            str(sink_map.primary_position),
            phases,
            Text(
                str(len(sink_map.secondary)),
                style=COLORS["secondary"] if sink_map.secondary else "",
            ),
            onsets,
        )
    if len(maps) > max_rows:
        table.caption = f"and {len(maps) - max_rows} more"
    return table


def _empty_table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )


def _cells(sink: Sink) -> list[Text | str]:
    ratio = sink.evidence.norm_ratio[0] if sink.evidence else math.nan
    attention = sink.evidence.attention_ratio if sink.evidence else math.nan
    color = COLORS[sink.kind]
    return [
        str(sink.position),
        Text(visible(sink.token, limit=14, any_glyph=True), style=f"bold {color}"),
        Text(sink.kind, style=color),
        str(sink.l_start),
        str(sink.lifetime),
        ", ".join(_span(span) for span in alive_spans(sink.layers)),
        _number(sink.norm, ".0f"),
        _number(ratio, ".1f"),
        _number(sink.sink_score, ".3f"),
        _number(attention, ".0f"),
    ]


def _margins_table(rows: Sequence[Mapping[Any, Any]]) -> Table:
    table = _empty_table("Nearest to being one (each test over its threshold; 1 passes)")
    tests = ("alignment", "magnitude", "attention", "strength")
    for name in ("pos", "token", "layer", *tests, "failed"):
        table.add_column(name, justify="left" if name in ("token", "failed") else "right")
    for row in rows:
        table.add_row(
            str(row["position"]),
            Text(visible(str(row["token"]), limit=16, any_glyph=True)),
            str(row["layer"]),
            *(_number(float(row[k]), ".2f") for k in tests),
            str(row["failed"]),
        )
    return table


def _span(span: tuple[int, int]) -> str:
    start, end = span
    return f"{start}-{end - 1}" if end - start > 1 else str(start)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
