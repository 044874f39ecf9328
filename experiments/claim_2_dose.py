"""Claim 2: the norm of the written vector decides attention and lifetime.

Claim: the norm of what the MLP writes determines the sink score of the secondary sink, and for how
many layers it lasts.

Tested by intervention: the same token gets the same vector at 21 lengths from nothing to 2.5 times
the model's own. Supported if, in at least 80 % of the sinks, both the direct sink score and the
lifetime rise with the dose (Spearman above 0.8); not supported otherwise. Where lifetimes saturate,
the verdict names the smallest dose from which on they equal the clean run's.
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
    for text, (sink_map, attribution) in enumerate(
        zip(bench.close, bench.attributions, strict=True)
    ):
        written = sorted(
            (sink for sink in attribution.sinks if sink.writer is not None),
            key=lambda sink: -sink.norm,
        )
        for attributed in written[:PER_TEXT]:
            sink = next(
                sink
                for sink in sink_map.secondary
                if (sink.position, sink.l_start) == (attributed.position, attributed.onset)
            )
            curves.append(
                ss.dose_response(
                    bench.model,
                    sink_map,
                    sink,
                    writer=attributed.writer,
                    totals=text == 0 and not curves,
                    seed=bench.seed,
                    progress=False,
                )
            )
    if not curves:
        return cannot_tell(bench, f"No sink with a writer to dose: {bench.about()}.")
    rhos = pd.DataFrame(
        {
            "position": [curve.position for curve in curves],
            "token": [curve.token for curve in curves],
            "writer": [curve.writer for curve in curves],
            "score_rho": [curve.score_correlation.rho for curve in curves],
            "lifetime_rho": [curve.lifetime_correlation.rho for curve in curves],
            "saturation_dose": [curve.saturation_dose for curve in curves],
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
