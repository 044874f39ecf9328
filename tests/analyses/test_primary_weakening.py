"""Planted secondary sinks weaken the primary, by observation and when they are taken out."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secondary_sinks as ss


@functools.cache
def texts():
    """Texts of one length with 0 to 5 of two planted sinks."""
    planted = ss.planted_model()
    host = planted.load()
    generator = torch.Generator().manual_seed(1)
    listed = []
    for count in (0, 1, 2, 3, 4, 5, 0, 2, 4):
        ids = torch.randint(20, 60, (48,), generator=generator)
        ids[0] = 0
        places = torch.randperm(34, generator=generator)[:count] + 4
        ids[places] = torch.tensor([9, 17])[torch.arange(count) % 2]
        listed.append(ids)
    return host, ss.detect_sinks(host, listed, progress=False)


def test_planted_sinks_weaken_the_primary():
    host, maps = texts()
    removals = [ss.remove_sinks(host, maps[index], n_controls=2) for index in (2, 5)]
    found = ss.primary_weakening(maps, removals=removals)
    assert [len(one.secondary) for one in maps] == [0, 1, 2, 3, 4, 5, 0, 2, 4]
    assert found.relation().adjusted.high < -0.5
    assert found.relation().within_layers.high < 0
    assert found.relation().slope_high < 0
    assert (found.causal.change > 0).all()
    assert (found.causal.change > 5 * found.causal.control_change.abs()).all()
    # What a sink takes by observation is of the size of what its removal gives back.
    assert 0.3 < float(-found.relation().slope / found.causal.per_sink.mean()) < 3
    assert repr(found).endswith("in 2 texts)")
    assert [axes.get_label() for axes in found.plot().axes][-1] == "removal"


def test_a_removal_must_be_of_one_of_the_texts():
    host, maps = texts()
    removal = ss.remove_sinks(host, maps[2], n_controls=1)
    with pytest.raises(ss.InputError, match="another text"):
        ss.primary_weakening(maps[3], removals=removal)
    with pytest.raises(ss.InputError, match="reverse"):
        ss.primary_weakening(maps, removals=[dataclasses.replace(removal, donors=(3,))])
