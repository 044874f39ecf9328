"""Beyond the paper: which tokens become secondary sinks.

Claim: tokens of little meaning (delimiters, whitespace, articles, template) become secondary sinks
far more often than words do.

Supported if those classes together have a higher rate than words, with intervals that do not
overlap; not supported if the rate is lower; cannot tell otherwise.
"""

from __future__ import annotations

from shared import Bench, Outcome, Verdict, cannot_tell, main

import secondary_sinks as ss

LITTLE_MEANING = ("punctuation", "whitespace", "article", "special")


def run(bench: Bench) -> Outcome:
    """Rates over all texts."""
    if not bench.with_sinks:
        return cannot_tell(bench)
    statistics = ss.token_statistics(bench.maps)
    classes = {rate.group: rate for rate in statistics.of("class")}
    outcome = {
        "figures": {"beyond_tokens": statistics.plot()},
        "tables": {"beyond_tokens": statistics.to_frame()},
    }
    little = [classes[name] for name in LITTLE_MEANING if name in classes]
    word = classes.get("word")
    if not little or word is None:
        return Outcome(cannot_tell(bench, "Too few kinds of tokens.").verdict, **outcome)
    best = max(little, key=lambda rate: rate.low)
    if best.low > word.high:
        answer = "supported"
    else:
        answer = "not supported" if all(rate.high < word.low for rate in little) else "cannot tell"
    rates = ", ".join(
        f"{name} {rate.n_sinks} of {rate.n} ({rate.lift:.1f} times the mean rate)"
        for name, rate in sorted(classes.items(), key=lambda item: -item[1].rate)
    )
    first = ", ".join(
        f"{rate.group!r} {rate.n_sinks} of {rate.n}"
        for rate in statistics.of("token")[:5]
        if rate.n_sinks
    )
    why = (
        f"{statistics.n_sinks} secondary sinks among {statistics.n_occurrences} tokens of "
        f"{statistics.n_texts} texts ({bench.name}). By class: {rates}. Tokens with most sinks: "
        f"{first}. Sinks that texts share because they begin alike are counted once."
    )
    return Outcome(Verdict(answer, why), **outcome)


if __name__ == "__main__":
    main(run, "beyond_tokens", __doc__)
