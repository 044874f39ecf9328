"""Beyond the paper: the heads that look at secondary sinks are those that look at the primary.

Claim: secondary sinks share the primary's direction, so the same heads look at both; few heads
look at secondary sinks alone.

Supported if, of the heads that look at secondary sinks, at least 80 % look at the primary as well
and the scores of primary and secondary sinks over heads and live layers correlate positively; not
supported otherwise.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, main, percent

import secondary_sinks as ss

MIN_SHARE = 0.8


def run(bench: Bench) -> Outcome:
    """Heads in the richest text."""
    if not bench.close:
        return cannot_tell(bench)
    found = ss.head_reads(bench.model, bench.close[0], seed=bench.seed)
    frame = found.to_frame()
    outcome = {"figures": {"beyond_heads": found.plot()}, "tables": {"beyond_heads": frame}}
    readers = frame[frame["role"].isin(["secondary", "both"])]
    if not len(readers):
        why = f"No head looks at the secondary sinks of the richest text of {bench.name}."
        return Outcome(Verdict("cannot tell", why), **outcome)
    live = frame[frame["secondary_score"] > 0]
    rho = float(live["primary_score"].corr(live["secondary_score"], method="spearman"))
    share = float((readers["role"] == "both").mean())
    dormant = int(frame["dormant"].sum())
    why = (
        f"{len(readers)} of {len(frame)} heads look at secondary sinks in the richest text "
        f"({bench.name}); {percent(share)} of them look at the primary as well. Over heads of live "
        f"layers the two scores correlate {rho:.2f} (Spearman). {dormant} heads are dormant: most "
        f"of their queries spend most attention on sinks with small values."
    )
    holds = share >= MIN_SHARE and rho > 0
    return Outcome(Verdict("supported" if holds else "not supported", why), **outcome)


if __name__ == "__main__":
    main(run, "beyond_heads", __doc__)
