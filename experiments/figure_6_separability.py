"""Figure 6: future sinks differ from other tokens before they become sinks.

Claim: the residual stream, the attention's output and the MLP's output separate future sinks from
tokens that will not become sinks, before the onset.

Measured by a linear probe, tested on texts it was not trained on, against the *same token* where it
does not become a sink. Supported if the probe on the residual before the onset's block beats
shuffled labels; not supported if it does not; cannot tell where there are too few texts.
"""

from __future__ import annotations

import math

from shared import Bench, Outcome, Verdict, cannot_tell, main

import secondary_sinks as ss


def run(bench: Bench) -> Outcome:
    """Probes over the texts with the most sinks."""
    if not bench.with_sinks:
        return cannot_tell(bench)
    probes = ss.separability(bench.model, bench.many, seed=bench.seed)
    site = probes.sites.index("resid_pre")
    auc = float(probes.same_token.auc[site, probes.onset])
    chance = float(probes.same_token.chance_high[site, probes.onset])
    p_value = float(probes.same_token.p_value[site, probes.onset])
    if math.isnan(auc):
        answer = "cannot tell"
    else:
        answer = "supported" if p_value <= 0.05 else "not supported"
    first = probes.first_layer("resid_pre")
    when = "not before the onset" if first is None else f"from layer {first} on"
    why = (
        f"{probes.same_token.n_sinks} future sinks of onset {probes.onset} and "
        f"{probes.same_token.n_others} occurrences of the same tokens that are not sinks, in "
        f"{probes.same_token.n_texts} texts ({bench.name}): before the onset's block the probe has "
        f"an area of {auc:.2f} under the ROC curve (shuffled labels up to {chance:.2f}; p "
        f"{p_value:.2g}); it beats them {when}. Position alone has an area of "
        f"{probes.same_token.position_auc:.2f}. {' '.join(probes.notes)}"
    )
    return Outcome(
        Verdict(answer, why.strip()),
        figures={"figure_6_separability": probes.plot()},
        tables={"figure_6_separability": probes.to_frame()},
    )


if __name__ == "__main__":
    main(run, "figure_6_separability", __doc__)
