"""Figure 2: secondary sinks come at a few discrete levels.

Claim: the pairs of onset and lifetime (sink levels) of a model's secondary sinks are few and recur
from text to text.

Supported if determinism is above 0.5 (0: no two sinks share a pair, 1: all do) and the largest
three levels hold at least 80 % of the sinks; not supported otherwise. Whether that grows with the
size of a model takes models of several sizes: see `levels_over_models.py`.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, main, percent

import secondary_sinks as ss

LEAST_SINKS = 10
N_LEVELS = 3


def run(bench: Bench) -> Outcome:
    """Levels over all texts."""
    levels = ss.sink_levels(bench.maps)
    outcome = {
        "figures": {"figure_2_levels": levels.plot()},
        "tables": {"figure_2_levels": levels.to_frame()},
    }
    if levels.n_sinks < LEAST_SINKS:
        why = f"Only {levels.n_sinks} secondary sinks: {bench.about()}."
        return Outcome(cannot_tell(bench, why).verdict, **outcome)
    first = levels.levels[:N_LEVELS]
    share = sum(level.n_sinks for level in first) / levels.n_sinks
    named = ", ".join(
        f"({level.onset}, {level.lifetime}) with {level.n_sinks} sinks in {level.n_texts} texts"
        for level in first
    )
    holds = levels.determinism > 0.5 and share >= 0.8
    why = (
        f"{bench.about()}: the largest levels (onset, lifetime) are {named}; they hold "
        f"{percent(share)} of all. Determinism {levels.determinism:.2f} (0: no two sinks share a "
        f"pair, 1: all do)."
    )
    return Outcome(Verdict("supported" if holds else "not supported", why), **outcome)


if __name__ == "__main__":
    main(run, "figure_2_levels", __doc__)
