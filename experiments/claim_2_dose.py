"""Claim 2: the norm of the written vector decides attention and lifetime.

Claim: the norm of what the MLP writes determines the sink score of the secondary sink, and for how
many layers it lasts.

Tested by intervention: the same token gets the same vector at 21 lengths from nothing to 2.5 times
the model's own. Supported if, in at least 80 % of the sinks, both the direct sink score and the
lifetime rise with the dose (Spearman above 0.8), not supported otherwise. Where lifetimes saturate,
the smallest dose from which on they are that of the clean run is told beside.
"""

from __future__ import annotations

import pandas as pd
from shared import Bench, Outcome, Verdict, cannot_tell, main, percent

import secondary_sinks as ss

MIN_RHO, MIN_SHARE = 0.8, 0.8
PER_TEXT = 3
"""The strongest sinks of each text are dosed."""


def run(bench: Bench) -> Outcome:
    """Dose-response of a few sinks of each text that has a writer for them."""
    curves: list[ss.DoseResponse] = []
    for text, (sinks, attribution) in enumerate(
        zip(bench.close, bench.attributions if bench.close else (), strict=True)
    ):
        named = sorted(
            (one for one in attribution.sinks if one.writer is not None),
            key=lambda one: -one.norm,
        )
        for one in named[:PER_TEXT]:
            sink = next(
                s for s in sinks.secondary if (s.position, s.l_start) == (one.position, one.onset)
            )
            curves.append(
                ss.dose_response(
                    bench.model,
                    sinks,
                    sink,
                    writer=one.writer,
                    totals=text == 0 and not curves,
                    seed=bench.seed,
                    progress=False,
                )
            )
    if not curves:
        return cannot_tell(bench, f"No sink with a writer to dose: {bench.about()}.")
    rhos = pd.DataFrame(
        {
            "position": [one.position for one in curves],
            "token": [one.token for one in curves],
            "writer": [one.writer for one in curves],
            "score_rho": [one.score_correlation.rho for one in curves],
            "lifetime_rho": [one.lifetime_correlation.rho for one in curves],
            "saturation_dose": [one.saturation_dose for one in curves],
        }
    )
    score = (rhos["score_rho"] > MIN_RHO).mean()
    life = (rhos["lifetime_rho"] > MIN_RHO).mean()
    holds = min(score, life) >= MIN_SHARE
    why = (
        f"{len(curves)} sinks of {len(bench.close)} texts ({bench.name}): Spearman of written norm "
        f"and direct sink score has median {rhos['score_rho'].median():.2f} and exceeds {MIN_RHO} "
        f"in {percent(score)}; of written norm and lifetime, median "
        f"{rhos['lifetime_rho'].median():.2f}, and {percent(life)}. The lifetime is that of the "
        f"clean run from a median dose of {percent(rhos['saturation_dose'].median())} of the "
        f"model's own norm on."
    )
    return Outcome(
        Verdict("supported" if holds else "not supported", why),
        figures={"claim_2_dose": curves[0].plot()},
        tables={"claim_2_dose": curves[0].to_frame(), "claim_2_sinks": rhos},
    )


if __name__ == "__main__":
    main(run, "claim_2_dose", __doc__)
