"""Read and write sink detections in the format of the published implementation.

One JSON record per line and text: `candidate_sinks` maps a position to its layers, token id and
label (`bos_sink`, `secondary`, `noise`; older files have `cliff` for `secondary`), beside
`sample_index`, `prompt_len`, `response_len` and `full_text_len`. The records hold no measurements,
so the maps that are read have sinks but no arrays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secondary_sinks.errors import InputError, LoadError
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.sinks.sink import Kind, Sink
from secondary_sinks.sinks.sink_map import SinkMap
from secondary_sinks.storage import write_atomically

_KIND_OF_LABEL: dict[str, Kind] = {
    "bos_sink": "primary",
    "secondary": "secondary",
    "cliff": "secondary",
    "noise": "noise",
}
_LABEL_OF_KIND: dict[Kind, str] = {
    "primary": "bos_sink",
    "secondary": "secondary",
    "noise": "noise",
}


def read_published(path: str | Path, *, tokenizer: Any = None) -> list[SinkMap]:
    """Read published detections as sink maps, ready for `sink_levels`.

    >>> sink_maps = ss.read_published("sink_detection.jsonl")
    >>> ss.sink_levels(sink_maps)

    Args:
        path: a JSONL file of the published implementation.
        tokenizer: gives token ids their strings; without one a token is shown as `#id`.

    Raises:
        LoadError: the file does not exist or cannot be read.
        InputError: a line is not such a record; the message has the line's number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error}") from error
    sink_maps = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sink_maps.append(_map_of(json.loads(line), Path(path).stem, tokenizer))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"{path}, line {number}: not a sink detection record "
                f"({type(error).__name__}: {error})"
            ) from error
    return sink_maps


def write_published(
    path: str | Path,
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    prompt_lengths: Sequence[int] | None = None,
) -> Path:
    """Write sink maps as records of the published implementation.

    What was read with `read_published` is written back unchanged (except that `cliff` becomes
    `secondary`). A record has one set of layers per token, so the lives of a token are joined, and
    its label is that of the longest.

    >>> ss.write_published("sink_detection.jsonl", sink_maps, prompt_lengths=[120])

    Args:
        path: the JSONL file to write.
        sink_maps: sink maps, measured or read.
        prompt_lengths: number of prompt tokens of each text, which a sink map does not know; by
            default all of its tokens.

    Raises:
        InputError: the file cannot be written, or `prompt_lengths` does not have one entry
            for each map.
    """
    several = [sink_maps] if isinstance(sink_maps, SinkMap) else list(sink_maps)
    if prompt_lengths is not None and len(prompt_lengths) != len(several):
        raise InputError(f"{len(prompt_lengths)} prompt lengths for {len(several)} maps")
    records = []
    for index, sink_map in enumerate(several):
        prompt = sink_map.n_tokens if prompt_lengths is None else prompt_lengths[index]
        lengths = {
            "sample_index": index,
            "prompt_len": prompt,
            "response_len": sink_map.n_tokens - prompt,
            "full_text_len": sink_map.n_tokens,
        }
        records.append({"candidate_sinks": _candidates(sink_map)} | (sink_map.record or lengths))
    text = "".join(json.dumps(record) + "\n" for record in records)
    return write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _map_of(record: dict[str, Any], name: str, tokenizer: Any) -> SinkMap:
    sinks = []
    for position, candidate in record["candidate_sinks"].items():
        token = int(candidate["token_id"])
        string = f"#{token}" if tokenizer is None else str(tokenizer.decode([token]))
        if candidate["sink_type"] not in _KIND_OF_LABEL:
            raise ValueError(f"unknown sink_type {candidate['sink_type']!r}")
        kind = _KIND_OF_LABEL[candidate["sink_type"]]
        layers = tuple(int(layer) for layer in candidate["layer"])
        if not layers:
            raise ValueError(f"the sink at position {position} has no layers")
        sinks.append(Sink(int(position), string, token, kind, layers))
    first = sinks[0] if sinks else None
    return SinkMap(
        tokens=None,
        token_strings=(),
        n_tokens=int(record["full_text_len"]),
        provenance=Provenance(ModelInfo(name)),
        criterion="published",
        primary_position=first.position if first else 0,
        phases=((first.l_start, first.layers[-1] + 1),) if first else (),
        sinks=tuple(sinks),
        record={key: value for key, value in record.items() if key != "candidate_sinks"},
    )


def _candidates(sink_map: SinkMap) -> dict[str, dict[str, Any]]:
    by_position: dict[int, list[Sink]] = {}
    for sink in sink_map.sinks:
        by_position.setdefault(sink.position, []).append(sink)
    return {
        str(position): {
            "layer": sorted(layer for sink in lives for layer in sink.layers),
            "token_id": lives[0].token_id,
            "sink_type": _LABEL_OF_KIND[max(lives, key=lambda sink: sink.lifetime).kind],
        }
        for position, lives in by_position.items()
    }
