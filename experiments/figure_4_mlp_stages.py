"""Figure 4: inside the writer's MLP a secondary sink comes to look like the primary.

Claim: the writer maps an ordinary-looking input to an output along the primary's: the alignment of
the sink's token with the primary's arises within the MLP, between its input and its output.

The primary was written by an MLP as well, in the layer where it emerges. Supported if, over the
sinks of the texts that are examined closely, the median cosine of the writer's output with *that*
output exceeds the cosine of the two MLPs' inputs by 0.2 or more, and lies above that of ordinary
tokens; not supported otherwise. The cosines stage by stage with the primary's token in the writer's
own layer are the figure; there the primary's MLP has nothing to write any more in some models, and
a cosine with next to nothing says little.
"""

from __future__ import annotations

import torch
from shared import Bench, Outcome, Verdict, by_text, cannot_tell, main

import secondary_sinks as ss

MIN_RISE = 0.2


def run(bench: Bench) -> Outcome:
    """Stages of the texts that are examined closely; the picture is of the richest."""
    if not bench.close:
        return cannot_tell(bench)
    found = [ss.mlp_stage_alignment(bench.model, s, seed=bench.seed) for s in bench.close]
    frame = by_text(found)
    own = frame.groupby("stage", sort=False)["cosine"].median()
    first, last = (
        torch.cat([one.emergence_cosine[:, one.stages.index(stage)] for one in found]).nanmedian()
        for stage in ("input", "output")
    )
    ordinary = torch.cat(
        [one.emergence_ordinary[:, one.stages.index("output")].flatten() for one in found]
    ).nanmedian()
    holds = bool(last - first >= MIN_RISE and last > ordinary)
    stages = ", ".join(f"{stage} {cosine:.2f}" for stage, cosine in own.items())
    why = (
        f"Over {sum(len(one.sinks) for one in found)} sinks of {len(found)} texts ({bench.name}), "
        f"with the MLP that wrote the primary: median cosine of the inputs {first:.2f}, of the "
        f"outputs {last:.2f} (ordinary tokens {ordinary:.2f}). With the primary's token in the "
        f"writer's own layer: {stages}."
    )
    return Outcome(
        Verdict("supported" if holds else "not supported", why),
        figures={"figure_4_mlp_stages": found[0].plot()},
        tables={"figure_4_mlp_stages": frame},
    )


if __name__ == "__main__":
    main(run, "figure_4_mlp_stages", __doc__)
