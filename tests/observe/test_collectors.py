"""Collectors get every activation once, and give what the full activation gives."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss

N = 24


def test_chosen_vectors_are_the_models_own(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(20)
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    trace_result = ss.trace(model, tokens, [ss.ChosenVectors([7, 3, 7], sites), ss.ResidualNorms()])
    vectors = trace_result["ChosenVectors"]
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
    torch.testing.assert_close(norm, trace_result["ResidualNorms"][:, [7, 3, 7]])


def test_positions_beyond_the_text_are_refused(tiny, tokens_of):
    with pytest.raises(ss.InputError, match="position 20 lies outside"):
        ss.trace(tiny("llama"), tokens_of(20), [ss.ChosenVectors([20], ["resid_pre"])])


def test_a_collector_in_ten_lines(tiny, tokens_of):
    class LargestMlpOutput(ss.Collector):
        sites = ("mlp_out",)

        def start(self, run):
            self.largest = torch.zeros(run.n_layers, run.n_tokens)

        def update(self, site, layer, activation):
            self.largest[layer] = activation.abs().amax(dim=-1)

        def result(self):
            return self.largest

    model, tokens = tiny("llama"), tokens_of(N)
    trace_result = ss.trace(model, tokens, [LargestMlpOutput()])
    _, cache = model.run_with_cache(tokens[None])
    expected = torch.stack([cache[f"blocks.{n}.hook_mlp_out"][0].abs().amax(-1) for n in range(3)])
    torch.testing.assert_close(trace_result["LargestMlpOutput"], expected)
    frame = trace_result.to_frame()
    assert len(frame) == 3 * N
    picked = frame[(frame.layer == 1) & (frame.position == 5)].LargestMlpOutput.item()
    assert picked == pytest.approx(expected[1, 5].item())


def test_collectors_are_settings_and_can_be_used_again(tiny, tokens_of):
    collector = ss.ResidualNorms()
    first = ss.trace(tiny("llama"), tokens_of(N), [collector])["ResidualNorms"]
    ss.trace(tiny("llama"), tokens_of(9), [collector])
    assert first.shape == (3, N)
    assert not hasattr(collector, "_layers")


def test_a_collector_that_changes_what_it_sees_is_refused(tiny, tokens_of):
    class Careless(ss.Collector):
        sites = ("mlp_out",)

        def update(self, site, layer, activation):
            activation.mul_(0)

    with pytest.raises(ss.InputError, match="in place"):
        ss.trace(tiny("llama"), tokens_of(N), [Careless()])


def test_bad_collectors(tiny, tokens_of):
    model = tiny("llama")
    with pytest.raises(ss.InputError, match="no collectors"):
        ss.trace(model, tokens_of(N), [])
    with pytest.raises(ss.InputError, match="named 'ResidualNorms'"):
        ss.trace(model, tokens_of(N), [ss.ResidualNorms(), ss.ResidualNorms()])
    with pytest.raises(ss.InputError, match="no site 'nowhere'"):
        ss.trace(model, tokens_of(N), [ss.Norms("nowhere")])
    with pytest.raises(ss.ModelError, match="mlp_pre_linear"):
        ss.trace(tiny("gpt2"), tokens_of(N), [ss.Norms("mlp_pre_linear")])
    for size in (0, 1.5, None):
        with pytest.raises(ss.InputError, match="batch_size"):
            ss.trace(model, tokens_of(N), [ss.ResidualNorms()], batch_size=size)
    for collectors in (ss.ResidualNorms(), [ss.ResidualNorms], "ResidualNorms", None):
        with pytest.raises(ss.InputError, match="collector"):
            ss.trace(model, tokens_of(N), collectors)
    trace_result = ss.trace(model, tokens_of(N), (c for c in [ss.ResidualNorms()]))
    assert list(trace_result) == ["ResidualNorms"]
