"""What every experiment shares: a model, texts with their sinks, a folder, and a verdict.

An experiment is a module with a docstring that states the claim, and one function:

    def run(bench: Bench) -> Outcome

A `Bench` is a loaded model with the sink maps of some texts; an `Outcome` holds the figures, the
tables and the verdict. `main` makes a command of it, and `run_all.py` runs all on one bench.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import secondary_sinks as ss
from secondary_sinks.cli.inputs import as_model_input, read_sources
from secondary_sinks.result import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Answer = Literal["supported", "not supported", "cannot tell"]

MODEL = "qwen2.5-coder-0.5b"
N_TEXTS = 48
"""How many of the bundled texts are taken by default, balanced over their kinds."""
MAX_TOKENS = 400
"""Where each text is cut by default: a small model on two cores then takes minutes in all."""
N_MANY = 12
"""Texts with the most secondary sinks, for questions that need many and take some time for each."""
N_CLOSE = 3
"""Of those, the texts that are examined one by one, with interventions."""


@dataclass(frozen=True)
class Verdict:
    """What the measurement says of the claim."""

    answer: Answer
    why: str
    """One paragraph with the numbers."""

    def __str__(self) -> str:
        return f"**{self.answer.capitalize()}.** {self.why}"


@dataclass(frozen=True)
class Outcome:
    """What an experiment found."""

    verdict: Verdict
    figures: dict[str, Figure] = field(default_factory=dict)
    """By name of the file, without ending."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A model and the texts that it is examined on."""

    model: Any
    maps: tuple[ss.SinkMap, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.maps[0].model_name

    @property
    def with_sinks(self) -> tuple[ss.SinkMap, ...]:
        """The texts that have secondary sinks, richest first."""
        rich = sorted(self.maps, key=lambda sink_map: -len(sink_map.secondary))
        return tuple(sink_map for sink_map in rich if sink_map.secondary)

    @property
    def many(self) -> tuple[ss.SinkMap, ...]:
        """The richest texts."""
        return self.with_sinks[:N_MANY]

    @property
    def close(self) -> tuple[ss.SinkMap, ...]:
        """The few texts that are examined one by one, with interventions."""
        return self.with_sinks[:N_CLOSE]

    @property
    def n_sinks(self) -> int:
        """Secondary sinks in all texts."""
        return sum(len(sink_map.secondary) for sink_map in self.maps)

    @cached_property
    def attributions(self) -> tuple[ss.MlpAttribution, ...]:
        """Writers and feeders of the close texts, found once."""
        return tuple(
            ss.attribute_to_mlps(self.model, sink_map, seed=self.seed, progress=False)
            for sink_map in self.close
        )

    @cached_property
    def removals(self) -> tuple[ss.SinkRemoval, ...]:
        """The same texts without their secondary sinks, run once."""
        return tuple(
            ss.remove_sinks(self.model, sink_map, seed=self.seed, progress=False)
            for sink_map in self.close
        )

    def about(self) -> str:
        """The model and its texts in a few words."""
        return (
            f"{self.name}, {counted(len(self.maps), 'text')}, "
            f"{counted(self.n_sinks, 'secondary sink')} in {len(self.with_sinks)} of them"
        )


def cannot_tell(bench: Bench, why: str = "") -> Outcome:
    """The outcome where there is nothing to measure."""
    return Outcome(Verdict("cannot tell", why or f"No secondary sinks: {bench.about()}."))


def by_text(found: Sequence[Any]) -> pd.DataFrame:
    """One table of the results of several texts, with the number of the text in front."""
    import pandas as pd

    frames = [one.to_frame() for one in found]
    return pd.concat(frames, keys=range(len(frames)), names=["text"]).reset_index(level="text")


def make_bench(
    model: str,
    texts: Path | None = None,
    *,
    n_texts: int = N_TEXTS,
    max_tokens: int | None = MAX_TOKENS,
) -> Bench:
    """Load a model and find the sinks of its texts.

    Args:
        model: what `load_model` takes.
        texts: a JSON Lines file as `secondary-sinks detect --jsonl` reads it; None takes bundled
            texts.
        n_texts: how many of the bundled texts, balanced over their kinds.
        max_tokens: cut each text here.
    """
    loaded = ss.load_model(model)
    if texts is not None:
        sources = read_sources(None, None, texts)
        contents = [as_model_input(loaded, source, chat=False)[0] for source in sources]
    else:
        kinds = None if getattr(loaded.tokenizer, "chat_template", None) else _PLAIN
        contents = [text.content for text in ss.bundled_texts(kinds, n=n_texts)]
    maps = ss.detect_sinks(loaded, contents, max_tokens=max_tokens)
    return Bench(loaded, tuple(maps))


_PLAIN = ("mathematics", "prose", "code", "lists", "tables", "multilingual", "plain")


def write(outcome: Outcome, name: str, folder: Path) -> list[Path]:
    """Figures as PNG and PDF, tables as CSV, the verdict as text."""
    from secondary_sinks.plots.style import save_figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        save_figure(figure, folder / f"{stem}.{ending}")
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
    """A share in words."""
    return f"{100 * share:.0f} %"


def interval(low: float, high: float) -> str:
    """An interval in words."""
    return f"95 % interval {low:.2g} to {high:.2g}"
