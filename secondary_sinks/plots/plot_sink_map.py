"""The sinks of one text in one picture.

From top to bottom:

* *lives*: one column for each token that is a sink, evenly spaced however close the tokens stand in
  the text, and in it a bar over the layers in which it is one. Thin lines lead from each column to
  the token's place in the text;
* *the text*: position by layer, how much attention each token draws (as a multiple of what ordinary
  tokens nearby draw) or how well its residual is aligned with the primary sink's. Sinks are dark
  vertical streaks. Of long texts each column of the picture shows the largest of the values that it
  stands for, so that no sink is lost between pixels;
* *sink score by layer*, primary against secondary: where secondary sinks live (shaded), the primary
  weakens;
* *residual norm by layer*, on a logarithmic scale, with the band of ordinary tokens.

A residual after block l shows in the attention of block l + 1, so the shading in the third panel
stands one layer to the right of that in the fourth. A map that was read from published records has
no arrays; of it only the lives are drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from einops import reduce
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.plots.sink_curves import (
    CURVES_HEIGHT,
    draw_legend,
    draw_norms,
    draw_scores,
    legend_height,
)
from secondary_sinks.plots.style import (
    COLORS,
    SMALL,
    add_panel,
    alive_spans,
    new_figure,
    styled,
    text_width,
    visible,
)
from secondary_sinks.result import counted
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

Shade = Literal["attention", "alignment"]

_LEFT, _RIGHT = 0.55, 0.68  # margins in inches; the color bar stands in the right one
_LINE = SMALL * 1.25 / 72  # height of a line of small text
_UPRIGHT = SMALL * 1.12 / 72  # width of an upright label
_TOKEN_LIMIT = 14  # characters of a token in a label
_MAX_COLUMNS = 600  # of the heat map: about what a page shows apart


def plot_sink_map(sink_map: SinkMap, *, shade: Shade = "attention", width: float = 7.0) -> Figure:
    """Picture of the sinks of one text: lives, attention, sink scores and norms.

    Args:
        sink_map: measured (`detect_sinks`), or read (`read_published`: only its lives are drawn).
        shade: what the heat map shows: "attention" (drawn, over that of ordinary tokens nearby) or
            "alignment" (cosine with the primary's residual, without the common component where the
            map has it).
        width: of the figure in inches, from 3.4 (one column of a paper) on. Text keeps its size.

    Returns:
        A matplotlib `Figure`; `figure.savefig("sinks.pdf")` writes it.

    Raises:
        InputError: an unknown `shade`, or a width below 3.
    """
    if shade not in ("attention", "alignment"):
        raise InputError(f"no shade {shade!r}; use 'attention' or 'alignment'")
    if not width >= 3:
        raise InputError(f"width is {width} inches; a readable figure needs 3 or more")
    plan = _Plan.of(sink_map, width)
    with styled():
        figure = new_figure(width, plan.height)
        figure.text(
            _LEFT / width,
            1 - 0.16 / plan.height,
            "\n".join(plan.title),
            va="top",
            fontsize=8,
            parse_math=False,
        )
        _draw_lives(figure, sink_map, plan)
        _draw_text(figure, sink_map, plan, shade)
        for draw, (left, top) in zip((draw_scores, draw_norms), plan.lower, strict=False):
            draw(add_panel(figure, left, top, plan.lower_width, CURVES_HEIGHT), sink_map)
        draw_legend(figure, sink_map, left=_LEFT, top=plan.legend_top)
        if plan.footnote:
            bottom = 0.08 / plan.height
            note = "\n".join(plan.footnote)
            figure.text(_LEFT / width, bottom, note, fontsize=SMALL, va="bottom", parse_math=False)
    return figure


@dataclass(frozen=True)
class _Column:
    """One token that is a sink, with all its lives."""

    position: int
    lives: tuple[Sink, ...]
    label: str

    @property
    def color(self) -> str:
        kinds = {sink.kind for sink in self.lives}
        return COLORS[next(kind for kind in ("primary", "secondary", "noise") if kind in kinds)]

    @property
    def strength(self) -> tuple[bool, float, int]:
        """What is labeled first: the primary, then whoever draws most attention, lives longest."""
        scores = [sink.sink_score for sink in self.lives if not math.isnan(sink.sink_score)]
        is_primary = any(sink.kind == "primary" for sink in self.lives)
        return is_primary, max(scores, default=0.0), sum(sink.lifetime for sink in self.lives)


@dataclass(frozen=True)
class _Plan:
    """Where everything stands, in inches from the left and top edges."""

    columns: tuple[_Column, ...]
    labeled: tuple[int, ...]
    """Which columns have a label."""
    upright: bool
    """Whether labels are turned by 90 degrees."""
    n_layers: int
    measured: bool
    title: tuple[str, ...]
    footnote: tuple[str, ...]
    panel_width: float
    lives_top: float
    text_top: float
    text_height: float
    lower: tuple[tuple[float, float], ...]
    lower_width: float
    legend_top: float
    height: float

    lives_height = 1.5
    gap = 0.3
    """Height of the lines that lead from the lives to the text."""

    @classmethod
    def of(cls, sink_map: SinkMap, width: float) -> _Plan:
        columns = _columns(sink_map)
        panel = width - _LEFT - _RIGHT
        widest = max((text_width(column.label) for column in columns), default=0.0)
        # Flat labels have two lines: the token, and its position below.
        flat = max((text_width(part) for c in columns for part in c.label.split(" ")), default=0.0)
        upright = len(columns) * (flat + 0.06) > panel
        labeled = _labeled(columns, panel, _UPRIGHT if upright else flat)
        measured = sink_map.norm is not None and sink_map.sink_score is not None
        title = _wrap(_title(sink_map), panel + _RIGHT)
        lives_top = 0.2 + 0.14 * len(title) + 0.1
        if columns:
            lives_top += (widest if upright else 2 * _LINE) + 0.06
        text_top = lives_top + cls.lives_height + cls.gap
        tokens_named = measured and _names_tokens(sink_map, panel)
        text_height = 1.4 if measured else 0.12
        below = text_top + text_height + 0.4
        if tokens_named:
            below += max(text_width(_token_name(token)) for token in sink_map.token_strings) - 0.25
        side_by_side = width >= 5
        lower_width = (width - 2 * _LEFT - 0.35) / 2 if side_by_side else width - _LEFT - 0.15
        lower: tuple[tuple[float, float], ...] = ()
        if measured:
            second = (2 * _LEFT + 0.2 + lower_width, below + 0.25)
            if not side_by_side:
                second = (_LEFT, below + 0.25 + CURVES_HEIGHT + 0.7)
            lower = ((_LEFT, below + 0.25), second)
            below = second[1] + CURVES_HEIGHT + 0.45
        footnote = [*sink_map.notes]
        if len(labeled) < len(columns):
            footnote.append(f"labels: the {len(labeled)} strongest of {len(columns)} tokens")
        lines = tuple(line for note in footnote for line in _wrap(note, width - _LEFT - 0.15))
        return cls(
            columns=columns,
            labeled=labeled,
            upright=upright,
            n_layers=_depth(sink_map),
            measured=measured,
            title=title,
            footnote=lines,
            panel_width=panel,
            lives_top=lives_top,
            text_top=text_top,
            text_height=text_height,
            lower=lower,
            lower_width=lower_width,
            legend_top=below,
            height=below + legend_height(sink_map, width) + len(lines) * _LINE + 0.12,
        )


def _columns(sink_map: SinkMap) -> tuple[_Column, ...]:
    lives: dict[int, list[Sink]] = {}
    for sink in sink_map.sinks:
        lives.setdefault(sink.position, []).append(sink)
    return tuple(
        _Column(position, tuple(own), f"{_token_name(own[0].token)} {position}")
        for position, own in sorted(lives.items())
    )


def _token_name(token: str) -> str:
    return visible(token, limit=_TOKEN_LIMIT)


def _labeled(columns: Sequence[_Column], panel: float, needed: float) -> tuple[int, ...]:
    """Columns that get a label: the strongest first, as long as none comes too close to another."""
    if not columns:
        return ()
    least = math.ceil(needed * len(columns) / panel)  # in columns
    chosen: list[int] = []
    for index in sorted(range(len(columns)), key=lambda i: columns[i].strength, reverse=True):
        if all(abs(index - other) >= least for other in chosen):
            chosen.append(index)
    return tuple(sorted(chosen))


def _wrap(text: str, width: float) -> tuple[str, ...]:
    """Lines of small text; 0.52 of the size is a generous mean width of proportional letters."""
    return tuple(textwrap.wrap(text, max(20, int(width / (0.56 * 8 / 72))))) or ("",)


def _title(sink_map: SinkMap) -> str:
    primary = counted(len({sink.position for sink in sink_map.primary}), "primary sink")
    secondary = counted(len(sink_map.secondary), "secondary sink")
    return f"{sink_map.model_name}: {sink_map.n_tokens} tokens, {primary}, {secondary}"


def _depth(sink_map: SinkMap) -> int:
    if sink_map.norm is not None:
        return int(sink_map.norm.shape[0])
    seen = max((sink.layers[-1] for sink in sink_map.sinks), default=0) + 1
    return int(sink_map.n_layers or seen)


def _names_tokens(sink_map: SinkMap, panel: float) -> bool:
    return 0 < len(sink_map.token_strings) * _LINE <= panel


def _draw_lives(figure: Figure, sink_map: SinkMap, plan: _Plan) -> None:
    axes = add_panel(figure, _LEFT, plan.lives_top, plan.panel_width, plan.lives_height)
    axes.set_label("lives")
    n = max(len(plan.columns), 1)
    # At most a quarter of an inch wide: two sinks should not look like two walls.
    half = min(0.36, 0.1 * n / plan.panel_width)
    for index, column in enumerate(plan.columns):
        for sink in column.lives:
            axes.add_patch(_life_bar(sink, index, half))
    axes.set(xlim=(-0.5, n - 0.5), ylim=(-0.5, plan.n_layers - 0.5), ylabel="alive after layer")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    _label_columns(axes, plan)
    if not sink_map.secondary:
        text = "no secondary sinks" if plan.columns else "no sinks"
        place = (0.98, 0.5) if plan.columns else (0.5, 0.5)
        aligned = "right" if plan.columns else "center"
        axes.text(*place, text, transform=axes.transAxes, ha=aligned, color=COLORS["ordinary"])
    leaders = add_panel(
        figure, _LEFT, plan.lives_top + plan.lives_height, plan.panel_width, plan.gap
    )
    leaders.set_axis_off()
    leaders.set(xlim=(0, 1), ylim=(0, 1))
    left, right = _extent(sink_map)
    lines = [
        [((index + 0.5) / n, 1.0), ((column.position - left) / (right - left), 0.0)]
        for index, column in enumerate(plan.columns)
    ]
    colors = [column.color for column in plan.columns]
    leaders.add_collection(LineCollection(lines, colors=colors, linewidths=0.5))


def _extent(sink_map: SinkMap) -> tuple[float, float]:
    """Limits of the text's axis: the first token, the one that matters, keeps off the frame."""
    return -0.5 - 0.006 * sink_map.n_tokens, max(sink_map.n_tokens, 1) - 0.5


def _life_bar(sink: Sink, index: int, half: float) -> PathPatch:
    """One patch for one life, in as many pieces as it has runs of layers."""
    pieces = [
        Path.unit_rectangle().transformed(_box(index - half, start - 0.5, 2 * half, end - start))
        for start, end in alive_spans(sink.layers)
    ]
    bar = PathPatch(Path.make_compound_path(*pieces), facecolor=COLORS[sink.kind], linewidth=0)
    bar.set_gid(f"life-{sink.kind}-{sink.position}-{sink.l_start}")
    return bar


def _box(left: float, bottom: float, width: float, height: float) -> Affine2D:
    return Affine2D().scale(width, height).translate(left, bottom)


def _label_columns(axes: Axes, plan: _Plan) -> None:
    for index in plan.labeled:
        column = plan.columns[index]
        text = column.label if plan.upright else column.label.replace(" ", "\n")
        axes.annotate(
            text,
            (index, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=90 if plan.upright else 0,
            ha="center",
            va="bottom",
            fontsize=SMALL,
            family="DejaVu Sans Mono",
            color=column.color,
            parse_math=False,
            gid="label",
        )


def _draw_text(figure: Figure, sink_map: SinkMap, plan: _Plan, shade: Shade) -> None:
    axes = add_panel(figure, _LEFT, plan.text_top, plan.panel_width, plan.text_height)
    axes.set_label("text")
    n_tokens = max(sink_map.n_tokens, 1)
    axes.set(xlim=_extent(sink_map), xlabel="position in the text (tokens)")
    axes.xaxis.set_major_locator(MaxNLocator(8 if plan.panel_width > 4 else 4, integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    if not plan.measured:
        axes.set_yticks([])
        return
    values, norm, caption = _shading(sink_map, shade)
    stretch = math.ceil(n_tokens / _MAX_COLUMNS)
    pooled = _pooled(values, stretch)
    # The last stretch may reach beyond the end of the text; the limits of the axis cut it.
    image = axes.imshow(
        pooled,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(-0.5, pooled.shape[1] * stretch - 0.5, -0.5, plan.n_layers - 0.5),
        cmap="Greys",
        norm=norm,
    )
    axes.set_xlim(_extent(sink_map))
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if _names_tokens(sink_map, plan.panel_width):
        axes.set_xticks(
            range(n_tokens),
            [_token_name(token) for token in sink_map.token_strings],
            rotation=90,
            family="DejaVu Sans Mono",
            parse_math=False,
        )
        axes.set_xlabel("")
    left = _LEFT + plan.panel_width + 0.1
    bar = figure.colorbar(image, cax=add_panel(figure, left, plan.text_top, 0.09, plan.text_height))
    bar.outline.set_linewidth(0.4)
    if isinstance(norm, LogNorm):  # powers of ten would have exponents smaller than 7 points
        bar.set_ticks([1, 10, 100], labels=["1", "10", "100"])
    bar.set_label(caption, fontsize=SMALL)


def _shading(sink_map: SinkMap, shade: Shade) -> tuple[np.ndarray, Normalize, str]:
    """Values [layer, token] of the heat map, their scale, and what they are called."""
    if shade == "alignment":
        aligned = (
            sink_map.alignment
            if sink_map.centered_alignment is None
            else sink_map.centered_alignment
        )
        if aligned is not None:
            return _array(aligned), Normalize(0.0, 1.0), "alignment (cosine)"
    if sink_map.attention_ratio is not None:
        caption = "attention (× ordinary)"
        return _array(sink_map.attention_ratio).clip(1.0, 100.0), LogNorm(1.0, 100.0), caption
    drawn = _array(sink_map.array("sink_score").mean(dim=1))
    top = float(np.nanmax(drawn, initial=0.0)) or 1.0
    return drawn, Normalize(0.0, top), "sink score"


def _pooled(values: np.ndarray, stretch: int) -> np.ndarray:
    """Largest value of every `stretch` tokens; NaN is left out."""
    n_tokens = values.shape[1]
    padded = np.full((values.shape[0], math.ceil(n_tokens / stretch) * stretch), -np.inf)
    padded[:, :n_tokens] = np.nan_to_num(values, nan=-np.inf)
    pooled: np.ndarray = reduce(
        padded, "layer (column token) -> layer column", "max", token=stretch
    )
    pooled[np.isneginf(pooled)] = np.nan
    return pooled


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().float().cpu().numpy()
    return array
