"""Figure 4: inside the writer's MLP a secondary sink comes to look like the primary.

Claim: the writer maps an ordinary-looking input to an output along the primary's: the alignment of
the sink's token with the primary's arises within the MLP, between its input and its output.

Supported if, over the sinks of the texts that are looked at closely, the median cosine of the MLP's
output exceeds that of its input by 0.2 or more, and lies above the ordinary tokens' band; not
supported otherwise.
"""

from __future__ import annotations

import pandas as pd
from shared import Bench, Outcome, Verdict, cannot_tell, main

import secondary_sinks as ss

MIN_RISE = 0.2


def run(bench: Bench) -> Outcome:
    """Stages of the texts that are looked at closely; the picture is of the richest."""
    if not bench.close:
        return cannot_tell(bench)
    found = [ss.mlp_stage_alignment(bench.model, s, seed=bench.seed) for s in bench.close]
    frame = pd.concat([one.to_frame() for one in found], keys=range(len(found)), names=["text"])
    frame = frame.reset_index(level="text")
    median = frame.groupby("stage", sort=False)[["cosine", "ordinary_high"]].median()
    first, last = median.loc["input"], median.loc["output"]
    holds = last.cosine - first.cosine >= MIN_RISE and last.cosine > last.ordinary_high
    stages = ", ".join(f"{stage} {row.cosine:.2f}" for stage, row in median.iterrows())
    why = (
        f"Median cosine with the primary's token in the writer's MLP over "
        f"{sum(len(one.sinks) for one in found)} sinks of {len(found)} texts ({bench.name}): "
        f"{stages}. The upper end of ordinary tokens' band is {first.ordinary_high:.2f} at the "
        f"input and {last.ordinary_high:.2f} at the output."
    )
    return Outcome(
        Verdict("supported" if holds else "not supported", why),
        figures={"figure_4_mlp_stages": found[0].plot()},
        tables={"figure_4_mlp_stages": frame},
    )


if __name__ == "__main__":
    main(run, "figure_4_mlp_stages", __doc__)
