"""A user's script that calls every public function; checked by mypy and pyright, not run.

If a signature or a return type of the public surface is wrong, a checker fails here.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import secondary_sinks as ss


class LargestMlpOutput(ss.Collector):
    """A collector of the user's own."""

    sites = ("mlp_out",)

    def start(self, run: ss.Run) -> None:
        """Prepare for one text."""
        self.largest = torch.zeros(run.n_layers, run.n_tokens)

    def update(self, site: str, layer: int | None, activation: Tensor) -> None:
        """Take one layer's activation."""
        if layer is not None:
            self.largest[layer] = activation.abs().amax(dim=-1).cpu()

    def result(self) -> Tensor:
        """Largest entry by layer and token."""
        return self.largest


def flip(value: Tensor, clean: Tensor, ordinary: Tensor) -> Tensor:
    """An edit of the user's own."""
    return -value


def find(model: ss.Model, text: str, folder: Path) -> ss.SinkMap:
    """Detection, one text and many."""
    aliases: list[str] = [alias.name for alias in ss.list_models()]
    texts: list[str] = [
        one.content for one in ss.bundled_texts(n=4) if isinstance(one.content, str)
    ]
    sink_map: ss.SinkMap = ss.detect_sinks(model, text, chat=True, min_alignment=0.9)
    sink_maps: list[ss.SinkMap] = ss.detect_sinks(model, texts, batch_size=2)
    chosen: list[ss.Sink] = sink_map.select("all", min_lifetime=3, min_score=0.01)
    evidence: ss.Evidence | None = chosen[0].evidence
    levels: ss.SinkLevels = ss.sink_levels(sink_maps)
    written: Path = ss.write_published(folder / "sinks.jsonl", sink_maps)
    read: list[ss.SinkMap] = ss.read_published(written)
    frame: pd.DataFrame = sink_map.margins()
    figure: Figure = sink_map.plot()
    print(aliases, evidence, levels, read, frame, figure)
    return ss.SinkMap.load(sink_map.save(folder / "map.safetensors"))


def observe(model: ss.Model, text: str) -> ss.Trace:
    """Every collector in one pass."""
    collectors: list[ss.Collector] = [
        ss.AttentionEntropy(),
        ss.ChosenVectors([0, 3], ["resid_post"]),
        ss.MassiveActivations(),
        ss.Norms("v"),
        ss.ReceivedAttention(),
        ss.ResidualGeometry(),
        ss.ResidualNorms(),
        ss.SinkScores(),
        LargestMlpOutput(),
    ]
    trace_result: ss.Trace = ss.trace(model, text, collectors)
    rate: Tensor = ss.sink_rate(trace_result["SinkScores"])
    print(rate)
    return trace_result


def intervene(model: ss.Model, sink_map: ss.SinkMap, direction: Tensor) -> ss.CounterfactualRows:
    """Every edit as a row."""
    means: ss.MeanActivations = ss.mean_activations(model, sink_map)
    edits: list[ss.Edit] = [
        ss.Zero(),
        ss.Mean(),
        ss.Resample(4),
        ss.Scale(2.0),
        ss.ProjectOut(direction),
        ss.KeepOnly(direction),
        ss.Replace(direction),
        ss.Add(direction),
        means.edit("mlp_out", 5),
        flip,
    ]
    rows = [ss.Intervention("mlp_out", layer=5, position=3, edit=edit) for edit in edits]
    rows.append(ss.Intervention("blocks.5.hook_mlp_out", position=3, edit=ss.Zero()))
    return ss.counterfactuals(model, sink_map, rows, method="auto")


def analyse(model: ss.Model, sink_map: ss.SinkMap, other: ss.SinkMap) -> list[pd.DataFrame]:
    """Every analysis."""
    attribution: ss.MlpAttribution = ss.attribute_to_mlps(model, sink_map, sinks=[3, 7])
    pooled: ss.PooledAttribution = ss.pool_attributions([attribution])
    curve: ss.DoseResponse = ss.dose_response(model, sink_map, sink_map.secondary[0])
    removal: ss.SinkRemoval = ss.remove_sinks(model, sink_map, writers=attribution.writers)
    path: ss.PathEffect = ss.path_effect(model, sink_map, 3, receiver="k")
    patched: ss.PatchResult = ss.patch_activations(model, sink_map, other, 3)
    stages: ss.MlpStages = ss.mlp_stage_alignment(model, sink_map)
    response: ss.MlpResponse = ss.mlp_response(model, [sink_map, other])
    neurons: ss.NeuronContributions = ss.neuron_contributions(model, sink_map)
    heads: ss.HeadReads = ss.head_reads(model, sink_map)
    decomposition: ss.SinkDecomposition = ss.sink_decomposition(model, sink_map)
    profiles: ss.NormProfiles = ss.norm_profiles(model, sink_map)
    law: ss.NormLaw = ss.norm_law(model, [sink_map, other])
    weakening: ss.PrimaryWeakening = ss.primary_weakening([sink_map, other], removals=removal)
    probes: ss.Separability = ss.separability(model, [sink_map, other])
    tokens: ss.TokenStatistics = ss.token_statistics([sink_map, other])
    measures: ss.OtherMeasures = ss.other_measures(model, sink_map)
    results = [
        attribution, pooled, curve, removal, path, patched, stages, response, neurons, heads,
        decomposition, profiles, law, weakening, probes, tokens, measures,
    ]  # fmt: skip
    return [result.to_frame() for result in results]


def main() -> None:
    """The session, from a model to a table."""
    model = ss.load_model("qwen2.5-coder-0.5b", dtype=torch.float32)
    planted = ss.planted_model(n_layers=8)
    try:
        sink_map = find(model, "Once upon a time", Path("out"))
    except (ss.InputError, ss.LoadError, ss.ModelError) as error:
        raise SystemExit(str(error)) from error
    other = ss.detect_sinks(planted.load(), planted.text(64))
    check: ss.ModelCheck = ss.check_model(model, n_tokens=1000)
    strong: ss.SinkMap = sink_map.refilter(min_strength=0.5, min_lifetime=3)
    agreement: ss.AttentionCheck = ss.attention_check(strong)
    recall: float = agreement.recall
    print(check.passed, check.to_frame(), recall)
    rows = intervene(model, sink_map, torch.ones(896))
    provenance: ss.Provenance = rows.provenance
    print(observe(model, "Once"), provenance, analyse(model, sink_map, other))
    print(ss.random_planted(0))


if __name__ == "__main__":
    main()
