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
    from secondary_sinks.explain.sinks import Evidence as Evidence
    from secondary_sinks.explain.sinks import Sink as Sink
    from secondary_sinks.explain.sinks import SinkMap as SinkMap
    from secondary_sinks.observe.collectors import Collector as Collector
    from secondary_sinks.observe.collectors import MassiveActivations as MassiveActivations
    from secondary_sinks.observe.collectors import Norms as Norms
    from secondary_sinks.observe.collectors import ResidualGeometry as ResidualGeometry
    from secondary_sinks.observe.collectors import ResidualNorms as ResidualNorms
    from secondary_sinks.observe.collectors import SinkScores as SinkScores
    from secondary_sinks.observe.collectors import sink_rate as sink_rate
    from secondary_sinks.observe.received_attention import ReceivedAttention as ReceivedAttention
    from secondary_sinks.observe.trace import Trace as Trace
    from secondary_sinks.observe.trace import trace as trace
    from secondary_sinks.questions.detect_sinks import detect_sinks as detect_sinks
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
    "load_model": "models.load",
    "list_models": "models.load",
    "counterfactuals": "questions.counterfactuals",
    "CounterfactualRows": "questions.counterfactuals",
    "attribute_to_mlps": "questions.attribute_to_mlps",
    "MlpAttribution": "explain.attribution",
    "pool_attributions": "explain.pooling",
    "PooledAttribution": "explain.pooling",
    "mean_activations": "questions.mean_activations",
    "MeanActivations": "explain.means",
    "sink_decomposition": "questions.sink_decomposition",
    "SinkDecomposition": "explain.decomposition",
    "head_reads": "questions.head_reads",
    "HeadReads": "explain.heads",
    "dose_response": "questions.dose_response",
    "DoseResponse": "explain.doses",
    "remove_sinks": "questions.remove_sinks",
    "SinkRemoval": "explain.removal",
    "mlp_stage_alignment": "questions.mlp_stage_alignment",
    "MlpStages": "explain.mlp_stages",
    "mlp_response": "questions.mlp_response",
    "MlpResponse": "explain.mlp_response",
    "neuron_contributions": "questions.neuron_contributions",
    "NeuronContributions": "explain.neurons",
    "patch_activations": "questions.patch_activations",
    "PatchResult": "explain.patching",
    "path_effect": "questions.path_effect",
    "PathEffect": "explain.paths",
    "norm_profiles": "questions.norm_profiles",
    "NormProfiles": "explain.norm_profiles",
    "norm_law": "questions.norm_law",
    "NormLaw": "explain.norm_law",
    "primary_weakening": "questions.primary_weakening",
    "PrimaryWeakening": "explain.weakening",
    "separability": "questions.separability",
    "Separability": "explain.separability",
    "token_statistics": "questions.token_statistics",
    "TokenStatistics": "explain.token_statistics",
    "other_measures": "questions.other_measures",
    "OtherMeasures": "explain.measures",
    "Intervention": "intervene.interventions",
    **dict.fromkeys(
        ("Add", "KeepOnly", "Mean", "ProjectOut", "Replace", "Resample", "Scale", "Zero"),
        "intervene.edits",
    ),
    "planted_model": "models.planted",
    "random_planted": "models.planted",
    "AttentionEntropy": "observe.entropy",
    "ChosenVectors": "observe.vectors",
    "Collector": "observe.collectors",
    "MassiveActivations": "observe.collectors",
    "Norms": "observe.collectors",
    "ResidualGeometry": "observe.collectors",
    "ResidualNorms": "observe.collectors",
    "SinkScores": "observe.collectors",
    "sink_rate": "observe.collectors",
    "AttentionColumns": "observe.attention_columns",
    "ColumnRequest": "observe.attention_columns",
    "ReceivedAttention": "observe.received_attention",
    "Trace": "observe.trace",
    "trace": "observe.trace",
    "Evidence": "explain.sinks",
    "Sink": "explain.sinks",
    "SinkMap": "explain.sinks",
    "SinkLevels": "explain.levels",
    "detect_sinks": "questions.detect_sinks",
    "sink_levels": "questions.sink_levels",
    "read_reference": "questions.reference_files",
    "write_reference": "questions.reference_files",
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
