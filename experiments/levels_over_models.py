"""Figure 2 over models: in larger models sink levels are fewer, and recur more surely.

Claim: the onset and the lifetime of secondary sinks appear in a more deterministic and more
frequent manner in larger models.

Measured as Spearman's correlation of determinism with depth over the given models, measured here or
read from published JSON Lines files. Supported above 0.5, not supported below 0, cannot tell
otherwise or with fewer than four models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from shared import MAX_TOKENS, N_TEXTS, Outcome, Verdict, make_bench, write

import secondary_sinks as ss

LEAST_MODELS = 4
LEAST_SINKS = 10


def run_models(levels: Sequence[ss.SinkLevels]) -> Outcome:
    """One panel a model, and how determinism goes with depth."""
    frame = pd.DataFrame(
        {
            "model": [of_model.provenance.model.name for of_model in levels],
            "n_layers": [of_model.n_layers for of_model in levels],
            "n_texts": [of_model.n_texts for of_model in levels],
            "n_sinks": [of_model.n_sinks for of_model in levels],
            "n_levels": [len(of_model.levels) for of_model in levels],
            "determinism": [of_model.determinism for of_model in levels],
        }
    )
    enough = frame[frame["n_sinks"] >= LEAST_SINKS]
    listed = "; ".join(
        f"{row.model} ({row.n_layers} layers): {row.n_sinks} sinks, {row.n_levels} levels, "
        f"determinism {row.determinism:.2f}"
        for row in frame.itertuples()
    )
    if len(enough) < LEAST_MODELS:
        verdict = Verdict("cannot tell", f"{len(enough)} models with enough sinks. {listed}.")
    else:
        rho = float(enough["n_layers"].corr(enough["determinism"], method="spearman"))
        answer = "supported" if rho > 0.5 else "not supported" if rho < 0 else "cannot tell"
        verdict = Verdict(
            answer, f"Depth and determinism correlate {rho:.2f} (Spearman). {listed}."
        )
    return Outcome(
        verdict,
        figures={"levels_over_models": ss.plot_sink_levels(levels)},
        tables={"levels_over_models": frame},
    )


def main(
    model: Annotated[list[str] | None, typer.Option(help="A model; may be given again.")] = None,
    published: Annotated[
        list[Path] | None, typer.Option(help="A published JSON Lines file; may be given again.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts, one JSON object a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path(
        "out/experiments"
    ),
    n_texts: Annotated[int, typer.Option(min=1, help="Bundled texts to take.")] = N_TEXTS,
    max_tokens: Annotated[int, typer.Option(min=2, help="Cut each text.")] = MAX_TOKENS,
) -> None:
    """Sink levels of several models, one panel each."""
    levels = [ss.sink_levels(ss.read_published(path)) for path in published or []]
    models = model or ([] if levels else ["qwen2.5-coder-0.5b", "smollm2-135m"])
    for name in models:
        bench = make_bench(name, texts, n_texts=n_texts, max_tokens=max_tokens)
        levels.append(ss.sink_levels(bench.maps))
    outcome = run_models(levels)
    write(outcome, "levels_over_models", out)
    typer.echo(outcome.verdict)


if __name__ == "__main__":
    typer.run(main)
