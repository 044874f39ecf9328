"""Figure 4: inside the writer's MLP a secondary sink becomes aligned with the primary.

Claim: the writer maps an ordinary-looking input to an output along the primary's: the alignment of
the sink's token with the primary's arises within the MLP, between its input and its output.

The primary was written by an MLP as well, in the layer where it emerges. Supported if, over the
sinks of the texts that are examined closely, the median cosine of the writer's output with *that*
output exceeds the cosine of the two MLPs' inputs by 0.2 or more, and lies above that of ordinary
tokens; not supported otherwise. The figure shows the cosines stage by stage with the primary's
token in the writer's layer. They are weaker evidence: in some models the MLP writes next to nothing
into the primary there.
"""

from __future__ import annotations

import torch
from shared import Bench, Outcome, Verdict, by_text, cannot_tell, main

import secondary_sinks as ss

MIN_RISE = 0.2


def run(bench: Bench) -> Outcome:
    """Stages of the texts that are examined closely; the figure is of the one with most sinks."""
    if not bench.close:
        return cannot_tell(bench)
    stages = [
        ss.mlp_stage_alignment(bench.model, sink_map, seed=bench.seed) for sink_map in bench.close
    ]
    frame = by_text(stages)
    in_the_writer = frame.groupby("stage", sort=False)["cosine"].median()
    first, last = (
        torch.cat([s.emergence_cosine[:, s.stages.index(stage)] for s in stages]).nanmedian()
        for stage in ("input", "output")
    )
    ordinary = torch.cat(
        [s.emergence_ordinary[:, s.stages.index("output")].flatten() for s in stages]
    ).nanmedian()
    holds = bool(last - first >= MIN_RISE and last > ordinary)
    listed = ", ".join(f"{stage} {cosine:.2f}" for stage, cosine in in_the_writer.items())
    why = (
        f"Over {sum(len(text.sinks) for text in stages)} sinks of {len(stages)} texts "
        f"({bench.name}), with the MLP that wrote the primary: median cosine of the inputs "
        f"{first:.2f}, of the outputs {last:.2f} (ordinary tokens {ordinary:.2f}). With the "
        f"primary's token in the writer's layer: {listed}."
    )
    return Outcome(
        Verdict("supported" if holds else "not supported", why),
        figures={"figure_4_mlp_stages": stages[0].plot()},
        tables={"figure_4_mlp_stages": frame},
    )


if __name__ == "__main__":
    main(run, "figure_4_mlp_stages", __doc__)
