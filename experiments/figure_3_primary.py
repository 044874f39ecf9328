"""Figure 3: the primary sink weakens where secondary sinks live.

Claim: in the layers that see live secondary sinks, the primary draws less attention.

The number that is judged is the correlation of the primary's sink score with the number of live
secondary sinks after each layer's and each text's mean was taken off both: depth alone changes
both, and would make them correlate. Supported if its interval, over resampled texts, lies below
zero; not supported if it lies above; cannot tell otherwise. What causes it is asked by
`claim_3_primary.py`.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, interval, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """The primary's score over all texts and layers."""
    if len(bench.with_sinks) < 2:
        return cannot_tell(bench)
    found = ss.primary_weakening(bench.maps, seed=bench.seed)
    one = found.relation("number")
    adjusted = one.adjusted
    if adjusted.high < 0:
        answer = "supported"
    elif adjusted.low > 0:
        answer = "not supported"
    else:
        answer = "cannot tell"
    why = (
        f"{bench.about()}: without the means of layers and texts, the primary's sink score "
        f"correlates {adjusted.rho:.2f} ({interval(adjusted.low, adjusted.high)}) with the number "
        f"of live secondary sinks; one more goes with {one.slope:+.3f} of sink score. Pooled over "
        f"layers the correlation is {one.pooled.rho:.2f}, which depth confounds."
    )
    return Outcome(
        Verdict(answer, why),
        figures={"figure_3_primary": found.plot()},
        tables={"figure_3_primary": found.to_frame()},
    )


if __name__ == "__main__":
    main(run, "figure_3_primary", __doc__)
