"""Figure 6: future sinks can be told from other tokens before they become sinks.

Claim: the residual stream, the attention's output and the MLP's output separate future sinks from
tokens that will not become sinks, before the onset.

Asked of a linear probe that is tested on texts it was not trained on, against the *same token*
where it does not become a sink. Supported if on the residual before the onset's block the probe
beats shuffled labels; not supported if it does not; cannot tell where there are too few texts.
"""

from __future__ import annotations

import math

from shared import Bench, Outcome, Verdict, cannot_tell, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """Probes over the richest texts."""
    if not bench.with_sinks:
        return cannot_tell(bench)
    found = ss.separability(bench.model, bench.many, seed=bench.seed)
    site = found.sites.index("resid_pre")
    auc = float(found.same_token.auc[site, found.onset])
    chance = float(found.same_token.chance_high[site, found.onset])
    p_value = float(found.same_token.p_value[site, found.onset])
    if math.isnan(auc):
        answer = "cannot tell"
    else:
        answer = "supported" if p_value <= 0.05 else "not supported"
    first = found.first_layer("resid_pre")
    when = "not before the onset" if first is None else f"from layer {first} on"
    why = (
        f"{found.same_token.n_sinks} future sinks of onset {found.onset} and "
        f"{found.same_token.n_others} occurrences of the same tokens that are none, in "
        f"{found.same_token.n_texts} texts ({bench.name}): before the onset's block the probe has "
        f"an area of {auc:.2f} under the ROC curve (shuffled labels up to {chance:.2f}; p "
        f"{p_value:.2g}); it beats them {when}. Position alone has an area of "
        f"{found.same_token.position_auc:.2f}. {' '.join(found.notes)}"
    )
    return Outcome(
        Verdict(answer, why.strip()),
        figures={"figure_6_separability": found.plot()},
        tables={"figure_6_separability": found.to_frame()},
    )


if __name__ == "__main__":
    main(run, "figure_6_separability", __doc__)
