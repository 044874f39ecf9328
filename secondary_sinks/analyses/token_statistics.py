"""Which tokens, at which positions, become sinks?

Every token of every text is one occurrence; what texts share at their beginning is counted once.
An occurrence counts as a sink if the token is a secondary sink in any layer; primary sinks are left
out (or the other way round, see `sinks`). A group of occurrences (a token id, a class of strings, a
tenth of the text, the first, second, ... occurrence of an id in its text) has a *rate*, and a
*lift*: its rate over that of all occurrences.

The interval of the rate is Clopper and Pearson's, which assumes independent occurrences. Those of
one text are not independent, so it is too narrow where few texts hold all the sinks; `n_texts` says
how many do. The interval of the lift treats the overall rate as known.

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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from secondary_sinks.errors import InputError
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.distinct_sinks import (
    SinkKinds,
    n_different_texts,
    shared_beginnings,
    sinks_of_kind,
)
from secondary_sinks.sinks.selection import check_one_model
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

By = Literal["token", "class", "position", "occurrence"]

GROUPINGS: tuple[By, ...] = ("token", "class", "position", "occurrence")

CLASSES = ("special", "whitespace", "punctuation", "digit", "article", "word", "other")
"""Of the strings, in the order in which they are tried (see `token_class`)."""

ARTICLES = frozenset({"the", "a", "an"})

N_POSITIONS = 10
"""Parts of a text that positions are counted by."""

MOST_OCCURRENCES = 5
"""From this occurrence of an id in its text on they are counted together."""

FEW_TEXTS = 5
"""A note warns the reader if all sinks stand in fewer texts."""

_SPECIAL = re.compile(r"<\|.*\|>|<[^<>\s]+>|\[[A-Z_]{2,}\]", re.DOTALL)

_Group: TypeAlias = "tuple[By, str, int]"
"""Grouping, name, and token id (-1 where the group is not a token)."""


def token_statistics(
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    sinks: SinkKinds = "secondary",
    min_occurrences: int = 5,
    confidence: float = 0.95,
) -> TokenStatistics:
    """Which tokens become sinks, against how often they occur?

    By token id, by class of string (special, whitespace, punctuation, digit, article, word, other),
    by tenth of the text, and by how often the id came before in its text. Each rate has an interval
    and a lift over the rate of all tokens; the module says how they are computed, and what the
    interval does not cover.

    >>> result = ss.token_statistics(sink_maps)
    >>> result.of("class")
    >>> result.plot()

    Not evidence for: that the token's *identity* makes it a sink. Kinds of tokens stand in
    different places and after different words; `separability` asks what tells a sink from the same
    token elsewhere.

    Args:
        sink_maps: sink maps of one or many texts of one model, from `detect_sinks`.
        sinks: "secondary" leaves out primary sinks, "primary" leaves out secondary ones, "all"
            counts both.
        min_occurrences: tokens that are never a sink are listed if they occur at least this often.
        confidence: of the intervals.

    Raises:
        InputError: no maps, maps of several models or without measurements, or options out of
            range.
    """
    if min_occurrences < 1:
        raise InputError(f"min_occurrences is {min_occurrences}; it must be 1 or more")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it must be between 0 and 1")
    several = check_one_model(sink_maps)
    totals: Counter[_Group] = Counter()
    sink_totals: Counter[_Group] = Counter()
    texts: dict[_Group, set[int]] = defaultdict(set)
    n_repeated = n_all = n_sinks = 0
    with_sinks = set()
    for text, (sink_map, n_shared) in enumerate(
        zip(several, shared_beginnings(several), strict=True)
    ):
        chosen = {sink.position for sink in sinks_of_kind(sink_map, sinks)}
        left_out = _left_out(sink_map, sinks)
        for position, groups in enumerate(_groups(sink_map)):
            if position in left_out:
                continue
            if position < n_shared:
                n_repeated += 1
                continue
            is_sink = position in chosen
            n_all += 1
            n_sinks += is_sink
            totals.update(groups)
            if is_sink:
                with_sinks.add(text)
                sink_totals.update(groups)
                for group in groups:
                    texts[group].add(text)
    overall = n_sinks / n_all if n_all else math.nan
    rates = [
        _rate(group, n, sink_totals[group], len(texts[group]), overall, confidence)
        for group, n in totals.items()
        if group[0] != "token" or sink_totals[group] or n >= min_occurrences
    ]
    return TokenStatistics(
        rates=tuple(sorted(rates, key=_order)),
        sinks=sinks,
        n_occurrences=n_all,
        n_sinks=n_sinks,
        n_texts=n_different_texts(several),
        n_texts_with_sinks=len(with_sinks),
        n_repeated=n_repeated,
        confidence=confidence,
        notes=_notes(sinks, n_repeated, n_sinks, len(with_sinks)),
        provenance=several[0].provenance,
    )


class TokenRate(NamedTuple):
    """How often the occurrences of one group are sinks."""

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
    """Interval of the rate."""
    lift: float
    """Rate over that of all occurrences; NaN without sinks."""
    lift_low: float
    lift_high: float


@dataclass(frozen=True)
class TokenStatistics(Result):
    """Which tokens become sinks over many texts; see `token_statistics`."""

    rates: tuple[TokenRate, ...]
    """Every class, position and occurrence that occurs, and every token that is a sink at least
    once or occurs often; by grouping, and tokens by number of sinks."""
    sinks: SinkKinds
    """Which sinks were counted."""
    n_occurrences: int
    n_sinks: int
    n_texts: int
    """Different texts."""
    n_texts_with_sinks: int
    """Texts that hold the counted sinks."""
    n_repeated: int
    """Occurrences left out because an earlier text begins alike."""
    confidence: float
    """Of the intervals."""
    notes: tuple[str, ...]
    provenance: Provenance
    """Of the first text."""

    @property
    def rate(self) -> float:
        """Share of all occurrences that are sinks."""
        return self.n_sinks / self.n_occurrences if self.n_occurrences else math.nan

    def of(self, by: By) -> list[TokenRate]:
        """The groups of one grouping."""
        return [rate for rate in self.rates if rate.by == by]

    def __repr__(self) -> str:
        first = [rate for rate in self.of("token") if rate.n_sinks][:3]
        most = ", ".join(f"{rate.group!r} {rate.n_sinks} of {rate.n}" for rate in first)
        return (
            f"TokenStatistics({self.provenance.model.name!r}, {counted(self.n_sinks, 'sink')} "
            f"among {counted(self.n_occurrences, 'token')} of {counted(self.n_texts, 'text')}"
            f"{': ' if most else ''}{most})"
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


def _left_out(sink_map: SinkMap, sinks: SinkKinds) -> set[int]:
    """Positions of the sinks that are not asked about."""
    if sinks == "secondary":
        return {sink.position for sink in sink_map.primary} | {sink_map.primary_position}
    return {sink.position for sink in sink_map.secondary} if sinks == "primary" else set()


def _groups(sink_map: SinkMap) -> list[tuple[_Group, ...]]:
    """The groups of every token of a text."""
    counts: Counter[int] = Counter()
    groups: list[tuple[_Group, ...]] = []
    width = 100 // N_POSITIONS
    ids = sink_map.array("tokens").tolist()
    for position, (token_id, string) in enumerate(zip(ids, sink_map.token_strings, strict=True)):
        counts[token_id] += 1
        count = counts[token_id]
        part = min(N_POSITIONS - 1, position * N_POSITIONS // sink_map.n_tokens)
        occurrence = f"{MOST_OCCURRENCES}+" if count >= MOST_OCCURRENCES else str(count)
        groups.append(
            (
                ("token", string, token_id),
                ("class", token_class(string), -1),
                ("position", f"{part * width}-{(part + 1) * width} %", -1),
                ("occurrence", occurrence, -1),
            )
        )
    return groups


def _rate(
    group: _Group, n: int, n_sinks: int, n_texts: int, overall: float, confidence: float
) -> TokenRate:
    from scipy.stats import binomtest

    by, name, token_id = group
    interval = binomtest(n_sinks, n).proportion_ci(confidence, method="exact")
    scale = 1 / overall if overall > 0 else math.nan
    return TokenRate(
        by=by,
        group=name,
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


def _order(rate: TokenRate) -> tuple[Any, ...]:
    number = GROUPINGS.index(cast(By, rate.by))
    if rate.by == "token":
        return number, -rate.n_sinks, -rate.rate, -rate.n, rate.token_id
    if rate.by == "class":
        return number, CLASSES.index(rate.group)
    return number, int(rate.group.split("-")[0].rstrip("+"))


def _notes(
    sinks: SinkKinds, n_repeated: int, n_sinks: int, n_texts_with_sinks: int
) -> tuple[str, ...]:
    notes = []
    if n_repeated:
        notes.append(
            f"{counted(n_repeated, 'token')} in beginnings that an earlier text has too: counted "
            "once"
        )
    if n_sinks == 0:
        notes.append(f"no {'' if sinks == 'all' else sinks + ' '}sinks, so there is no lift")
    elif n_texts_with_sinks < FEW_TEXTS:
        notes.append(
            f"all sinks stand in {counted(n_texts_with_sinks, 'text')}: the intervals, which "
            "assume independent occurrences, are too narrow"
        )
    return tuple(notes)
