"""Claim 1: middle-layer MLPs make the secondary sinks.

Claim: secondary sinks are formed by specific middle-layer MLPs, which map the tokens to vectors
along the primary sink's direction.

Tested by intervention: an MLP is the writer of a sink if it writes the largest part along the sink
direction, if without its output there is no sink, and if its output makes sinks of other tokens.
Supported if at least 80 % of the sinks have such a writer, a transplanted write gains more length
along the direction than a random vector of the same norm (interval over resampled texts above
zero), and the writers are neither the first nor the last block.
"""

from __future__ import annotations

import pandas as pd
from shared import Bench, Outcome, Verdict, cannot_tell, interval, main, percent

import secondary_sinks as ss

MIN_SHARE = 0.8


def run(bench: Bench) -> Outcome:
    """Attributions of the texts that are examined closely, pooled."""
    if not bench.close:
        return cannot_tell(bench)
    pooled = ss.pool_attributions(bench.attributions, seed=bench.seed)
    writers = [writer for writer in pooled.writers if writer.layer is not None]
    share = sum(writer.n_sinks for writer in writers) / pooled.n_sinks
    tables = {
        "claim_1_writers": pooled.to_frame(),
        "claim_1_sinks": pd.concat([result.to_frame() for result in bench.attributions]),
    }
    figures = {"claim_1_writers": bench.attributions[0].plot()}
    if not writers:
        why = f"No MLP passes all three tests for any of {pooled.n_sinks} sinks: {bench.about()}."
        return Outcome(Verdict("not supported", why), figures, tables)
    depth = bench.attributions[0].n_layers
    middle = all(0 < writer.layer < depth - 1 for writer in writers)
    gains = all(writer.gain_over_random.low > 0 or writer.n_texts < 2 for writer in writers)
    holds = share >= MIN_SHARE and middle and gains
    first = writers[0]
    feeders = ", ".join(f"MLP {layer} ({n} sinks)" for layer, n in first.feeders.items()) or "none"
    why = (
        f"{percent(share)} of {pooled.n_sinks} sinks of {pooled.n_texts} texts ({bench.name}, "
        f"{depth} layers) have a writer: "
        + ", ".join(f"MLP {writer.layer} ({writer.n_sinks} sinks)" for writer in writers)
        + f". Without MLP {first.layer} a mean of {percent(first.length_left.value)} of a sink's "
        f"length along the sink direction is left; its output makes sinks of "
        f"{percent(first.transplant_share.value)} of the ordinary tokens that get it, and gains "
        f"{first.gain_over_random.value:.0f} of length over a random direction of the same norm "
        f"({interval(first.gain_over_random.low, first.gain_over_random.high)}; sign-flip p "
        f"{first.p_value:.2g} over {first.n_texts} texts). It needs: {feeders}."
    )
    return Outcome(Verdict("supported" if holds else "not supported", why), figures, tables)


if __name__ == "__main__":
    main(run, "claim_1_writers", __doc__)
