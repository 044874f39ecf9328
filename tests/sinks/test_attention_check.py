"""What raw attention says of the sinks of a map, on maps whose steady attention is made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.observe.steady_attention import MIN_SEGMENTS, SteadyAttention
from secondary_sinks.planted.planted_model import PlantedPhase, PlantedSink
from secondary_sinks.sinks.attention_check import CLEAR_NON_SINK, CLEAR_SINK

ABOVE = CLEAR_SINK * 1.01


def steady_map(invented, rows):
    """Five invented sinks; all tokens have steady strength 0.05 but where `rows` says otherwise."""
    sink_map = invented(5)
    strength = torch.full((24, 400), 0.05)
    strength[:, 350:] = torch.nan
    for position, values in rows.items():
        strength[: len(values), position] = torch.tensor(values)
    return replace(sink_map, steady_attention=strength / sink_map.uniform_attention.sqrt())


def test_calls_are_sorted_by_attention_alone(invented):
    called = [sink.position for sink in invented(5).secondary]
    assert max(called) < 350
    sink, weak, false, late, other = called
    free = next(p for p in range(2, 340) if p not in called)
    short = next(p for p in range(free + 1, 340) if p not in called)
    check = ss.attention_check(
        steady_map(
            invented,
            {
                sink: [0.05, *[ABOVE] * 4],
                weak: [0.05, CLEAR_NON_SINK * 1.01],  # between the two
                false: [50.0, *[CLEAR_NON_SINK * 0.99] * 20],  # the first layer does not count
                late: [torch.nan] * 24,
                other: [0.05, *[ABOVE] * 3],  # too short a life to be clear
                free: [0.05, *[ABOVE] * 4],
                short: [0.05, *[ABOVE] * 3, 0.05, *[ABOVE] * 3],  # not in a row
            },
        )
    )
    assert check.clear_sinks == tuple(sorted((sink, free)))
    assert (check.agreed, check.misses) == ((sink,), (free,))
    assert check.false_calls == (false,)
    assert check.open_calls == tuple(sorted((weak, late, other)))
    assert (check.recall, check.precision) == (0.5, 0.5)
    assert check.n_clear_non_sinks + check.n_open + 2 == 399
    frame = check.to_frame().set_index("position")
    assert frame.verdict.to_dict() == {sink: "agreed", free: "miss", false: "false call"}
    assert frame.steady_strength[sink] == pytest.approx(ABOVE)


def test_nothing_clear_is_no_share(invented):
    check = ss.attention_check(steady_map(invented, dict.fromkeys(range(400), [0.2] * 24)))
    assert check.recall != check.recall
    assert check.precision != check.precision
    assert (check.clear_sinks, check.false_calls) == ((), ())


def test_what_cannot_be_checked_is_refused(invented, published):
    with pytest.raises(ss.InputError, match="100 tokens or more"):
        ss.attention_check(steady_map(invented, dict.fromkeys(range(400), [torch.nan] * 24)))
    with pytest.raises(ss.InputError, match="published file"):
        ss.attention_check(published)
    with pytest.raises(ss.InputError, match="got list"):
        ss.attention_check([invented(5)])


def test_sinks_of_a_planted_model_agree():
    planted = ss.planted_model(
        n_layers=12,
        phases=(PlantedPhase(start=1, end=11, norm=400),),
        secondary=(PlantedSink(token=9, writer=3, norm=300, lifetime=7),),
    )
    sink_map = ss.detect_sinks(planted.load(), planted.tokens(400))
    check = ss.attention_check(sink_map)
    early = [sink.position for sink in sink_map.secondary if sink.position < 250]
    assert set(early) <= set(check.agreed)
    assert (check.misses, check.false_calls) == ((), ())


def steady_of(pattern):
    """Steady attention of a pattern [head, query, key] made by hand."""
    from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest

    collector = SteadyAttention()
    columns = AttentionColumns.of_pattern(pattern, ColumnRequest(segments=True))
    collector.start(None)
    collector.update("attention", 0, columns)
    return collector.result()[0]


def test_attention_from_everywhere_and_from_one_passage():
    n = 256
    pattern = torch.tril(torch.ones(2, n, n))
    pattern[:, 20:, 20] = 8  # from all later queries
    pattern[:, 150:190, 40] = 200  # from one passage
    pattern /= pattern.sum(dim=2, keepdim=True)
    steady = steady_of(pattern)
    assert steady[20] > 5
    assert steady[[5, 40, 60]].max() < 1.1
    assert torch.isnan(steady[-8 * MIN_SEGMENTS :]).all()
    assert not torch.isnan(steady[: n - 8 * (MIN_SEGMENTS + 1)]).any()


def test_uniform_attention_is_one_within_a_window_as_well():
    n, window = 256, 100
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = (key <= query) & (key > query - window)
    steady = steady_of((visible / visible.sum(dim=1, keepdim=True))[None])
    known = ~torch.isnan(steady)
    assert known.sum() > 100
    torch.testing.assert_close(steady[known], torch.ones(int(known.sum())), rtol=1e-4, atol=0.0)
