"""The vectors of chosen tokens are those of the full activation, in the order asked for."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss


def test_chosen_vectors_are_the_models_own(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(20)
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    found = ss.trace(model, tokens, [ss.ChosenVectors([7, 3, 7], sites), ss.ResidualNorms()])
    vectors = found["ChosenVectors"]
    with torch.no_grad():
        out = model.original_model(tokens[None], output_hidden_states=True)
    before = torch.stack(out.hidden_states[:-1])[:, 0]
    torch.testing.assert_close(vectors["resid_pre"], before[:, [7, 3, 7]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        vectors["resid_pre"] + vectors["attn_out"] + vectors["mlp_out"],
        vectors["resid_post"],
        rtol=1e-4,
        atol=1e-4,
    )
    norm = vectors["resid_post"].norm(dim=-1)
    torch.testing.assert_close(norm, found["ResidualNorms"][:, [7, 3, 7]])


def test_positions_beyond_the_text_are_refused(tiny, tokens_of):
    with pytest.raises(ss.InputError, match="position 20 lies outside"):
        ss.trace(tiny("llama"), tokens_of(20), [ss.ChosenVectors([20], ["resid_pre"])])
