"""Make every picture of the documentation and README, and the tables measured on a larger model.

    python docs/figures.py            # downloads the models on first use, then takes about a minute

Pictures go to `docs/images`, tables to `docs/measured`, which the pages include. The sentences of
the pages about them were read off these.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pages
from matplotlib.figure import Figure

import secondary_sinks as ss
from secondary_sinks.cli.detect import DEMO_MODEL, DEMO_TOKENS, demo_messages
from secondary_sinks.plots.sink_curves import (
    CURVES_HEIGHT,
    draw_legend,
    draw_norms,
    draw_scores,
    legend_height,
)
from secondary_sinks.plots.style import add_panel, new_figure, save_figure, styled

DOCS = Path(__file__).parent
PLAIN_TEXT = (
    "The river rises in the hills above the old town and runs past the mill, the church and the "
    "market square. In spring the water is high, and the children are told to keep away from the "
    "banks. The fishermen know the deep places, and the ferryman knows the currents. When the snow "
    "melts, the mill turns day and night, and the whole valley hears it."
)
"""The text of the comparison with and without a prepended token."""


def main() -> None:
    """Write all pictures and tables."""
    model = ss.load_model(DEMO_MODEL, progress=False)
    demo = ss.detect_sinks(model, demo_messages(), max_tokens=DEMO_TOKENS)
    _save("demo", demo.plot())
    _save("curves", curves(demo))
    for name, table in measured(model, demo).items():
        (DOCS / "measured" / f"{name}.txt").write_text(table, encoding="utf-8")
    os.chdir(tempfile.mkdtemp())  # for the files that pages write
    start = pages.run_page(DOCS / "start.md")
    _save("smollm", first_map(start).plot())
    _save("levels", start["levels"].plot())
    _save("planted", first_map(pages.run_page(DOCS / "planted.md")).plot())


def first_map(names: dict[str, Any]) -> ss.SinkMap:
    """The first sink map that a page makes."""
    return next(value for value in names.values() if isinstance(value, ss.SinkMap))


def measured(model: Any, demo: ss.SinkMap | None = None) -> dict[str, str]:
    """The tables that are measured on Qwen2.5-Coder-0.5B-Instruct, by name."""
    if demo is None:
        demo = ss.detect_sinks(model, demo_messages(), max_tokens=DEMO_TOKENS)
    return {
        "demo": demo_table(demo),
        "published_labels": published_table(model),
        "bos": bos_table(model),
    }


def demo_table(demo: ss.SinkMap) -> str:
    """The sinks of the demo's conversation."""
    frame = demo.to_frame().drop(
        columns=["token_id", "last_layer", "norm_ratio", "delay", "published_kind"]
    )
    frame["token"] = frame["token"].map(repr)
    return f"{demo}\n\n{_table(frame)}\n"


def published_table(model: Any) -> str:
    """The same conversation by the published criterion."""
    sink_map = ss.detect_sinks(
        model, demo_messages(), max_tokens=DEMO_TOKENS, criterion="published"
    )
    frame = sink_map.to_frame()[["position", "token", "kind", "onset", "lifetime"]]
    frame["token"] = frame["token"].map(repr)
    return f"{sink_map}\n\n{_table(frame)}\n"


def bos_table(model: Any) -> str:
    """The first token of a plain text with and without a prepended BOS token."""
    import pandas as pd

    rows = []
    for prepend_bos in (None, True):
        sink_map = ss.detect_sinks(model, PLAIN_TEXT, prepend_bos=prepend_bos)
        first = sink_map.norm[:, 0]
        phases = " ".join(f"{start}-{end - 1}" for start, end in sink_map.phases)
        rows.append(
            {
                "prepend_bos": str(prepend_bos),
                "first token": repr(sink_map.token_strings[0]),
                "phases": phases or "none",
                "norm 2": float(first[2]),
                "norm 10": float(first[10]),
                "norm 20": float(first[20]),
                "median 10": float(sink_map.norm[10].median()),
                "attention ratio 3-22": float(sink_map.attention_ratio[3:23, 0].mean()),
            }
        )
    return _table(pd.DataFrame(rows)) + "\n"


def curves(sink_map: ss.SinkMap) -> Figure:
    """Sink scores and residual norms by layer, larger than in the sink map."""
    width, panel, left = 7.0, 2.7, 0.6
    top = 0.35
    below = top + CURVES_HEIGHT * 1.25 + 0.5
    with styled():
        figure = new_figure(width, below + legend_height(sink_map, width) + 0.1)
        draw_scores(add_panel(figure, left, top, panel, CURVES_HEIGHT * 1.25), sink_map)
        second = left + panel + 0.75
        draw_norms(add_panel(figure, second, top, panel, CURVES_HEIGHT * 1.25), sink_map)
        draw_legend(figure, sink_map, left=left, top=below)
    return figure


def _save(name: str, figure: Figure) -> None:
    save_figure(figure, DOCS / "images" / f"{name}.png", dpi=150)


def _table(frame: Any) -> str:
    text: str = frame.to_string(index=False, float_format=lambda number: f"{number:.3g}")
    return text


if __name__ == "__main__":
    main()
