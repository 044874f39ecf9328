"""The rule that names a writer, on tensors made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from secondary_sinks.sinks.writers import Control, compare, judge

ONSET = 5


def verdict(write, *, gone=(5,), remnant=(), makes=(5,), onset=ONSET, projection=100.0):
    """`write` by layer; layers that remove the sink; layers whose transplants make one."""
    lifetime = torch.full((8,), 3)
    lifetime[list(gone)] = 0
    left = torch.where(lifetime == 0, 0.0, 1.0)
    left[list(remnant)] = 0.1
    share = torch.zeros(8)
    share[list(makes)] = 1.0
    return judge(torch.tensor(write), projection, lifetime, left, share, onset)


WRITE = [0.0, 0.0, 0.0, 4.0, 6.0, 80.0, 0.0, 0.0]


def test_writer_and_feeders():
    found = verdict(WRITE, gone=(3, 4, 5))
    assert (found.writer, found.feeders, found.co_writers, found.reason) == (5, (3, 4), (), "")
    assert found.write_share == pytest.approx(0.8)
    assert (found.runner_up, found.runner_up_share) == (4, pytest.approx(0.06))


def test_a_layer_without_which_a_remnant_is_left_is_necessary():
    assert verdict(WRITE, gone=(3,), remnant=(4, 5)).feeders == (3, 4)


def test_layers_after_the_onset_cannot_be_writers():
    late = [*WRITE[:7], 500.0]
    assert verdict(late, gone=(5, 7), makes=(5, 7)).writer == 5


def test_an_upstream_layer_that_writes_much_is_no_feeder():
    half = [*WRITE[:4], 40.0, *WRITE[5:]]
    found = verdict(half, gone=(3, 4, 5))
    assert (found.writer, found.feeders, found.co_writers) == (5, (3,), (4,))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"gone": (3,)}, "without it the sink still lives 3 layers with 100%"),
        ({"makes": (4,)}, "only 0% of"),
        ({"write": [-1.0] * 8}, "no MLP up to the onset writes"),
    ],
)
def test_tests_that_disagree_name_nobody(arguments, reason):
    found = verdict(**({"write": WRITE} | arguments))
    assert found.writer is None
    assert found.feeders == ()
    assert reason in found.reason


def test_nothing_to_transplant_into():
    found = judge(
        torch.tensor(WRITE),
        100.0,
        torch.zeros(8).long(),
        torch.zeros(8),
        torch.full((8,), math.nan),
        ONSET,
    )
    assert found.writer is None
    assert "no ordinary token" in found.reason


def test_a_sink_of_the_first_layer_has_no_runner_up():
    found = verdict(WRITE[5:] + [0.0] * 5, gone=(0,), makes=(0,), onset=0)
    assert (found.writer, found.runner_up) == (0, None)


def control(test, kind, position, effect, lifetime=0):
    return Control(0, test, kind, 5, position, -1, effect, lifetime > 0, lifetime)


def test_comparison():
    controls = [control("necessity", "writer", 3, 100.0)]
    controls += [control("necessity", "ordinary", p, float(p)) for p in range(10)]
    controls += [control("sufficiency", "writer", p, 90.0 + p, 4) for p in range(8)]
    controls += [control("sufficiency", "random_direction", p, -5.0) for p in range(8)]
    controls += [control("sufficiency", "other_layer", p, 200.0) for p in range(8)]
    found = compare(controls, seed=0)
    assert (found.necessity_percentile, found.sufficiency_percentile) == (100.0, 50.0)
    assert found.transplant_interval == (4.0, 4.0)
    assert found.p_value == 2**-8


def test_comparison_with_nothing():
    found = compare([control("necessity", "writer", 3, 100.0)], seed=0)
    assert math.isnan(found.necessity_percentile)
    assert math.isnan(found.sufficiency_percentile)
    assert math.isnan(found.p_value)
