"""Beyond the paper: other published measures see other tokens.

Claim: the thresholded sink rate of Gu et al. and massive activations name the primary sink, and
miss the secondary sinks of this library's criterion.

Supported if, over the texts that are examined closely, each of the two names fewer than half of the
secondary sinks; not supported otherwise.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, by_text, cannot_tell, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """All measures over the texts that are examined closely."""
    if not bench.close:
        return cannot_tell(bench)
    measures = [ss.other_measures(bench.model, sink_map) for sink_map in bench.close]
    frame = by_text(measures)
    secondary = frame[frame["secondary"]]
    names = [name for name in ("gu", "massive", "published") if name in frame]
    shares = {name: float(secondary[name].mean()) for name in names}
    holds = len(secondary) > 0 and all(shares[n] < 0.5 for n in ("gu", "massive") if n in shares)
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    why = (
        f"Of {len(secondary)} secondary sinks that could be compared in {len(measures)} texts "
        f"({bench.name}), the other measures name: {listed}. Together they name "
        f"{int((~frame['secondary']).sum())} tokens that are not secondary sinks, primaries "
        f"included."
    )
    return Outcome(
        Verdict("supported" if holds else "not supported", why),
        figures={"beyond_measures": measures[0].plot()},
        tables={"beyond_measures": frame},
    )


if __name__ == "__main__":
    main(run, "beyond_measures", __doc__)
