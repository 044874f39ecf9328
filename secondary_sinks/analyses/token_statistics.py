"""Which tokens, at which positions, become secondary sinks?

Every token of every text is one occurrence, the primary sinks left out, and what texts share at
their beginning counted once. An occurrence is a sink if the token is a secondary sink in any layer.
A group of occurrences (a token id, a class of strings, a tenth of the text, the first, second, ...
occurrence of an id in its text) has a *rate*, and a *lift*: its rate over that of all occurrences.

The interval of the rate is Clopper and Pearson's, which takes occurrences for independent. Those of
one text are not, so it is too narrow where few texts hold all the sinks; `n_texts` says how many
do. The interval of the lift takes the overall rate as known.

Classes are decided from the string alone, so that they mean the same in every tokenizer:

>>> [token_class(token) for token in ("<|im_end|>", "\n", ",", " 12", " the", " You", "ß→")]
['special', 'whitespace', 'punctuation', 'digit', 'article', 'word', 'other']
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.result import Result
from secondary_sinks.sinks.corpus import measured, shared_by
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

By = Literal["token", "class", "position", "occurrence"]

GROUPINGS: tuple[By, ...] = ("token", "class", "position", "occurrence")

CLASSES = ("special", "whitespace", "punctuation", "digit", "article", "word", "other")

"""Of the strings, in the order in which they are tried (see `token_class`)."""

ARTICLES = frozenset({"the", "a", "an"})

N_POSITIONS = 10

MOST_OCCURRENCES = 5

"""From this occurrence of an id in its text on they are counted together."""

_SPECIAL = re.compile(r"<\|.*\|>|<[^<>\s]+>|\[[A-Z_]{2,}\]", re.DOTALL)


def token_statistics(
    maps: SinkMap | Sequence[SinkMap], *, min_occurrences: int = 5, confidence: float = 0.95
) -> TokenStatistics:
    """Rates at which tokens become secondary sinks, against their frequency.

    By token id, by class of string (special, whitespace, punctuation, digit, article, word, other),
    by tenth of the text, and by how often the id came before in its text. Each rate has an interval
    and a lift over the rate of all tokens; `analyses.token_statistics` tells how, and what the
    interval does not cover.

    What it is not evidence for: that the token's *identity* makes it a sink. Kinds of tokens stand
    in different places and after different words; `separability` asks what tells a sink from the
    same token elsewhere.

    Args:
        maps: sink maps of one or many texts of one model, from `detect_sinks`.
        min_occurrences: tokens that are never a sink are listed if they occur at least this often.
        confidence: of the intervals.

    Raises:
        InputError: no maps, maps of several models or without measurements, or options out of
            range.
    """
    if min_occurrences < 1:
        raise InputError(f"min_occurrences is {min_occurrences}; it must be 1 or more")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it lies between 0 and 1")
    return count_tokens(maps, min_occurrences=min_occurrences, confidence=confidence)


class TokenRate(NamedTuple):
    """How often the occurrences of one group are secondary sinks."""

    by: str
    """What the group is of: "token", "class", "position" or "occurrence"."""
    group: str
    """The token's string, the class, the tenth ("0-10 %"), or the occurrence ("1", ..., "5+")."""
    token_id: int
    """Of a token; -1 for other groups."""
    n: int
    """Occurrences."""
    n_sinks: int
    n_texts: int
    """Texts in which one of them is a sink."""
    rate: float
    low: float
    high: float
    """95 % interval of the rate."""
    lift: float
    """Rate over that of all occurrences; NaN without sinks."""
    lift_low: float
    lift_high: float


@dataclass(frozen=True)
class TokenStatistics(Result):
    """Which tokens become secondary sinks over many texts; see `token_statistics`."""

    rates: tuple[TokenRate, ...]
    """Every class, position and occurrence that occurs, and every token that is a sink at least
    once or occurs often; by grouping, and tokens by number of sinks."""
    n_occurrences: int
    n_sinks: int
    n_texts: int
    n_texts_with_sinks: int
    n_repeated: int
    """Occurrences left out because an earlier text begins alike."""
    notes: tuple[str, ...]
    model: dict[str, Any]

    @property
    def rate(self) -> float:
        """Share of all occurrences that are secondary sinks."""
        return self.n_sinks / self.n_occurrences if self.n_occurrences else math.nan

    def of(self, by: By) -> list[TokenRate]:
        """The groups of one grouping."""
        return [one for one in self.rates if one.by == by]

    def __repr__(self) -> str:
        first = [one for one in self.of("token") if one.n_sinks][:3]
        most = ", ".join(f"{one.group!r} {one.n_sinks} of {one.n}" for one in first)
        return (
            f"TokenStatistics({self.model.get('name', '?')!r}, {self.n_sinks} sinks among "
            f"{self.n_occurrences} tokens of {self.n_texts} texts{': ' if most else ''}{most})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each group."""
        import pandas as pd

        return pd.DataFrame(self.rates, columns=TokenRate._fields)


def token_class(token: str) -> str:
    """What a token is, decided from its string alone.

    "special": in angle or square brackets as templates and tokenizers write them; "whitespace":
    nothing else, the empty string included; "punctuation": punctuation and symbols, with or without
    space around; "digit", "article" (the English "the", "a", "an"), "word" (letters, with
    apostrophes, hyphens or underscores) likewise; "other": all else.
    """
    if _SPECIAL.fullmatch(token):
        return "special"
    inner = token.strip()
    if not inner:
        return "whitespace"
    kinds = {unicodedata.category(character)[0] for character in inner}
    if kinds <= {"P", "S"} and "\ufffd" not in inner:
        return "punctuation"
    if kinds == {"N"}:
        return "digit"
    if inner.casefold() in ARTICLES:
        return "article"
    letters = {unicodedata.category(c)[0] for c in inner if c not in "'’-_"}
    return "word" if letters and letters <= {"L", "M"} else "other"


def count_tokens(
    maps: SinkMap | Sequence[SinkMap], *, min_occurrences: int, confidence: float
) -> TokenStatistics:
    """Count the occurrences of all texts by group; see `token_statistics`."""
    several = measured(maps)
    totals: Counter[tuple[By, str, int]] = Counter()
    sinks: Counter[tuple[By, str, int]] = Counter()
    texts: dict[tuple[By, str, int], set[int]] = defaultdict(set)
    n_repeated = n_all = n_sinks = 0
    with_sinks = set()
    for index, (one, shared) in enumerate(zip(several, shared_by(several), strict=True)):
        secondary = {sink.position for sink in one.secondary}
        left_out = {sink.position for sink in one.primary} | {one.primary_position}
        for position, groups in enumerate(_groups(one)):
            if position in left_out:
                continue
            if position < shared:
                n_repeated += 1
                continue
            is_sink = position in secondary
            n_all += 1
            n_sinks += is_sink
            if is_sink:
                with_sinks.add(index)
            for key in groups:
                totals[key] += 1
                sinks[key] += is_sink
                if is_sink:
                    texts[key].add(index)
    overall = n_sinks / n_all if n_all else math.nan
    rates = [
        _rate(key, totals[key], sinks[key], len(texts[key]), overall, confidence)
        for key in totals
        if key[0] != "token" or sinks[key] or totals[key] >= min_occurrences
    ]
    return TokenStatistics(
        rates=tuple(sorted(rates, key=_order)),
        n_occurrences=n_all,
        n_sinks=n_sinks,
        n_texts=len(several),
        n_texts_with_sinks=len(with_sinks),
        n_repeated=n_repeated,
        notes=_notes(n_repeated, n_sinks, len(with_sinks)),
        model=several[0].model,
    )


def _groups(one: SinkMap) -> list[tuple[tuple[By, str, int], ...]]:
    """The groups of every token of a text."""
    seen: Counter[int] = Counter()
    found = []
    ids = cast(Tensor, one.tokens).tolist()
    for position, (token_id, string) in enumerate(zip(ids, one.token_strings, strict=True)):
        seen[token_id] += 1
        tenth = min(N_POSITIONS - 1, position * N_POSITIONS // one.n_tokens)
        count = seen[token_id]
        times = f"{MOST_OCCURRENCES}+" if count >= MOST_OCCURRENCES else str(count)
        width = 100 // N_POSITIONS
        keys: tuple[tuple[By, str, int], ...] = (
            ("token", string, token_id),
            ("class", token_class(string), -1),
            ("position", f"{tenth * width}-{(tenth + 1) * width} %", -1),
            ("occurrence", times, -1),
        )
        found.append(keys)
    return found


def _rate(
    key: tuple[By, str, int],
    n: int,
    n_sinks: int,
    n_texts: int,
    overall: float,
    confidence: float,
) -> TokenRate:
    from scipy.stats import binomtest

    by, group, token_id = key
    interval = binomtest(n_sinks, n).proportion_ci(confidence, method="exact")
    scale = 1 / overall if overall > 0 else math.nan
    return TokenRate(
        by=by,
        group=group,
        token_id=token_id,
        n=n,
        n_sinks=n_sinks,
        n_texts=n_texts,
        rate=n_sinks / n,
        low=float(interval.low),
        high=float(interval.high),
        lift=n_sinks / n * scale,
        lift_low=float(interval.low) * scale,
        lift_high=float(interval.high) * scale,
    )


def _order(one: TokenRate) -> tuple[Any, ...]:
    number = GROUPINGS.index(cast(By, one.by))
    if one.by == "token":
        return number, -one.n_sinks, -one.rate, -one.n, one.token_id
    if one.by == "class":
        return number, CLASSES.index(one.group)
    return number, int(one.group.split("-")[0].rstrip("+"))


def _notes(n_repeated: int, n_sinks: int, n_texts_with_sinks: int) -> tuple[str, ...]:
    notes = []
    if n_repeated:
        notes.append(
            f"{n_repeated} tokens stand at a beginning that an earlier text has too, and were "
            "counted once"
        )
    if n_sinks == 0:
        notes.append("no secondary sinks, so there is no lift")
    elif n_texts_with_sinks < 5:
        notes.append(
            f"all sinks stand in {n_texts_with_sinks} text"
            f"{'' if n_texts_with_sinks == 1 else 's'}: the intervals, which take occurrences for "
            "independent, are too narrow"
        )
    return tuple(notes)
