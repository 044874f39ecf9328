"""Figure 7: sinks with a larger write are stronger and live longer.

Claim: the norm of the vector that the writer adds correlates with the attention that the sink draws
and with its lifetime.

Judged by Spearman's correlations within texts (a longer text lowers every score, so texts are not
pooled), with intervals over resampled texts. Supported if both intervals lie above zero; not
supported if one lies below; cannot tell otherwise, for example where all sinks live equally long.
Not evidence for a cause, which `claim_2_dose.py` tests.
"""

from __future__ import annotations

import math

from shared import Bench, Outcome, Verdict, cannot_tell, interval, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """The law over the texts with the most sinks."""
    if not bench.with_sinks:
        return cannot_tell(bench)
    law = ss.norm_law(bench.model, bench.many, seed=bench.seed)
    score = law.relation("score").within_texts
    life = law.relation("lifetime").within_texts
    fitted = law.relation("score").law
    if score.low > 0 and life.low > 0:
        answer = "supported"
    elif score.high < 0 or life.high < 0:
        answer = "not supported"
    else:
        answer = "cannot tell"
    varies = "" if not math.isnan(life.rho) else " (lifetimes do not vary within texts)"
    why = (
        f"{len(law.tokens)} distinct sinks of {law.n_texts} texts ({bench.name}): within texts the "
        f"written norm correlates {score.rho:.2f} ({interval(score.low, score.high)}) with the "
        f"sink score and {life.rho:.2f} ({interval(life.low, life.high)}) with the "
        f"lifetime{varies}. Score goes as norm to the power {fitted.exponent:.2f} "
        f"({interval(fitted.low, fitted.high)}), which explains {fitted.explained:.0%} of its "
        f"variance within texts. {' '.join(law.notes)}"
    )
    return Outcome(
        Verdict(answer, why.strip()),
        figures={"figure_7_norm_law": law.plot()},
        tables={"figure_7_norm_law": law.to_frame()},
    )


if __name__ == "__main__":
    main(run, "figure_7_norm_law", __doc__)
