"""What texts share at their beginning is counted once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from secondary_sinks.sinks.corpus import distinct_sinks, listed, measured, shared_prefixes

import secondary_sinks as ss
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap

texts = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6)


def a_map(ids, positions, name="a model"):
    sinks = [Sink(0, "x", ids[0], "primary", (1, 2, 3))]
    sinks += [Sink(place, "y", ids[place], "secondary", (2, 3)) for place in positions]
    return SinkMap(
        tokens=torch.tensor(ids),
        token_strings=tuple(map(str, ids)),
        n_tokens=len(ids),
        model={"name": name, "n_layers": 4},
        criterion="evidence",
        thresholds={},
        primary_position=0,
        phases=((1, 4),),
        sinks=tuple(sinks),
    )


@given(texts)
def test_shared_prefixes_are_the_longest_with_any_earlier_text(lists):
    def common(a, b):
        return next(
            (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )

    expected = tuple(
        max((common(text, earlier) for earlier in lists[:index]), default=0)
        for index, text in enumerate(lists)
    )
    assert shared_prefixes(lists) == expected


def test_a_sink_behind_the_same_tokens_is_the_same_sink():
    maps = [a_map([1, 5, 6, 7], [2, 3]), a_map([1, 5, 6, 8], [2, 3]), a_map([2, 5, 6, 7], [2])]
    assert [(found.text, found.sink.position) for found in distinct_sinks(maps)] == [
        (0, 2),
        (0, 3),
        (1, 3),
        (2, 2),
    ]


def test_maps_that_do_not_go_together_are_refused():
    one = a_map([1, 2], [])
    assert listed(one) == (one,)
    with pytest.raises(ss.InputError, match="no sink maps"):
        listed([])
    with pytest.raises(ss.InputError, match="not str"):
        listed(["a text"])
    with pytest.raises(ss.InputError, match="several models"):
        listed([one, a_map([1, 2], [], name="another")])
    with pytest.raises(ss.InputError, match="without measurements"):
        measured(dataclasses.replace(one, tokens=None))
