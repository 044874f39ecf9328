"""Which tokens came nearest to being called sinks, and which test they failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from secondary_sinks.sinks.criterion import next_layer, norm_ratio

if TYPE_CHECKING:
    import pandas as pd

    from secondary_sinks.sinks.sink_map import SinkMap


def margins(sink_map: SinkMap, n: int | None) -> pd.DataFrame:
    """See `SinkMap.margins`."""
    import pandas as pd

    thresholds = sink_map.thresholds
    passed = torch.stack(
        [
            sink_map.array("centered_alignment") / thresholds["min_alignment"],
            norm_ratio(sink_map.array("centered_norm"), sink_map.array("background_centered_norm"))
            / thresholds["min_norm_ratio"],
            next_layer(sink_map.array("attention_ratio")) / thresholds["min_attention_ratio"],
        ]
    )  # [test, layer, token]
    inside = torch.zeros(passed.shape[1], dtype=torch.bool)
    for start, end in sink_map.phases or ((0, passed.shape[1]),):
        inside[start:end] = True
    closeness = passed.nan_to_num(nan=0.0).amin(dim=0)
    closeness[~inside] = -torch.inf
    nearest, layer = closeness.max(dim=0)
    called = {sink.position for sink in sink_map.sinks} | {sink_map.primary_position}
    tests = ("alignment", "magnitude", "attention")
    rows = []
    for token in nearest.argsort(descending=True).tolist():
        if token in called:
            continue
        values = passed[:, layer[token], token]
        rows.append(
            {
                "position": token,
                "token": sink_map.token_strings[token],
                "layer": int(layer[token]),
                "alignment": float(values[0]),
                "magnitude": float(values[1]),
                "attention": float(values[2]),
                "closeness": float(nearest[token]),
                "failed": tests[int(values.nan_to_num(nan=0.0).argmin())],
            }
        )
        if n is not None and len(rows) == n:
            break
    columns = ["position", "token", "layer", *tests, "closeness", "failed"]
    return pd.DataFrame(rows, columns=columns)
