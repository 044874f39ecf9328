"""What every experiment shares: a model, texts with their sinks, a folder, and a verdict.

An experiment is a module whose docstring states the claim and the rule of the verdict, with one
function:

    def run(bench: Bench) -> Outcome

A `Bench` is a loaded model with the sink maps of some texts; an `Outcome` holds the figures, the
tables and the verdict. `main` makes it a command, and `run_all.py` runs all on one bench.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import secondary_sinks as ss

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Answer = Literal["supported", "not supported", "cannot tell"]

MODEL = "qwen2.5-coder-0.5b"
N_TEXTS = 48
"""Bundled texts by default, balanced over their kinds."""
MAX_TOKENS = 400
"""Each text is cut here by default, so that a small model takes minutes in all on two cores."""
N_MANY = 12
"""Texts with the most secondary sinks, for analyses that need many and take some time for each."""
N_CLOSE = 3
"""Of those, the texts that are examined closely, with interventions."""


@dataclass(frozen=True)
class Verdict:
    """What the measurement says about the claim."""

    answer: Answer
    why: str
    """One paragraph with the numbers."""

    def __str__(self) -> str:
        return f"**{self.answer.capitalize()}.** {self.why}"


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment."""

    verdict: Verdict
    figures: dict[str, Figure] = field(default_factory=dict)
    """By the name of the file, without its ending."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A model and the sink maps of the texts that it is examined on."""

    model: Any
    maps: tuple[ss.SinkMap, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.maps[0].model_name

    @property
    def with_sinks(self) -> tuple[ss.SinkMap, ...]:
        """The texts that have secondary sinks, those with the most first."""
        ordered = sorted(self.maps, key=lambda sink_map: -len(sink_map.secondary))
        return tuple(sink_map for sink_map in ordered if sink_map.secondary)

    @property
    def many(self) -> tuple[ss.SinkMap, ...]:
        """The texts with the most secondary sinks."""
        return self.with_sinks[:N_MANY]

    @property
    def close(self) -> tuple[ss.SinkMap, ...]:
        """The few texts that are examined closely, with interventions."""
        return self.with_sinks[:N_CLOSE]

    @property
    def n_sinks(self) -> int:
        """Number of secondary sinks in all texts."""
        return sum(len(sink_map.secondary) for sink_map in self.maps)

    @cached_property
    def attributions(self) -> tuple[ss.MlpAttribution, ...]:
        """Writers and feeders in those texts, measured once."""
        return tuple(
            ss.attribute_to_mlps(self.model, sink_map, seed=self.seed, progress=False)
            for sink_map in self.close
        )

    @cached_property
    def removals(self) -> tuple[ss.SinkRemoval, ...]:
        """Those texts without their secondary sinks, run once."""
        return tuple(
            ss.remove_sinks(self.model, sink_map, seed=self.seed, progress=False)
            for sink_map in self.close
        )

    def about(self) -> str:
        """The model and its texts in a few words."""
        return (
            f"{self.name}, {len(self.maps)} texts, {self.n_sinks} secondary sinks in "
            f"{len(self.with_sinks)} of them"
        )


def cannot_tell(bench: Bench, why: str = "") -> Outcome:
    """The outcome where there is nothing to measure."""
    return Outcome(Verdict("cannot tell", why or f"No secondary sinks: {bench.about()}."))


def by_text(results: Sequence[Any]) -> pd.DataFrame:
    """One table of the results of several texts, with the number of the text in front."""
    import pandas as pd

    frames = [result.to_frame() for result in results]
    return pd.concat(frames, keys=range(len(frames)), names=["text"]).reset_index(level="text")


def make_bench(
    model: str,
    texts: Path | None = None,
    *,
    n_texts: int = N_TEXTS,
    max_tokens: int | None = MAX_TOKENS,
) -> Bench:
    """Load a model and detect the sinks of its texts.

    Args:
        model: what `load_model` takes.
        texts: a JSON Lines file, see `read_texts`; None takes bundled texts.
        n_texts: how many of the bundled texts, balanced over their kinds; without chats for a model
            without a chat template.
        max_tokens: cut each text here.
    """
    loaded = ss.load_model(model)
    contents: list[Any]
    if texts is not None:
        contents = read_texts(texts)
    else:
        kinds = None
        if not getattr(loaded.tokenizer, "chat_template", None):
            kinds = sorted({text.kind for text in ss.bundled_texts()} - {"chat"})
        contents = [text.content for text in ss.bundled_texts(kinds, n=n_texts)]
    maps = ss.detect_sinks(loaded, contents, max_tokens=max_tokens)
    return Bench(loaded, tuple(maps))


def read_texts(path: Path) -> list[Any]:
    """The texts of a file with one JSON value a line, as `detect_sinks` takes them: a string, or an
    object with `text`, with `messages`, or with `prompt` and `output`, which are joined."""
    entries = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    return [entry if isinstance(entry, str) else _content(entry) for entry in entries]


def _content(entry: dict[str, Any]) -> Any:
    if "messages" in entry:
        return entry["messages"]
    return entry["text"] if "text" in entry else entry["prompt"] + entry["output"]


def write(outcome: Outcome, name: str, folder: Path) -> list[Path]:
    """Write figures as PNG and PDF, tables as CSV, the verdict as text."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        ss.save_figure(figure, folder / f"{stem}.{ending}")
        for stem, figure in outcome.figures.items()
        for ending in ("png", "pdf")
    ]
    for stem, table in outcome.tables.items():
        paths.append(folder / f"{stem}.csv")
        table.to_csv(paths[-1], index=False)
    paths.append(folder / f"{name}.txt")
    paths[-1].write_text(f"{outcome.verdict}\n", encoding="utf-8")
    return paths


def main(run: Callable[[Bench], Outcome], name: str, claim: str) -> None:
    """The command line of one experiment."""

    def command(
        model: Annotated[str, typer.Option(help="Alias, hub id, folder or .gguf file.")] = MODEL,
        texts: Annotated[Path | None, typer.Option(help="Texts, one JSON object a line.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path(
            "out/experiments"
        ),
        n_texts: Annotated[int, typer.Option(min=1, help="Bundled texts to take.")] = N_TEXTS,
        max_tokens: Annotated[int, typer.Option(min=2, help="Cut each text.")] = MAX_TOKENS,
    ) -> None:
        bench = make_bench(model, texts, n_texts=n_texts, max_tokens=max_tokens)
        outcome = run(bench)
        for path in write(outcome, name, out):
            typer.echo(path, err=True)
        typer.echo(outcome.verdict)

    command.__doc__ = claim
    typer.run(command)


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.0f} %"


def interval(low: float, high: float) -> str:
    """An interval in words."""
    return f"95 % interval {low:.2g} to {high:.2g}"
