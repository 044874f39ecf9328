"""Claim 3: secondary sinks weaken the primary.

Claim: the primary sink weakens in middle layers because secondary sinks emerge there.

Tested by intervention: the outputs of the writers of all secondary sinks of a text are set to zero
at those tokens, and the rest is computed again. Supported if the primary's sink score rises in the
layers whose attention shows the sinks, in every text, by more than in control edits of as many
ordinary tokens and with an interval over texts above zero; not supported if the interval lies below
zero; cannot tell otherwise.
"""

from __future__ import annotations

import pandas as pd
from shared import Bench, Outcome, Verdict, cannot_tell, interval, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """The texts that are examined closely, without their secondary sinks."""
    if not bench.close:
        return cannot_tell(bench)
    causal = ss.primary_weakening(bench.maps, removals=bench.removals, seed=bench.seed).causal
    if causal is None:
        return cannot_tell(bench)
    beyond = bool((causal.change > causal.control_change.nan_to_num(0.0).abs()).all())
    if causal.low > 0 and beyond:
        answer = "supported"
    elif causal.high < 0:
        answer = "not supported"
    else:
        answer = "cannot tell"
    first = bench.removals[0]
    loss = sum(
        float(removal.edited_loss.mean() - removal.clean_loss.mean()) for removal in bench.removals
    ) / len(bench.removals)
    why = (
        f"Without the secondary sinks of {len(causal.change)} texts ({bench.name}) the primary's "
        f"sink score changes by {causal.mean:+.3f} ({interval(causal.low, causal.high)}) in the "
        f"layers that show them; control edits of as many ordinary tokens change it by "
        f"{float(causal.control_change.nanmean()):+.3f}. In the text with the most sinks it goes "
        f"from {first.primary_clean:.3f} to {first.primary_edited:.3f}. The loss changes by "
        f"{loss:+.3f} nats a token on average."
    )
    return Outcome(
        Verdict(answer, why),
        figures={"claim_3_primary": first.plot()},
        tables={"claim_3_primary": first.to_frame(), "claim_3_texts": _frame(bench)},
    )


def _frame(bench: Bench) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "primary_clean": [removal.primary_clean for removal in bench.removals],
            "primary_edited": [removal.primary_edited for removal in bench.removals],
            "p_value": [removal.p_value for removal in bench.removals],
            "clean_loss": [float(removal.clean_loss.mean()) for removal in bench.removals],
            "edited_loss": [float(removal.edited_loss.mean()) for removal in bench.removals],
        }
    )


if __name__ == "__main__":
    main(run, "claim_3_primary", __doc__)
