"""A result comes back from disk as it was, whatever its fields hold."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import secondary_sinks as ss
from secondary_sinks.result import Result


class Point(NamedTuple):
    name: str
    at: int


@dataclass(frozen=True)
class Part:
    value: Float[Tensor, " token"]
    spans: tuple[tuple[int, int], ...]
    inner: Part | None = None


@dataclass(frozen=True)
class Everything(Result):
    part: Part
    parts: tuple[Part, ...]
    named: dict[str, Part]
    counts: dict[tuple[int, int], int]
    points: tuple[Point, ...]
    pair: tuple[str, Part]
    absent: Part | None
    score: float
    listed: list[int]
    free: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "Everything(<&>)"

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame({"token": ["\n"], "score": [self.score]})


@pytest.fixture
def everything() -> Everything:
    part = Part(torch.arange(3.0), ((1, 2), (3, 4)), inner=Part(torch.zeros(0), ()))
    return Everything(
        part=part,
        parts=(part, Part(torch.ones(2), ((5, 6),))),
        named={"a.b": part},
        counts={(5, 17): 3, (6, 1): 1},
        points=(Point("x", 1), Point("y", 2)),
        pair=("first", part),
        absent=None,
        score=math.nan,
        listed=[1, 2],
        free={"processing": ("folded",), "tensor": torch.eye(2), "deep": {"list": [1, (2, 3)]}},
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and equal(vars(one), vars(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        same = type(one) is type(other) and len(one) == len(other)
        return same and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other or (one != one and other != other)


def test_every_kind_of_field_comes_back(everything, tmp_path):
    back = Everything.load(everything.save(tmp_path / "all.safetensors"))
    assert equal(back, everything)
    assert isinstance(back.points[0], Point)
    assert isinstance(back.parts[1], Part)
    assert isinstance(back.part.inner, Part)


def test_a_file_of_other_fields_is_refused_by_name(everything, tmp_path):
    path = everything.save(tmp_path / "all.safetensors")

    @dataclass(frozen=True)
    class Everything2(Result):
        part: Part

    Everything2.__name__ = "Everything"
    with pytest.raises(ss.LoadError, match="not a saved Everything of this version"):
        Everything2.load(path)


def test_a_notebook_shows_tokens_so_that_they_can_be_seen(everything):
    shown = everything._repr_html_()
    assert "Everything(&lt;&amp;&gt;)" in shown
    assert "'\\n'" in shown


def test_every_public_result_says_where_it_comes_from():
    public = [getattr(ss, name) for name in ss.__all__]
    kinds = [kind for kind in public if inspect.isclass(kind) and issubclass(kind, Result)]
    assert len(kinds) > 15
    for kind in kinds:
        names = {field.name for field in dataclasses.fields(kind)}
        assert "provenance" in names, kind
        assert not names & {"model", "seed", "engine"}, f"{kind}: recorded in provenance"
        assert "plot" not in vars(kind), f"{kind} finds its figure by name"
