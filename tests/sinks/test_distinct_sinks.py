"""What texts share at their beginning is counted once, and maps of several models are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secondary_sinks as ss
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.sinks.distinct_sinks import (
    distinct_sinks,
    n_different_texts,
    repeats_note,
    shared_prefixes,
)
from secondary_sinks.sinks.selection import check_one_model
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
        provenance=Provenance(ModelInfo(name, n_layers=4)),
        criterion="evidence",
        primary_position=0,
        phases=((1, 4),),
        sinks=tuple(sinks),
        norm=torch.ones(4, len(ids)),
        mean_attention=torch.ones(4, 1, len(ids)),
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
    assert [(text, sink.position) for text, sink in distinct_sinks(maps)] == [
        (0, 2),
        (0, 3),
        (1, 3),
        (2, 2),
    ]
    assert "1 of 5 sinks" in repeats_note(maps)[0]
    primary = [(text, sink.position) for text, sink in distinct_sinks(maps, "primary")]
    assert primary == [(0, 0), (2, 0)]
    assert len(distinct_sinks(maps, "all")) == 6
    assert n_different_texts([*maps, maps[0]]) == 3


def test_maps_that_do_not_go_together_are_refused():
    one = a_map([1, 2], [])
    assert check_one_model(one) == (one,)
    for wrong, message in (
        ([], "got none"),
        ("a text", "got str"),
        (["a text"], "got str"),
        ([one, a_map([1, 2], [], name="another")], "several models"),
        (dataclasses.replace(one, tokens=None), "holds no tokens"),
    ):
        with pytest.raises(ss.InputError, match=message):
            check_one_model(wrong)
