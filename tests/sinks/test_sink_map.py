"""The sink map as a thing to hold: frame, representation, disk."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import planted_model


@pytest.fixture(scope="module")
def sinks():
    model = planted_model()
    return ss.detect_sinks(model.load(), model.tokens(64))


def test_a_map_comes_back_from_disk_whole(sinks, tmp_path):
    back = ss.SinkMap.load(sinks.save(tmp_path / "deep" / "map.safetensors"))
    assert back.sinks == sinks.sinks
    assert repr(back) == repr(sinks)
    pd.testing.assert_frame_equal(back.to_frame(), sinks.to_frame())
    for name in ("tokens", "alignment", "centered_alignment", "norm", "sink_score"):
        torch.testing.assert_close(getattr(back, name), getattr(sinks, name), equal_nan=True)
    pd.testing.assert_frame_equal(back.margins(), sinks.margins())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["map.safetensors"]


def test_files_that_are_no_maps(sinks, tmp_path):
    with pytest.raises(ss.LoadError, match="cannot read"):
        ss.SinkMap.load(tmp_path / "nowhere.safetensors")
    path = tmp_path / "broken.safetensors"
    path.write_bytes(sinks.save(tmp_path / "map.safetensors").read_bytes()[:-100])
    with pytest.raises(ss.LoadError, match="cannot read"):
        ss.SinkMap.load(path)
    levels = ss.sink_levels(sinks).save(tmp_path / "levels.safetensors")
    with pytest.raises(ss.LoadError, match="SinkLevels, not a SinkMap"):
        ss.SinkMap.load(levels)


def test_a_folder_that_cannot_be_written(sinks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ss.InputError, match="cannot write"):
        sinks.save(tmp_path / "file" / "map.safetensors")


def test_the_frame_says_what_the_sinks_say(sinks):
    frame = sinks.to_frame()
    assert len(frame) == len(sinks.sinks) == len(sinks.primary) + len(sinks.secondary)
    for row, sink in zip(frame.itertuples(), sinks.sinks, strict=True):
        assert (row.position, row.onset, row.lifetime) == (sink.position, *sink.level)
        assert row.last_layer == sink.layers[-1] == sink.l_start + sink.lifetime - 1
        assert row.sink_score == sink.sink_score


def test_evidence_is_read_from_the_arrays(sinks):
    for sink in sinks.sinks:
        rows, evidence = list(sink.layers), sink.evidence
        token = sink.position
        assert evidence.alignment == tuple(sinks.alignment[rows, token].tolist())
        assert evidence.norm == tuple(sinks.norm[rows, token].tolist())
        centered = sinks.centered_norm[:, token] / sinks.background_centered_norm
        ratio = sinks.norm[:, token] / sinks.background_norm
        assert evidence.centered_norm_ratio == tuple(centered[rows].tolist())
        assert evidence.norm_ratio == tuple(ratio[rows].tolist())
        if token < 64 - 8:  # seen by enough queries to have a score of its own
            shown = [layer + 1 for layer in rows if layer + 1 < sinks.n_layers]
            expected = sinks.sink_score[shown, :, token].mean(dim=1).tolist()
            assert [s for s in evidence.sink_score if not math.isnan(s)] == pytest.approx(expected)


def test_representations(sinks):
    assert "secondary sinks, primary at 0 in layers" in repr(sinks)
    assert "\n" not in repr(sinks)
    html = sinks._repr_html_()
    assert html.count("<tr") == len(sinks.sinks) + 1
    assert "<bos>" not in html, "tokens are escaped"


def test_margins_want_measurements(sinks, tiny, tokens_of):
    published = ss.detect_sinks(tiny("llama"), tokens_of(12), criterion="published")
    with pytest.raises(ss.InputError, match="criterion='evidence'"):
        published.margins()


def test_bad_criterion(tiny, tokens_of):
    with pytest.raises(ss.InputError, match="criterion"):
        ss.detect_sinks(tiny("llama"), tokens_of(12), criterion="reference")
    with pytest.raises(ss.InputError, match="min_alignment"):
        ss.detect_sinks(tiny("llama"), tokens_of(12), criterion="published", min_alignment=0.8)


def test_many_texts_in_order(tiny, tokens_of):
    texts = [tokens_of(n, seed=n) for n in (30, 12, 21)]
    maps = ss.detect_sinks(tiny("qwen2"), texts, batch_size=2, progress=False)
    assert [m.n_tokens for m in maps] == [30, 12, 21]
    for text, one in zip(texts, maps, strict=True):
        alone = ss.detect_sinks(tiny("qwen2"), text)
        torch.testing.assert_close(one.alignment, alone.alignment, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            one.sink_score, alone.sink_score, equal_nan=True, rtol=1e-3, atol=1e-5
        )


def test_sinks_are_selected_by_kind_by_position_and_by_themselves(sinks):
    assert sinks.select() == sinks.secondary
    assert sinks.select("primary") == sinks.primary
    assert set(sinks.select("all")) == set(sinks.sinks)
    sink = sinks.secondary[0]
    assert sinks.select(sink) == [sink] == sinks.select(sink.position)
    assert sinks.select([sink, sink.position, torch.tensor(sink.position)]) == [sink], "once"
    assert sinks.select(sinks.secondary[::-1]) == sinks.secondary[::-1]


def test_selection_filters_by_lifetime_and_score(sinks):
    longest = max(sink.lifetime for sink in sinks.secondary)
    assert {s.lifetime for s in sinks.select(min_lifetime=longest)} == {longest}
    strongest = max(sinks.secondary, key=lambda sink: sink.sink_score)
    assert sinks.select(min_score=strongest.sink_score) == [strongest]
    with pytest.raises(ss.InputError, match="pass the filter"):
        sinks.select(min_lifetime=99)


def test_a_position_without_a_sink_is_measured_where_the_sinks_live(sinks):
    position = next(p for p in range(64) if p not in {s.position for s in sinks.sinks})
    (chosen,) = sinks.select(position)
    assert (chosen.position, chosen.kind) == (position, "chosen")
    assert chosen.token == sinks.token_strings[position]
    assert chosen.layers in {sink.layers for sink in sinks.secondary}
    assert math.isnan(chosen.sink_score)
    assert sinks.select([chosen]) == [chosen]
    alone = dataclasses.replace(sinks, sinks=tuple(sinks.primary))
    (start, end) = max(sinks.phases, key=lambda phase: phase[1] - phase[0])
    assert alone.select(position)[0].layers == tuple(range(start, end))


@pytest.mark.parametrize("wrong", [-1, 64, 2.0, True, "tertiary", [None], []])
def test_what_cannot_be_selected(sinks, wrong):
    with pytest.raises(ss.InputError, match="sinks"):
        sinks.select(wrong)


def test_a_sink_of_another_map_is_refused(sinks):
    stranger = dataclasses.replace(sinks.secondary[0], position=50)
    with pytest.raises(ss.InputError, match="not a sink of this map"):
        sinks.select(stranger)


def test_scores_that_few_queries_make_are_hidden_and_kept(sinks):
    assert torch.isnan(sinks.sink_score[:, :, -8:]).all()
    assert not torch.isnan(sinks.mean_attention[:, :, :-1]).any()
    torch.testing.assert_close(sinks.sink_score[:, :, :-8], sinks.mean_attention[:, :, :-8])
