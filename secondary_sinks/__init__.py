"""Attention sinks in language models: which tokens, which MLP made them, what changes without.

>>> import secondary_sinks as ss
>>> model = ss.load_model("qwen2.5-coder-0.5b")
>>> sinks = ss.detect_sinks(model, "...", chat=True)
>>> sinks.secondary

Names are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secondary_sinks.errors import InputError as InputError
    from secondary_sinks.errors import LoadError as LoadError
    from secondary_sinks.errors import ModelError as ModelError
    from secondary_sinks.observe.collectors import Collector as Collector
    from secondary_sinks.observe.collectors import MassiveActivations as MassiveActivations
    from secondary_sinks.observe.collectors import Norms as Norms
    from secondary_sinks.observe.collectors import ResidualNorms as ResidualNorms
    from secondary_sinks.observe.collectors import SinkScores as SinkScores
    from secondary_sinks.observe.collectors import sink_rate as sink_rate
    from secondary_sinks.observe.received_attention import ReceivedAttention as ReceivedAttention
    from secondary_sinks.observe.residual_geometry import ResidualGeometry as ResidualGeometry
    from secondary_sinks.observe.trace import Trace as Trace
    from secondary_sinks.observe.trace import trace as trace
    from secondary_sinks.sinks.detect_sinks import detect_sinks as detect_sinks
    from secondary_sinks.sinks.sink import Evidence as Evidence
    from secondary_sinks.sinks.sink import Sink as Sink
    from secondary_sinks.sinks.sink_map import SinkMap as SinkMap
    from secondary_sinks.texts import BundledText as BundledText
    from secondary_sinks.texts import bundled_texts as bundled_texts

__version__ = "0.1.0"

_HOME = {
    "InputError": "errors",
    "LoadError": "errors",
    "ModelError": "errors",
    "SecondarySinksError": "errors",
    "bundled_texts": "texts",
    "BundledText": "texts",
    "load_model": "loading.load_model",
    "list_models": "loading.load_model",
    "counterfactuals": "intervene.counterfactuals",
    "CounterfactualRows": "intervene.counterfactuals",
    "attribute_to_mlps": "analyses.attribution.attribute_to_mlps",
    "MlpAttribution": "analyses.attribution.attribution_result",
    "pool_attributions": "analyses.attribution.pool_attributions",
    "PooledAttribution": "analyses.attribution.pool_attributions",
    "mean_activations": "intervene.mean_activations",
    "MeanActivations": "intervene.mean_activations",
    "sink_decomposition": "analyses.decomposition.sink_decomposition",
    "SinkDecomposition": "analyses.decomposition.decomposition_result",
    "head_reads": "analyses.heads.head_reads",
    "HeadReads": "analyses.heads.head_reads_result",
    "dose_response": "analyses.dose_response",
    "DoseResponse": "analyses.dose_response",
    "remove_sinks": "analyses.remove_sinks",
    "SinkRemoval": "analyses.remove_sinks",
    "mlp_stage_alignment": "analyses.mlp_stage_alignment",
    "MlpStages": "analyses.mlp_stage_alignment",
    "mlp_response": "analyses.mlp_response",
    "MlpResponse": "analyses.mlp_response",
    "neuron_contributions": "analyses.neuron_contributions",
    "NeuronContributions": "analyses.neuron_contributions",
    "patch_activations": "analyses.patch_activations",
    "PatchResult": "analyses.patch_activations",
    "path_effect": "analyses.path_effect",
    "PathEffect": "analyses.path_effect",
    "norm_profiles": "analyses.norm_profiles",
    "NormProfiles": "analyses.norm_profiles",
    "norm_law": "analyses.norm_law",
    "NormLaw": "analyses.norm_law",
    "primary_weakening": "analyses.primary_weakening",
    "PrimaryWeakening": "analyses.primary_weakening",
    "separability": "analyses.separability",
    "Separability": "analyses.separability",
    "token_statistics": "analyses.token_statistics",
    "TokenStatistics": "analyses.token_statistics",
    "other_measures": "analyses.other_measures",
    "OtherMeasures": "analyses.other_measures",
    "Intervention": "intervene.interventions",
    **dict.fromkeys(
        ("Add", "KeepOnly", "Mean", "ProjectOut", "Replace", "Resample", "Scale", "Zero"),
        "intervene.edits",
    ),
    "planted_model": "planted.planted_model",
    "random_planted": "planted.planted_model",
    "AttentionEntropy": "observe.entropy",
    "ChosenVectors": "observe.vectors",
    "Collector": "observe.collectors",
    "MassiveActivations": "observe.collectors",
    "Norms": "observe.collectors",
    "ResidualGeometry": "observe.residual_geometry",
    "ResidualNorms": "observe.collectors",
    "SinkScores": "observe.collectors",
    "sink_rate": "observe.collectors",
    "AttentionColumns": "observe.attention_columns",
    "ColumnRequest": "observe.attention_columns",
    "ReceivedAttention": "observe.received_attention",
    "Trace": "observe.trace",
    "trace": "observe.trace",
    "Evidence": "sinks.sink",
    "Sink": "sinks.sink",
    "SinkMap": "sinks.sink_map",
    "SinkLevels": "sinks.levels",
    "detect_sinks": "sinks.detect_sinks",
    "sink_levels": "sinks.levels",
    "read_published": "sinks.published_files",
    "write_published": "sinks.published_files",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
