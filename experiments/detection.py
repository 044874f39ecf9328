"""Does detection agree with raw attention: models, lengths, plain text and chats?

    python experiments/detection.py [MODEL ...] [--lengths 100 --lengths 500] [--out FOLDER]

For each model, every bundled text is followed by the next ones up to the longest length, and cut at
each length, once as it is and once as a user's message in the model's chat template, if it has one.
Sinks are detected and compared with attention alone by `ss.attention_check`. The table has one row
for each model, form and length: texts, clear sinks and how many of them were called (recall), calls
that attention refutes (precision), calls that it leaves open, and undecided last tokens.

Not evidence for: that a call which attention leaves open is a sink. A short-lived one is always
left open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import secondary_sinks as ss

MODELS = ("qwen2.5-coder-0.5b", "smollm2-135m", "gemma3-270m")
LENGTHS = (100, 500, 2000)
LOOSE = {"min_attention_ratio": 3.0, "min_strength": 0.0, "min_lifetime": 1}
"""A criterion without a floor on strength, for comparison."""
CHARACTERS = 5
"""Characters of text for each token of the longest length: more than any of the models needs."""


def flat(text: ss.BundledText) -> str:
    """A bundled text as one string, the messages of a chat one after the other."""
    if isinstance(text.content, str):
        return text.content
    return "\n\n".join(message["content"] for message in text.content)


def long_texts(n_texts: int, n_tokens: int) -> list[str]:
    """Each bundled text, followed by the next ones until it is long enough."""
    parts = [flat(text) for text in ss.bundled_texts()]
    joined = ["\n\n".join(parts[n:] + parts[:n]) for n in range(len(parts))]
    step = max(1, len(parts) // n_texts)
    return [text[: CHARACTERS * n_tokens] for text in joined[::step][:n_texts]]


def forms(model: Any, text: str) -> Iterator[tuple[str, Any]]:
    """The text plain, and as a chat where the model has a template."""
    yield "plain", text
    if getattr(model.tokenizer, "chat_template", None):
        yield "chat", [{"role": "user", "content": text}]


def checks(model: Any, texts: Sequence[str], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row for each text, form and length."""
    for number, text in enumerate(texts):
        for form, content in forms(model, text):
            for length in lengths:
                sink_map = ss.detect_sinks(model, content, max_tokens=length)
                check = ss.attention_check(sink_map)
                loose = ss.attention_check(sink_map.refilter(**LOOSE))
                yield {
                    "model": sink_map.model_name,
                    "form": form,
                    "n_tokens": length,
                    "text": number,
                    "clear_sinks": len(check.clear_sinks),
                    "called": len(check.agreed),
                    "false_calls": len(check.false_calls),
                    "open_calls": len(check.open_calls),
                    "undecided": len(sink_map.undecided),
                    "loose_called": len(loose.agreed),
                    "loose_false_calls": len(loose.false_calls),
                }


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Sums over texts, with recall and precision; NaN where there is nothing to share."""
    sums = rows.groupby(["model", "form", "n_tokens"], sort=False)
    table = sums.sum().drop(columns="text")
    table.insert(0, "texts", sums.size())
    table["recall"] = table["called"] / table["clear_sinks"]
    table["precision"] = table["called"] / (table["called"] + table["false_calls"])
    return table.reset_index()


def main(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models; all three by default.")
    ] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Lengths in tokens.")] = None,
    n_texts: Annotated[int, typer.Option(min=1, help="How many of the bundled texts.")] = 72,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("out/experiments"),
) -> None:
    """Compare detection with raw attention."""
    chosen_lengths = sorted(lengths or LENGTHS)
    texts = long_texts(n_texts, chosen_lengths[-1])
    rows = []
    for name in models or MODELS:
        model = ss.load_model(name)
        rows += list(checks(model, texts, chosen_lengths))
        typer.echo(summary(pd.DataFrame(rows)).to_string(index=False), err=True)
    frame = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "detection_texts.csv", index=False)
    summary(frame).to_csv(out / "detection.csv", index=False, float_format="%.4f")
    typer.echo(out / "detection.csv")


if __name__ == "__main__":
    typer.run(main)
