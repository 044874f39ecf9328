"""The rule that names a writer, on tensors made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.writers import Control, compare, judge


def sink(onset=5, kind="secondary"):
    return Sink(3, "t", 9, kind, tuple(range(onset, 8)))


def verdict(
    write, *, gone=(5,), remnant=(), makes=(5,), onset=5, projection=100.0, kind="secondary"
):
    """`write` by layer; layers that remove the sink; layers whose transplants make one."""
    lifetime = torch.full((8,), 3)
    lifetime[list(gone)] = 0
    left = torch.where(lifetime == 0, 0.0, 1.0)
    left[list(remnant)] = 0.1
    share = torch.zeros(8)
    share[list(makes)] = 1.0
    return judge(sink(onset, kind), torch.tensor(write), projection, lifetime, left, share)


WRITE = [0.0, 0.0, 0.0, 4.0, 6.0, 80.0, 0.0, 0.0]


def test_writer_and_feeders():
    result = verdict(WRITE, gone=(3, 4, 5))
    assert (result.writer, result.feeders, result.co_writers, result.reason) == (5, (3, 4), (), "")
    assert result.write_share == pytest.approx(0.8)
    assert (result.runner_up, result.runner_up_share) == (4, pytest.approx(0.06))
    assert (result.length_left, result.transplant_share) == (0, 1)


def test_a_layer_without_which_a_remnant_is_left_is_necessary():
    assert verdict(WRITE, gone=(3,), remnant=(4, 5)).feeders == (3, 4)


def test_layers_after_the_onset_cannot_be_writers():
    late = [*WRITE[:7], 500.0]
    assert verdict(late, gone=(5, 7), makes=(5, 7)).writer == 5


def test_an_upstream_layer_that_writes_much_is_no_feeder():
    half = [*WRITE[:4], 40.0, *WRITE[5:]]
    result = verdict(half, gone=(3, 4, 5))
    assert (result.writer, result.feeders, result.co_writers) == (5, (3,), (4,))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"gone": (3,)}, "without it the sink still lives 3 layers with 100%"),
        ({"makes": (4,)}, "only 0% of"),
        ({"write": [-1.0] * 8}, "no MLP up to the onset writes"),
    ],
)
def test_tests_that_disagree_name_nobody(arguments, reason):
    result = verdict(**({"write": WRITE} | arguments))
    assert result.writer is None
    assert result.feeders == ()
    assert reason in result.reason


def test_nothing_to_transplant_into():
    result = judge(
        sink(),
        torch.tensor(WRITE),
        100.0,
        torch.zeros(8).long(),
        torch.zeros(8),
        torch.full((8,), math.nan),
    )
    assert result.writer is None
    assert "no ordinary token" in result.reason


def test_a_token_that_is_not_a_sink_has_no_writer():
    result = verdict(WRITE, gone=range(8), kind="chosen", projection=-1.0)
    assert (result.writer, result.candidate, result.feeders, result.co_writers) == (None, 5, (), ())
    assert result.reason == "the token at position 3 is not a sink"
    assert math.isnan(result.write_share)
    assert math.isnan(result.runner_up_share)


def test_a_sink_of_the_first_layer_has_no_runner_up():
    result = verdict(WRITE[5:] + [0.0] * 5, gone=(0,), makes=(0,), onset=0)
    assert (result.writer, result.runner_up) == (0, None)


def control(test, kind, position, effect, lifetime=0):
    return Control(0, test, kind, 5, position, -1, effect, lifetime > 0, lifetime)


def test_comparison():
    controls = [control("necessity", "writer", 3, 100.0)]
    controls += [control("necessity", "ordinary", p, float(p)) for p in range(10)]
    controls += [control("sufficiency", "writer", p, 90.0 + p, 4) for p in range(8)]
    controls += [control("sufficiency", "random_direction", p, -5.0) for p in range(8)]
    controls += [control("sufficiency", "other_layer", p, 200.0) for p in range(8)]
    result = compare(controls, seed=0)
    assert (result.necessity_percentile, result.sufficiency_percentile) == (100.0, 50.0)
    assert result.transplant_interval == (4.0, 4.0)
    assert result.p_value == 2**-8


def test_comparison_with_nothing():
    result = compare([control("necessity", "writer", 3, 100.0)], seed=0)
    assert math.isnan(result.necessity_percentile)
    assert math.isnan(result.sufficiency_percentile)
    assert math.isnan(result.p_value)
