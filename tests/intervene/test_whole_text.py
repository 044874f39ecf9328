"""Whole texts with edits of many tokens, against full passes and the sink map."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.intervene import whole_text
from secondary_sinks.intervene.clean_run import CleanRun

N = 24
I = ss.Intervention  # noqa: E741


@pytest.fixture(scope="module")
def llama(tiny, tokens_of):
    """A tiny model and the sink map of a text."""
    return tiny("llama"), ss.detect_sinks(tiny("llama"), tokens_of(N))


def test_without_texts_there_is_the_clean_state(llama):
    model, sink_map = llama
    state, edited = whole_text.run_whole_texts(model, CleanRun(sink_map), [])
    assert edited == []
    torch.testing.assert_close(state.norm, sink_map.norm)
    torch.testing.assert_close(
        state.sink_score[:, :, :-1], sink_map.mean_attention[:, :, :-1], rtol=1e-4, atol=1e-6
    )
    assert state.output.kl == 0


@pytest.mark.parametrize("most", [9, 2])
def test_texts_are_full_passes_whatever_fits_into_memory(llama, monkeypatch, most):
    model, sink_map = llama
    texts = [[I("mlp_out", 1, position, ss.Zero())] for position in (3, 5, 8, 11, 13)]
    full = ss.counterfactuals(model, sink_map, texts, method="full", progress=False)
    real = whole_text._one_pass

    def small_machine(model, clean, chunk, *arguments):
        if len(chunk) > most:
            raise MemoryError
        return real(model, clean, chunk, *arguments)

    monkeypatch.setattr(whole_text, "_one_pass", small_machine)
    _, states = whole_text.run_whole_texts(
        model, CleanRun(sink_map), texts, progress=False, reduce=lambda state: state
    )
    for row, state in enumerate(states):
        score = state.sink_score.mean(dim=1)
        torch.testing.assert_close(score, full.totals.sink_score[row], equal_nan=True)
        assert state.output.loss == pytest.approx(float(full.totals.loss[row]), rel=1e-5)
        position = texts[row][0].position
        torch.testing.assert_close(state.norm[:, position], full.norm[row], rtol=1e-4, atol=1e-4)


def test_a_text_that_does_not_fit_is_an_error(llama, monkeypatch):
    model, sink_map = llama

    def too_small(*_):
        raise MemoryError

    monkeypatch.setattr(whole_text, "_one_pass", too_small)
    with pytest.raises(ss.ModelError, match="two copies of 24 tokens do not fit into memory"):
        whole_text.run_whole_texts(model, CleanRun(sink_map), [[I("mlp_out", 1, 3, ss.Zero())]])
