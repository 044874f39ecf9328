"""Beyond the paper: the heads that attend to secondary sinks also attend to the primary.

Claim: secondary sinks share the primary's direction, so the same heads attend to both; few heads
attend to secondary sinks alone.

Supported if, of the heads that attend to secondary sinks, at least 80 % attend to the primary as
well and the scores of primary and secondary sinks over heads and live layers correlate positively;
not supported otherwise.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, main, percent

import secondary_sinks as ss

MIN_SHARE = 0.8


def run(bench: Bench) -> Outcome:
    """Heads in the text with the most sinks."""
    if not bench.close:
        return cannot_tell(bench)
    heads = ss.head_reads(bench.model, bench.close[0], seed=bench.seed)
    frame = heads.to_frame()
    outcome = {"figures": {"beyond_heads": heads.plot()}, "tables": {"beyond_heads": frame}}
    readers = frame[frame["role"].isin(["secondary", "both"])]
    if not len(readers):
        why = (
            f"No head attends to the secondary sinks of the text with most of them ({bench.name})."
        )
        return Outcome(Verdict("cannot tell", why), **outcome)
    live = frame[frame["secondary_score"] > 0]
    rho = float(live["primary_score"].corr(live["secondary_score"], method="spearman"))
    share = float((readers["role"] == "both").mean())
    dormant = int(frame["dormant"].sum())
    why = (
        f"{len(readers)} of {len(frame)} heads attend to secondary sinks in the text with most of "
        f"them ({bench.name}); {percent(share)} of them attend to the primary as well. Over heads "
        f"of live layers the two scores correlate {rho:.2f} (Spearman). {dormant} heads are "
        f"dormant: most of their queries spend most attention on sinks with small values."
    )
    holds = share >= MIN_SHARE and rho > 0
    return Outcome(Verdict("supported" if holds else "not supported", why), **outcome)


if __name__ == "__main__":
    main(run, "beyond_heads", __doc__)
