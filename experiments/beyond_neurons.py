"""Beyond the paper: a few neurons of the writer make the sink.

Claim: less than 5 % of the writer's neurons make 90 % of what it writes along the sink direction,
and they are necessary: with these neurons at zero the token is not a sink, with as many random
others at zero it remains one.

Supported if both hold for at least 80 % of the sinks; not supported otherwise.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, main, percent

import secondary_sinks as ss

MAX_SHARE, MIN_SINKS = 0.05, 0.8


def run(bench: Bench) -> Outcome:
    """Neurons of the text with the most sinks."""
    if not bench.close:
        return cannot_tell(bench)
    try:
        neurons = ss.neuron_contributions(
            bench.model, bench.close[0], seed=bench.seed, progress=False
        )
    except ss.ModelError as error:  # a mixture of experts does not expose its neurons
        return cannot_tell(bench, str(error))
    frame = neurons.to_frame()
    width = neurons.contribution.shape[1]
    few = frame["k"] <= MAX_SHARE * width
    gone = frame["ablate_top.length_left"] < 0.25
    stays = frame["ablate_random.lifetime"] > 0.5 * frame["lifetime"]
    share = float((few & gone & stays).mean())
    why = (
        f"{len(frame)} sinks of one text ({bench.name}, writer MLP "
        f"{', '.join(map(str, sorted(set(frame['writer']))))} with {width} neurons): a median of "
        f"{frame['k'].median():.0f} neurons make {neurons.share:.0%} of the write. With them at "
        f"zero {percent(frame['ablate_top.length_left'].mean())} of the length is left on average, "
        f"with as many random others at zero {percent(frame['ablate_random.length_left'].mean())}; "
        f"with them alone {percent(frame['keep_top.length_left'].mean())}. The claim holds for "
        f"{percent(share)} of the sinks."
    )
    return Outcome(
        Verdict("supported" if share >= MIN_SINKS else "not supported", why),
        figures={"beyond_neurons": neurons.plot()},
        tables={"beyond_neurons": frame, "beyond_neurons_shared": neurons.neurons_frame()},
    )


if __name__ == "__main__":
    main(run, "beyond_neurons", __doc__)
