"""Beyond the paper: one block ends a sink, as one block made it.

Claim: a secondary sink does not fade but is erased: one later block subtracts its vector, and
without that block's output the token stays a sink for longer.

Supported if at least 80 % of the sinks that end before the last layer have such an eraser; not
supported otherwise.
"""

from __future__ import annotations

from collections import Counter

from shared import Bench, Outcome, Verdict, by_text, cannot_tell, main, percent

import secondary_sinks as ss

MIN_SHARE = 0.8


def run(bench: Bench) -> Outcome:
    """Decompositions of the texts that are examined closely."""
    if not bench.close:
        return cannot_tell(bench)
    decompositions = [
        ss.sink_decomposition(bench.model, sink_map, progress=False) for sink_map in bench.close
    ]
    frame = by_text(decompositions)
    ended = frame[frame["last_layer"] < decompositions[0].n_layers - 1]
    outcome = {
        "figures": {"beyond_erasers": decompositions[0].plot()},
        "tables": {"beyond_erasers": frame},
    }
    if not len(ended):
        why = f"All sinks live to the last layer: {bench.about()}."
        return Outcome(Verdict("cannot tell", why), **outcome)
    share = float(ended["eraser"].notna().mean())
    named = Counter(ended["eraser"].dropna())
    counts = ", ".join(f"{eraser} ({count})" for eraser, count in named.most_common(4)) or "none"
    why = (
        f"{percent(share)} of {len(ended)} sinks of {len(decompositions)} texts ({bench.name}) "
        f"that end before the last layer have an eraser: {counts}. It subtracts a median of "
        f"{percent(ended['share'].median())} of their length along the sink direction, and "
        f"{percent(ended['primary_share'].median())} of the primary's own."
    )
    return Outcome(Verdict("supported" if share >= MIN_SHARE else "not supported", why), **outcome)


if __name__ == "__main__":
    main(run, "beyond_erasers", __doc__)
