"""Figure 1: secondary sinks have large residuals and small values.

Claim: while a secondary sink lives, its residual is much longer than an ordinary token's, as the
primary's is, and its values are shorter: it draws attention and passes little on.

Supported if, over the texts that are examined closely, the median sink has a residual at least
three times as long as the median ordinary token's and values shorter than the median ordinary
token's; not supported if either fails.
"""

from __future__ import annotations

import torch
from shared import Bench, Outcome, Verdict, cannot_tell, main

import secondary_sinks as ss

MIN_RATIO = 3.0


def run(bench: Bench) -> Outcome:
    """Profiles of the texts that are examined closely; the figure is of the one with most sinks."""
    if not bench.close:
        return cannot_tell(bench)
    profiles = [ss.norm_profiles(bench.model, sink_map) for sink_map in bench.close]
    residual, key, value = (
        float(torch.cat([profile.ratio(part) for profile in profiles]).nanmedian())
        for part in ("residual", "key", "value")
    )
    holds = residual >= MIN_RATIO and value < 1
    count = sum(len(profile.sinks) for profile in profiles)
    why = (
        f"Over {count} secondary sinks of {len(profiles)} texts ({bench.name}), the median sink's "
        f"residual is {residual:.1f} times as long as the median ordinary token's, its keys "
        f"{key:.2f} times and its values {value:.2f} times, each over the layers that "
        "show its life."
    )
    return Outcome(
        Verdict("supported" if holds else "not supported", why),
        figures={"figure_1_norms": profiles[0].plot()},
        tables={"figure_1_norms": profiles[0].to_frame()},
    )


if __name__ == "__main__":
    main(run, "figure_1_norms", __doc__)
