"""Figure 5: the writer's MLP responds to a direction of its inputs that sinks have.

Claim: fed multiples of the principal components of its inputs, the writer writes a large vector
along the sink direction for one of them, beyond a threshold; sinks have that component.

Supported if a component separates sinks from ordinary tokens (area under the ROC curve 0.9 or
more) and the MLP's output for that component alone, at the sinks' projection, has a cosine of 0.5
or more with the sink direction; not supported if components separate and none has such an output;
cannot tell if none separates.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, main

import secondary_sinks as ss

MIN_SEPARATION, MIN_COSINE = 0.9, 0.5


def run(bench: Bench) -> Outcome:
    """Components over the texts with the most sinks."""
    if not bench.with_sinks:
        return cannot_tell(bench)
    response = ss.mlp_response(bench.model, bench.many, seed=bench.seed)
    frame = response.components_frame()
    separating = frame[frame["separation"] >= MIN_SEPARATION]
    responding = separating[separating["cosine_at_selected"] >= MIN_COSINE]
    best = frame.loc[frame["separation"].idxmax()]
    strongest = frame.loc[frame["cosine_at_selected"].abs().idxmax()]
    if len(responding):
        answer = "supported"
    else:
        answer = "not supported" if len(separating) else "cannot tell"
    n_sinks = int(response.selected.sum())
    why = (
        f"MLP {response.writer} of {bench.name}, inputs of {n_sinks} sinks and "
        f"{len(response.selected) - n_sinks} ordinary tokens: component {best.component:.0f} "
        f"separates them best (area {best.separation:.2f}, {best.variance_ratio:.0%} of the "
        f"variance); at the sinks' projection the MLP's output for it alone has a cosine of "
        f"{best.cosine_at_selected:.2f} with the sink direction and a norm of "
        f"{best.norm_at_selected:.1f}. The output most along that direction is for component "
        f"{strongest.component:.0f} "
        f"({strongest.cosine_at_selected:.2f}, norm {strongest.norm_at_selected:.1f})."
    )
    return Outcome(
        Verdict(answer, why),
        figures={"figure_5_principal_directions": response.plot()},
        tables={
            "figure_5_principal_directions": frame,
            "figure_5_curves": response.to_frame(),
        },
    )


if __name__ == "__main__":
    main(run, "figure_5_principal_directions", __doc__)
