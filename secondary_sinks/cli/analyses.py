"""Every analysis as a command, made from one table.

A command has the name of its function, with hyphens: `secondary-sinks remove-sinks` runs
`remove_sinks`. It detects the sinks of the text or texts, runs the analysis, prints its table, and
with `--out` writes the result as data, as a table and as a figure. To add one, add a line to
`ANALYSES`; a test compares its options and defaults with the function's signature.

PyTorch and TransformerLens are imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from secondary_sinks.cli import command as shared
from secondary_sinks.cli.command import err_console, load, out_console, say_written
from secondary_sinks.cli.detect import detect_all
from secondary_sinks.cli.inputs import Source, read_sources
from secondary_sinks.cli.outputs import writable_folder, write_csv
from secondary_sinks.errors import InputError

if TYPE_CHECKING:
    from secondary_sinks.result import Result
    from secondary_sinks.sinks.sink_map import SinkMap

Takes = Literal["map and sinks", "map and sink", "map", "maps", "maps alone", "two maps"]
"""What a function is called with: `(model, sink_map, sinks=...)`, `(model, sink_map, sink)`,
`(model, sink_map)`, `(model, sink_maps)`, `(sink_maps)`, `(model, clean, corrupted, sink)`."""


@dataclass(frozen=True)
class Option:
    """One keyword argument of an analysis that the command line offers."""

    name: str
    type: Any
    default: Any
    help: str


SEED = Option("seed", int, 0, "Of every random choice.")
WRITERS = Option("writers", int | None, None, "Layer of the MLP, instead of the largest write.")
WRITER = Option("writer", int | None, None, "Layer of the MLP, instead of the largest write.")


def _controls(default: int) -> Option:
    return Option("n_controls", int, default, "Matched ordinary tokens for each sink.")


@dataclass(frozen=True)
class Analysis:
    """A line of the table."""

    function: str
    module: str
    takes: Takes
    help: str
    options: tuple[Option, ...] = ()

    @property
    def name(self) -> str:
        """Name of the command."""
        return self.function.replace("_", "-")

    def load(self) -> Callable[..., Result]:
        """The function itself."""
        module = import_module(f"secondary_sinks.{self.module}")
        function: Callable[..., Result] = getattr(module, self.function)
        return function


ANALYSES: tuple[Analysis, ...] = (
    Analysis(
        "attribute_to_mlps",
        "analyses.attribute_to_mlps",
        "map and sinks",
        "Name the MLP that wrote each sink, and its feeders.",
        (_controls(8), SEED),
    ),
    Analysis(
        "dose_response",
        "analyses.dose_response",
        "map and sink",
        "Scale the write of one sink: score and lifetime.",
        (WRITER, SEED),
    ),
    Analysis(
        "remove_sinks",
        "analyses.remove_sinks",
        "map and sinks",
        "Zero the writers of all sinks: primary, loss, output.",
        (
            WRITERS,
            Option("reverse", bool, False, "Add sinks to ordinary tokens instead."),
            _controls(5),
            SEED,
        ),
    ),
    Analysis(
        "path_effect",
        "analyses.path_effect",
        "map and sink",
        "Follow one write to the keys that read it.",
        (
            WRITER,
            Option("receiver", Literal["k", "v"], "k", "Keys or values of later layers."),
        ),
    ),
    Analysis(
        "patch_activations",
        "analyses.patch_activations",
        "two maps",
        "Patch activations between two texts, layer by position.",
        (
            Option(
                "direction",
                Literal["denoising", "noising"],
                "denoising",
                "Patch clean activations into the corrupted run, or the reverse.",
            ),
            Option(
                "scan",
                Literal["exact", "attribution"],
                "exact",
                "Run every cell, or estimate all by gradients and run the largest.",
            ),
        ),
    ),
    Analysis(
        "mlp_stage_alignment",
        "analyses.mlp_stage_alignment",
        "map and sinks",
        "At which stage of the writer's MLP a token turns.",
        (WRITERS, _controls(16), SEED),
    ),
    Analysis(
        "mlp_response",
        "analyses.mlp_response",
        "maps",
        "What an MLP writes for principal directions of its input.",
        (
            WRITER,
            Option("n_components", int, 6, "Principal components of the inputs."),
            _controls(8),
            SEED,
        ),
    ),
    Analysis(
        "neuron_contributions",
        "analyses.neuron_contributions",
        "map and sinks",
        "Which neurons of the writer make the write.",
        (
            WRITERS,
            Option("share", float, 0.9, "Share of the write that the listed neurons make."),
            _controls(8),
            SEED,
        ),
    ),
    Analysis(
        "head_reads",
        "analyses.head_reads",
        "map and sinks",
        "Which heads attend to the sinks, and by which part of the logit.",
        (Option("n_matched", int, 8, "Ordinary keys for each sink."), SEED),
    ),
    Analysis(
        "sink_decomposition",
        "analyses.decomposition.sink_decomposition",
        "map and sinks",
        "What keeps each sink, and what ends it.",
    ),
    Analysis(
        "norm_profiles",
        "analyses.norm_profiles",
        "map and sinks",
        "Norms of residuals, keys and values by layer.",
    ),
    Analysis(
        "norm_law",
        "analyses.norm_law",
        "maps",
        "Written norm against score and lifetime.",
        (WRITERS, SEED),
    ),
    Analysis(
        "primary_weakening",
        "analyses.primary_weakening",
        "maps alone",
        "Whether the primary weakens while secondary sinks live.",
        (SEED,),
    ),
    Analysis(
        "separability",
        "analyses.separability",
        "maps",
        "From which layer a probe tells future sinks from other tokens.",
        (
            Option("onset", int | None, None, "Of the sinks; by default the most common."),
            Option("n_permutations", int, 20, "Shuffles of the labels."),
            SEED,
        ),
    ),
    Analysis(
        "token_statistics",
        "analyses.token_statistics",
        "maps alone",
        "Which tokens become sinks, against their frequency.",
        (Option("min_occurrences", int, 5, "Fewest occurrences of a token that is listed."),),
    ),
    Analysis(
        "other_measures",
        "analyses.other_measures",
        "map",
        "The sinks by other published measures, side by side.",
    ),
    Analysis(
        "sink_levels",
        "sinks.levels",
        "maps alone",
        "Which pairs of onset and lifetime recur.",
        (Option("max_spread", int, 2, "Lifetimes this close are one level (in layers)."),),
    ),
)


def command_of(analysis: Analysis) -> Callable[..., None]:
    """The function of a command, with the parameters that typer reads from its signature."""

    def run(**arguments: Any) -> None:
        options = {option.name: arguments.pop(option.name) for option in analysis.options}
        folder = writable_folder(arguments.pop("out"))
        result = _result(analysis, arguments, options)
        frame = result.to_frame()
        typer.echo(repr(result), err=True)
        out_console().print(frame.to_string(index=False), soft_wrap=True, markup=False)
        if folder is not None:
            from secondary_sinks.plots.style import save_figure

            result.save(folder / f"{analysis.name}.safetensors")
            write_csv(folder / f"{analysis.name}.csv", frame)
            save_figure(result.plot(), folder / f"{analysis.name}.png")
        say_written(folder)

    parameters = list(_parameters(analysis))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = analysis.help
    return run


def _parameters(analysis: Analysis) -> Iterator[inspect.Parameter]:
    """The parameters of the command: model, texts, sinks, the analysis' own, output."""

    def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, kind, annotation=annotation, default=default)

    yield parameter("model", shared.ModelName, inspect.Parameter.empty)
    if analysis.takes == "two maps":
        for name, what in (("clean", "with the sink"), ("corrupted", "to compare, as long")):
            help_text = f"The text {what}."
            yield parameter(name, Annotated[str, typer.Option(help=help_text)], ...)
    else:
        yield parameter("text", shared.Text, None)
        yield parameter("file", shared.File, None)
    if analysis.takes in ("maps", "maps alone"):
        yield parameter("jsonl", shared.Jsonl, None)
    yield parameter("chat", shared.Chat, False)
    yield parameter("max_tokens", shared.MaxTokens, None)
    if analysis.takes == "map and sinks":
        yield parameter("sinks", _Sinks, "secondary")
        yield parameter("position", _Positions, None)
        yield parameter("min_lifetime", _MinLifetime, 1)
        yield parameter("min_score", _MinScore, 0.0)
    if analysis.takes in ("map and sink", "two maps"):
        yield parameter("position", _Position, None)
    for option in analysis.options:
        annotation = Annotated.__class_getitem__((option.type, typer.Option(help=option.help)))  # type: ignore[attr-defined]
        yield parameter(option.name, annotation, option.default)
    yield parameter("out", shared.Out, None)
    yield parameter("device", shared.Device, None)
    yield parameter("dtype", shared.Dtype, "float32")
    yield parameter("kind", shared.Kind, "bridge")


_Sinks = Annotated[
    Literal["secondary", "primary", "all"], typer.Option(help="Which sinks of the text.")
]
_Positions = Annotated[
    list[int] | None,
    typer.Option(min=0, help="A token, sink or not, instead of --sinks; may be repeated."),
]
_Position = Annotated[
    int | None,
    typer.Option(min=0, help="The token; by default the secondary sink that draws the most."),
]
_MinLifetime = Annotated[int, typer.Option(min=1, help="Leave out sinks of fewer layers.")]
_MinScore = Annotated[float, typer.Option(min=0.0, help="Leave out sinks with a lower score.")]


def _result(analysis: Analysis, arguments: dict[str, Any], options: dict[str, Any]) -> Result:
    """Load the model, detect the sinks, run the analysis."""
    if analysis.takes == "two maps":
        sources = [Source(name, text=arguments[name]) for name in ("clean", "corrupted")]
    else:
        sources = read_sources(arguments["text"], arguments["file"], arguments.get("jsonl"))
    model = load(
        arguments["model"],
        device=arguments["device"],
        dtype=arguments["dtype"],
        kind=arguments["kind"],
    )
    detected = detect_all(
        model,
        sources,
        chat=arguments["chat"],
        options={"max_tokens": arguments["max_tokens"]},
    )
    maps = [sink_map for _, sink_map, _ in detected]
    for sink_map in maps[:1] if len(maps) == 1 else ():
        typer.echo(repr(sink_map), err=True)
    function = analysis.load()
    if "progress" in inspect.signature(function).parameters:
        options["progress"] = err_console().is_terminal
    if analysis.takes == "maps alone":
        return function(maps, **options)
    if analysis.takes == "maps":
        return function(model, maps, **options)
    if analysis.takes == "map":
        return function(model, maps[0], **options)
    if analysis.takes == "map and sinks":
        sinks = maps[0].select(
            arguments["position"] or arguments["sinks"],
            min_lifetime=arguments["min_lifetime"],
            min_score=arguments["min_score"],
        )
        return function(model, maps[0], sinks=sinks, **options)
    position = arguments["position"]
    sink = _strongest(maps[0]) if position is None else position
    return function(model, *maps, sink, **options)


def _strongest(sink_map: SinkMap) -> Any:
    if not sink_map.secondary:
        raise InputError("no secondary sinks in this text; name a token with --position")
    return max(sink_map.secondary, key=lambda sink: sink.sink_score)
