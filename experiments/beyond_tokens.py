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
    found = ss.token_statistics(bench.maps)
    classes = {one.group: one for one in found.of("class")}
    outcome = {
        "figures": {"beyond_tokens": found.plot()},
        "tables": {"beyond_tokens": found.to_frame()},
    }
    little = [classes[name] for name in LITTLE_MEANING if name in classes]
    word = classes.get("word")
    if not little or word is None:
        return Outcome(cannot_tell(bench, "Too few kinds of tokens.").verdict, **outcome)
    best = max(little, key=lambda one: one.low)
    if best.low > word.high:
        answer = "supported"
    else:
        answer = "not supported" if all(one.high < word.low for one in little) else "cannot tell"
    rates = ", ".join(
        f"{name} {one.n_sinks} of {one.n} ({one.lift:.1f} times the mean rate)"
        for name, one in sorted(classes.items(), key=lambda item: -item[1].rate)
    )
    first = ", ".join(
        f"{one.group!r} {one.n_sinks} of {one.n}" for one in found.of("token")[:5] if one.n_sinks
    )
    why = (
        f"{found.n_sinks} secondary sinks among {found.n_occurrences} tokens of {found.n_texts} "
        f"texts ({bench.name}). By class: {rates}. Tokens with most sinks: {first}. Where texts "
        f"begin alike they are counted once."
    )
    return Outcome(Verdict(answer, why), **outcome)


if __name__ == "__main__":
    main(run, "beyond_tokens", __doc__)
