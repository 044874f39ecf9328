"""Classes from strings alone; counts that add up; intervals and lifts."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import beta

import secondary_sinks as ss
from secondary_sinks.analyses.token_statistics import token_class
from secondary_sinks.host.model_info import ModelInfo
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.sinks.sink import Sink
from secondary_sinks.sinks.sink_map import SinkMap


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("<|im_start|>", "special"),
        ("<s>", "special"),
        ("[INST]", "special"),
        ("\n", "whitespace"),
        ("  ", "whitespace"),
        ("", "whitespace"),
        (",", "punctuation"),
        (".\n", "punctuation"),
        (" =", "punctuation"),
        ("<", "punctuation"),
        (" 12", "digit"),
        (" The", "article"),
        ("an", "article"),
        (" don't", "word"),
        ("你", "word"),
        ("x2", "other"),
        ("\ufffd", "other"),
    ],
)
def test_classes(token, kind):
    assert token_class(token) == kind


def a_map(words, secondary):
    ids = [hash_of(word) for word in words]
    sinks = [Sink(0, words[0], ids[0], "primary", (1, 2, 3))]
    sinks += [Sink(place, words[place], ids[place], "secondary", (2, 3)) for place in secondary]
    return SinkMap(
        tokens=torch.tensor(ids),
        token_strings=tuple(words),
        n_tokens=len(words),
        provenance=Provenance(ModelInfo("a model", n_layers=4)),
        criterion="evidence",
        primary_position=0,
        phases=((1, 4),),
        sinks=tuple(sinks),
        norm=torch.ones(4, len(words)),
        mean_attention=torch.ones(4, 1, len(words)),
    )


def hash_of(word):
    return int.from_bytes(word.encode(), "big") % 10007


WORDS = ["<s>", "a", ",", "b", ",", "c", "\n", "d", ",", "9"]


def test_counts_rates_and_lifts():
    maps = [a_map(WORDS, [2, 6]), a_map(["<t>", *WORDS[1:]], [2])]
    result = ss.token_statistics(maps, min_occurrences=2)
    assert (result.n_occurrences, result.n_sinks, result.n_texts_with_sinks) == (18, 3, 2)
    comma = next(one for one in result.of("token") if one.group == ",")
    assert (comma.n, comma.n_sinks, comma.n_texts) == (6, 2, 2)
    assert comma.lift == pytest.approx((2 / 6) / (3 / 18))
    assert comma.low == pytest.approx(beta.ppf(0.025, 2, 5))
    assert comma.high == pytest.approx(beta.ppf(0.975, 3, 4))
    assert comma.lift_high == pytest.approx(comma.high * 6)
    for by in ("class", "position", "occurrence"):
        assert sum(one.n for one in result.of(by)) == 18
        assert sum(one.n_sinks for one in result.of(by)) == 3
    first = {one.group: (one.n_sinks, one.n) for one in result.of("occurrence")}
    assert first == {"1": (3, 14), "2": (0, 2), "3": (0, 2)}
    assert [one.group for one in result.of("token")][:2] == ["\n", ","] or comma.n_sinks == 2
    assert {one.group for one in result.of("class")} == {
        "article", "punctuation", "word", "whitespace", "digit"
    }  # fmt: skip


def test_what_texts_share_at_the_beginning_is_counted_once():
    maps = [a_map(WORDS, [2]), a_map([*WORDS[:9], "8"], [2])]
    result = ss.token_statistics(maps)
    assert (result.n_sinks, result.n_occurrences, result.n_repeated) == (1, 10, 8)
    assert any("counted once" in note for note in result.notes)


def test_the_same_map_twice_is_one_text():
    once, twice = (ss.token_statistics([a_map(WORDS, [2])] * n) for n in (1, 2))
    assert (twice.n_texts, twice.n_sinks, twice.n_occurrences) == (1, 1, 9)
    assert twice.rates == once.rates


def test_other_kinds_of_sinks():
    sink_map = a_map(WORDS, [2, 6])
    primary = ss.token_statistics(sink_map, sinks="primary")
    assert (primary.n_sinks, primary.n_occurrences) == (1, 8)
    everything = ss.token_statistics(sink_map, sinks="all")
    assert (everything.n_sinks, everything.n_occurrences) == (3, 10)


@pytest.mark.slow
def test_no_sinks_no_lift():
    result = ss.token_statistics(a_map(WORDS, []))
    assert result.rate == 0
    assert all(one.lift != one.lift for one in result.rates)
    result.plot()


@pytest.mark.parametrize("count", [5, 50])
def test_every_token_of_the_figure_can_be_read(count):
    words = ["<s>"] + [f"\n{n}internationalization" for n in range(count)] + ["x"] * 9
    result = ss.token_statistics(a_map(words, range(1, count + 1)))
    figure = result.plot()
    figure.canvas.draw()
    axes = {axes.get_label(): axes for axes in figure.axes}
    labels = axes["token"].get_yticklabels()
    assert len(labels) == count
    boxes = [label.get_window_extent() for label in labels]
    assert all(label.get_fontsize() >= 7 for label in labels)
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert all("\\n" in label.get_text() for label in labels)
    inside = figure.bbox
    for one in figure.axes:
        for label in one.get_yticklabels():
            box = label.get_window_extent()
            assert inside.x0 <= box.x0 <= box.x1 <= inside.x1


def test_file_and_bad_input(tmp_path):
    result = ss.token_statistics(a_map(WORDS, [2, 6]))
    back = ss.TokenStatistics.load(result.save(tmp_path / "result.safetensors"))
    assert back == result
    assert back.to_frame().equals(result.to_frame())
    with pytest.raises(ss.InputError, match="min_occurrences"):
        ss.token_statistics(a_map(WORDS, []), min_occurrences=0)
    with pytest.raises(ss.InputError, match="confidence"):
        ss.token_statistics(a_map(WORDS, []), confidence=1)
