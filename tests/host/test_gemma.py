"""Gemma-3-270M: four norms a block, windows of 512 tokens in most layers, no chat template."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.errors import InputError
from secondary_sinks.host.attention_replaced import sliding_windows
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.host.precision import tolerance
from secondary_sinks.intervene.clean_run import CleanRun, KeepMasks, KeepText
from secondary_sinks.intervene.full_passes import run_full
from secondary_sinks.intervene.interventions import rows_of
from secondary_sinks.intervene.run_rows import run_chunk

TEXT = "The baker had 12 rolls, sold 5 of them, and baked 3 more. How many rolls were left?"
WINDOW = 512


def test_the_loaded_model_is_gemma(gemma):
    assert (gemma.cfg.model_name, gemma.cfg.n_layers) == ("gemma3-270m", 18)
    assert gemma.to_tokens("The capital")[0].tolist() == [2, 818, 5279]
    logits = gemma(gemma.to_tokens("Monday, Tuesday, Wednesday,"))
    assert gemma.tokenizer.decode(logits[0, -1].argmax()) == " Thursday"
    assert set(sliding_windows(gemma)) == {WINDOW}
    assert check_residual_identity(gemma) < 1e-6


def test_a_conversation_is_refused(gemma):
    with pytest.raises(InputError, match="no chat template; pass plain text"):
        ss.detect_sinks(gemma, [{"role": "user", "content": TEXT}])
    with pytest.raises(InputError, match="no chat template; pass plain text"):
        ss.trace(gemma, TEXT, [ss.Norms("resid_post")], chat=True)


def test_residuals_are_those_of_hugging_face(gemma):
    tokens = gemma.to_tokens(TEXT)
    traced = ss.trace(gemma, tokens, [ss.Norms("resid_post")])["resid_post_norm"]
    with torch.no_grad():
        hidden = gemma.original_model(tokens, output_hidden_states=True).hidden_states
    # The last hidden state is behind the final norm.
    expected = torch.stack(hidden[1:-1])[:, 0].norm(dim=-1)
    torch.testing.assert_close(traced[:-1], expected, rtol=1e-4, atol=1e-3)


def test_engines_agree_with_full_passes_on_a_short_text(gemma):
    sink_map = ss.detect_sinks(gemma, TEXT, primary=0)
    rows = [ss.Intervention("mlp_out", 3, 11, ss.Zero()), ss.Intervention("z", 9, 5, ss.Scale(2.0))]
    full = ss.counterfactuals(gemma, sink_map, rows, method="full", progress=False)
    for engine in ("cached", "packed"):
        result = ss.counterfactuals(gemma, sink_map, rows, method=engine)
        assert result.self_test < tolerance(gemma)
        torch.testing.assert_close(result.norm, full.norm, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(
            result.direct_score, full.direct_score, rtol=1e-2, atol=1e-5, equal_nan=True
        )


def test_engines_agree_with_full_passes_beyond_the_window(gemma):
    """The last tokens see nothing of the first in 15 of 18 layers."""
    text = "\n".join(str(text.content) for text in ss.bundled_texts("prose")[:2])
    tokens = gemma.to_tokens(text)[0, : WINDOW + 8]
    sink_map = ss.detect_sinks(gemma, tokens, primary=0)
    assert sink_map.provenance.attention == "streaming"
    rows = rows_of([ss.Intervention("mlp_out", 6, WINDOW + 2, ss.Zero())])
    full, _ = run_full(gemma, CleanRun(sink_map), rows, totals=False)
    for engine, keep in (("cached", KeepText([WINDOW + 2])), ("packed", KeepMasks({6}))):
        states = run_chunk(engine, gemma, CleanRun.of(gemma, sink_map, keep=keep), rows)
        assert states.difference_from(full) < tolerance(gemma), engine
