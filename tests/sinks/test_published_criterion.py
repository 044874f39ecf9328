"""The published rule, against a second writing of it from hidden states, and its files."""

from __future__ import annotations

import json

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.planted.planted_model import random_planted
from secondary_sinks.sinks import published_criterion
from secondary_sinks.sinks.sink import kind_by_lifetime


def published(hidden, ids, candidates, n_layers):
    """The rule as published, in the plainest words. `hidden`: [layer, token, d_model]."""
    norms = hidden.norm(dim=-1)
    primary = max(candidates, key=lambda p: norms[:, p].mean().item())
    rise = [norms[layer + 1, primary] - norms[layer, primary] for layer in range(n_layers - 1)]
    start = max(range(len(rise)), key=lambda i: rise[i]) + 1
    end = min(range(start, len(rise)), key=lambda i: rise[i]) + 1 if start < len(rise) else n_layers
    sinks = {primary: list(range(start, end))}
    for layer in range(start, end):
        for token in range(primary + 1, len(ids)):
            cosine = torch.cosine_similarity(hidden[layer, token], hidden[layer, primary], dim=0)
            if abs(cosine) > 0.9:
                sinks.setdefault(token, []).append(layer)
    label = {}
    for token, layers in sinks.items():
        n = len(layers)
        label[token] = (
            "secondary" if 4 < n < n_layers - 15 else "primary" if n >= n_layers - 15 else "noise"
        )
    return primary, sinks, label


def check_parity(model, tokens, *, chat):
    with torch.no_grad():
        out = model.original_model(tokens[None], output_hidden_states=True)
    hidden = torch.stack(out.hidden_states[1:])[:, 0].float()
    candidates = (0, 1, 2) if chat else (0, 1)
    primary, layers, label = published(hidden, tokens.tolist(), candidates, len(hidden))
    sinks = ss.detect_sinks(model, tokens, criterion="published", chat=chat)
    assert sinks.primary_position == primary
    assert {s.position: list(s.layers) for s in sinks.sinks} == layers
    assert {s.position: s.kind for s in sinks.sinks} == label
    return sinks


@pytest.mark.parametrize("chat", [True, False])
def test_parity_on_random_models(tiny, family, tokens_of, chat):
    for seed in range(3):
        check_parity(tiny(family), tokens_of(20, seed=seed), chat=chat)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_parity_on_planted_models(seed):
    model = random_planted(seed)
    sinks = check_parity(model.load(), model.tokens(80, seed=seed)[0], chat=False)
    assert len(sinks.sinks) > 1


def test_labels_at_their_borders():
    kinds = [kind_by_lifetime(n, 36) for n in (1, 4, 5, 20, 21, 36)]
    assert kinds == ["noise", "noise", "secondary", "secondary", "primary", "primary"]
    assert kind_by_lifetime(9, 24) == "primary", "the fixed 15 fails for shallow models"


def test_the_clipper_takes_the_larger_rise_and_the_larger_fall_after_it():
    assert published_criterion.clip_layers(torch.tensor([1.0, 9, 9, 2, 50, 50, 45, 10, 1])) == (
        4,
        7,
    )
    assert published_criterion.clip_layers(torch.tensor([1.0, 2, 9])) == (2, 3)
    assert published_criterion.clip_layers(torch.tensor([5.0])) == (0, 1)


RECORD = {
    "candidate_sinks": {
        "0": {"layer": [6, 7, 8, 9], "token_id": 5, "sink_type": "bos_sink"},
        "12": {"layer": [7, 8], "token_id": 6, "sink_type": "secondary"},
        "3": {"layer": [7, 9], "token_id": 7, "sink_type": "noise"},
    },
    "sample_index": 4,
    "prompt_len": 10,
    "response_len": 20,
    "full_text_len": 30,
}


def test_records_are_written_as_they_were_read(tmp_path):
    path = tmp_path / "published.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD | {"sample_index": 5}) + "\n")
    maps = ss.read_published(path)
    assert [m.record["sample_index"] for m in maps] == [4, 5]
    assert [s.position for s in maps[0].secondary] == [12]
    assert maps[0].primary[0].layers == (6, 7, 8, 9)
    ss.write_published(tmp_path / "again.jsonl", maps)
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_a_text_without_sinks_can_be_written_and_read(tmp_path, tiny, tokens_of):
    sinks = ss.detect_sinks(tiny("llama"), tokens_of(20))
    assert sinks.sinks == ()
    (back,) = ss.read_published(ss.write_published(tmp_path / "none.jsonl", sinks))
    assert back.sinks == ()
    assert ss.sink_levels(back).n_texts == 1


def test_older_files_say_cliff(tmp_path):
    record = json.loads(json.dumps(RECORD))
    record["candidate_sinks"]["12"]["sink_type"] = "cliff"
    path = tmp_path / "older.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (sinks,) = ss.read_published(path)
    assert [s.kind for s in sinks.sinks] == ["primary", "secondary", "noise"]


def test_measured_maps_go_out_and_come_back(tmp_path, tiny, tokens_of):
    model = tiny("llama")
    maps = [
        ss.detect_sinks(model, tokens_of(20, seed=seed), criterion="published") for seed in (0, 1)
    ]
    path = ss.write_published(tmp_path / "own.jsonl", maps, prompt_lengths=[5, 6])
    back = ss.read_published(path)
    assert [m.record["prompt_len"] for m in back] == [5, 6]
    assert [m.record["response_len"] for m in back] == [15, 14]
    for one, other in zip(maps, back, strict=True):
        assert [(s.position, s.layers, s.kind, s.token_id) for s in one.sinks] == [
            (s.position, s.layers, s.kind, s.token_id) for s in other.sinks
        ]


@pytest.mark.parametrize(
    "line",
    [
        '{"candidate_sinks": {"0": {"layer": [1',
        "{}",
        "[]",
        json.dumps(RECORD | {"candidate_sinks": []}),
        json.dumps(
            RECORD | {"candidate_sinks": {"0": {"layer": [], "token_id": 1, "sink_type": "noise"}}}
        ),
        json.dumps(
            RECORD | {"candidate_sinks": {"0": {"layer": [1], "token_id": 1, "sink_type": "odd"}}}
        ),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "corrupt.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n" + line + "\n")
    with pytest.raises(ss.InputError, match="line 3"):
        ss.read_published(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ss.LoadError, match="nowhere"):
        ss.read_published(tmp_path / "nowhere.jsonl")
