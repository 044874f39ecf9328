"""Figure 3: the primary sink weakens where secondary sinks live.

Claim: in the layers that show live secondary sinks, the primary draws less attention.

Measured as the correlation of the primary's sink score with the number of live secondary sinks,
both without the means of each layer and each text: depth changes both, and would make them
correlate. Supported if its interval, over resampled texts, lies below zero; not supported if it
lies above; cannot tell otherwise. Not evidence for a cause, which `claim_3_primary.py` tests.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, interval, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """The primary's score over all texts and layers."""
    if len(bench.with_sinks) < 2:
        return cannot_tell(bench)
    weakening = ss.primary_weakening(bench.maps, seed=bench.seed)
    relation = weakening.relation("number")
    adjusted = relation.adjusted
    if adjusted.high < 0:
        answer = "supported"
    elif adjusted.low > 0:
        answer = "not supported"
    else:
        answer = "cannot tell"
    why = (
        f"{bench.about()}: without the means of layers and texts, the primary's sink score "
        f"correlates {adjusted.rho:.2f} ({interval(adjusted.low, adjusted.high)}) with the number "
        f"of live secondary sinks; one more goes with {relation.slope:+.3f} of sink score. Pooled "
        f"over layers the correlation is {relation.pooled.rho:.2f}, which depth confounds."
    )
    return Outcome(
        Verdict(answer, why),
        figures={"figure_3_primary": weakening.plot()},
        tables={"figure_3_primary": weakening.to_frame()},
    )


if __name__ == "__main__":
    main(run, "figure_3_primary", __doc__)
