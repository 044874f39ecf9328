"""Models in which some layers, or all of them, mix tokens without attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.observe.steady_attention import MIN_SEGMENTS

N, POSITION = 24, 9
WITHOUT = {"qwen3-next": [0], "lfm2": [0, 2], "jamba": [0, 2], "granite4": [0, 2]}


@pytest.fixture(params=["qwen3-next", "lfm2", "jamba"])
def hybrid(request):
    return request.param


@pytest.mark.parametrize("hybrid", list(WITHOUT))
def test_residuals_everywhere_and_attention_where_there_is_some(tiny, hf_model, tokens_of, hybrid):
    model, tokens = tiny(hybrid), tokens_of(N)
    collectors = [ss.ResidualNorms(), ss.SinkScores(min_queries=1), ss.ReceivedAttention()]
    trace_result = ss.trace(model, tokens, collectors)
    with torch.no_grad():
        output = hf_model(hybrid)(tokens[None], output_hidden_states=True, output_attentions=True)
    norms = torch.stack([state[0].norm(dim=-1) for state in output.hidden_states[1:-1]])
    torch.testing.assert_close(trace_result["ResidualNorms"][:-1], norms)
    scores = trace_result["SinkScores"]
    assert scores.shape == (3, 4, N)
    patterns = iter(output.attentions)
    for layer, score in enumerate(scores):
        if layer in WITHOUT[hybrid]:
            assert score.isnan().all()
            assert trace_result["ReceivedAttention"].maximum[layer].isnan().all()
            continue
        pattern = next(p for p in patterns if p is not None and p.shape[-1] == N)[0]
        later = pattern.tril(-1).sum(dim=1) / torch.arange(N - 1, -1, -1)
        torch.testing.assert_close(score[:, :-1], later[:, :-1])


def test_streamed_as_eager(tiny, tokens_of, hybrid):
    ways = [
        ss.trace(tiny(hybrid), tokens_of(N), [ss.SinkScores(), ss.NoOpShare()], attention=way)
        for way in ("streaming", "eager")
    ]
    for name in ("SinkScores", "NoOpShare"):
        torch.testing.assert_close(ways[0][name], ways[1][name], equal_nan=True, atol=1e-5, rtol=0)
        assert ways[0][name][0].isnan().all()


@pytest.mark.parametrize("way", ["streaming", "eager"])
def test_no_query_sees_a_token_in_a_layer_without_attention(tiny, tokens_of, way):
    n_tokens = 8 * (MIN_SEGMENTS + 1)  # segments of 8
    collectors = [ss.Visibility(), ss.SteadyAttention()]
    trace_result = ss.trace(tiny("lfm2"), tokens_of(n_tokens), collectors, attention=way)
    visible, steady = trace_result["Visibility"], trace_result["SteadyAttention"]
    assert visible.n_seeing[1].tolist() == list(range(n_tokens - 1, -1, -1))
    assert visible.uniform[1, :-1].isfinite().all()
    assert steady[1].isfinite().any()
    for layer in WITHOUT["lfm2"]:
        assert visible.n_seeing[layer].tolist() == [0] * n_tokens
        assert visible.uniform[layer].isnan().all()
        assert steady[layer].isnan().all()


def test_a_mixer_adds_what_attention_would(tiny, hybrid):
    assert check_residual_identity(tiny(hybrid)) < 1e-5


def test_sites_of_attention_in_every_layer_are_refused(tiny, tokens_of, hybrid):
    with pytest.raises(ss.ModelError, match="does not have in layer 0"):
        ss.trace(tiny(hybrid), tokens_of(N), [ss.Norms("z")])
    one = ss.trace(tiny(hybrid), tokens_of(N), [ss.Norms("blocks.1.attn.hook_z")])
    assert one["blocks.1.attn.hook_z_norm"].shape == (1, 4, N)


def test_rows_are_full_passes(tiny, hf_model, tokens_of, hybrid):
    """A row's residuals are those of the original model with the same edit."""
    model, tokens = tiny(hybrid), tokens_of(N)
    sink_map = ss.detect_sinks(model, tokens)
    edit = ss.Intervention("mlp_out", 0, POSITION, ss.Zero())
    rows = ss.counterfactuals(model, sink_map, [edit], progress=False)
    assert rows.provenance.engine == "full"
    for method in ("cached", "packed"):
        with pytest.raises(ss.ModelError, match=r"layers? 0.* state .* method='full'"):
            ss.counterfactuals(model, sink_map, [edit], method=method)

    def zero(module, inputs, output):
        edited = output.clone()
        edited.view(1, N, -1)[:, POSITION] = 0
        return edited

    hf = hf_model(hybrid)
    layer = hf.model.layers[0]
    mlp = next(getattr(layer, name) for name in ("mlp", "feed_forward") if hasattr(layer, name))
    mlp.register_forward_hook(zero)
    with torch.no_grad():
        states = hf(tokens[None], output_hidden_states=True).hidden_states
    norms = torch.stack([state[0, POSITION].norm() for state in states[1:-1]])
    torch.testing.assert_close(rows.norm[0, :-1], norms)
    assert not torch.allclose(rows.norm[0, :-1], sink_map.array("norm")[:-1, POSITION])


def test_without_attention_norms_are_measured_and_sinks_refused(tiny, hf_model, tokens_of):
    model, tokens = tiny("mamba"), tokens_of(N)
    norms = ss.trace(model, tokens, [ss.ResidualNorms()])["ResidualNorms"]
    with torch.no_grad():
        states = hf_model("mamba")(tokens[None], output_hidden_states=True).hidden_states
    # transformers leaves the embedding out here, and has the final norm after the last block.
    torch.testing.assert_close(norms[:-1], torch.stack([s[0].norm(dim=-1) for s in states[:2]]))
    with pytest.raises(ss.ModelError, match=r"shows none in any layer.*ResidualNorms"):
        ss.detect_sinks(model, tokens)


def test_gates_of_gated_attention(tiny, hf_model, tokens_of):
    tokens = tokens_of(N)
    gates = ss.trace(tiny("qwen3-next"), tokens, [ss.OutputGates()])["OutputGates"]
    assert gates.shape == (3, 4, N)
    assert gates[0].isnan().all()
    projected = []
    hf = hf_model("qwen3-next")
    hf.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: projected.append(output[0])
    )
    with torch.no_grad():
        hf(tokens[None])
    _, gate = projected[0].view(N, 4, 16).chunk(2, dim=-1)
    torch.testing.assert_close(gates[1], gate.sigmoid().mean(dim=-1).T)
    with pytest.raises(ss.ModelError, match="q_gate"):
        ss.trace(tiny("llama"), tokens, [ss.OutputGates()])


def test_layers_with_shared_keys_and_values_compute_all_tokens(tiny, hf_model, tokens_of):
    """For the last logits alone, Gemma 4 would compute its last layers for the last token alone."""
    model, tokens = tiny("gemma4"), tokens_of(N)
    with torch.no_grad():
        output = hf_model("gemma4")(tokens[None], output_hidden_states=True, output_attentions=True)
    norms = torch.stack([state[0].norm(dim=-1) for state in output.hidden_states[1:-1]])
    for way in ("eager", "streaming"):
        trace_result = ss.trace(model, tokens, [ss.ResidualNorms(), ss.SinkScores()], attention=way)
        torch.testing.assert_close(trace_result["ResidualNorms"][:-1], norms)
        received = output.attentions[3][0].tril(-1).sum(dim=1) / torch.arange(N - 1, -1, -1)
        torch.testing.assert_close(trace_result["SinkScores"][3][:, :-8], received[:, :-8])


def test_blocks_that_add_something_else_are_measured_and_not_attributed(tiny, tokens_of):
    model, tokens = tiny("gemma4"), tokens_of(N)
    with pytest.raises(ss.ModelError, match=r"not the sum .* Norms, alignment and attention"):
        ss.trace(model, tokens, [ss.Norms("mlp_out")])


def test_a_layer_that_leaves_tokens_out_is_refused(make_tiny, tokens_of):
    model = make_tiny("llama")
    model.blocks[2].original_component.register_forward_hook(
        lambda module, inputs, out: out[:, -1:]
    )
    with pytest.raises(ss.ModelError, match=f"resid_post of layer 2 .* has 1 of the {N} tokens"):
        ss.trace(model, tokens_of(N), [ss.ResidualNorms()])


def test_scores_of_a_life_are_of_the_layers_with_attention(tiny, tokens_of):
    model = tiny("lfm2")
    sink_map = dataclasses.replace(ss.detect_sinks(model, tokens_of(N)), phases=((0, 3),))
    result = ss.attribute_to_mlps(model, sink_map, sinks=[POSITION], n_controls=1, progress=False)
    expected = sink_map.array("mean_attention")[1, :, POSITION].mean()
    assert result.sinks[0].score == pytest.approx(float(expected), rel=1e-4)
    assert result.attention_zero.score[0].isfinite().all()


def test_a_key_is_read_wherever_it_is_used(tiny, tokens_of):
    """The last layers of Gemma 4 use the keys of the last layer of their kind before them."""
    model = tiny("gemma4")
    sink_map = ss.detect_sinks(model, tokens_of(N))
    edits = [
        ss.Intervention("k", 1, POSITION, ss.Zero()),
        ss.Intervention("k", 1, POSITION, ss.Scale(1.0)),
    ]
    rows = ss.counterfactuals(model, sink_map, edits, method="full", progress=False)
    clean = sink_map.array("mean_attention")[:, :, POSITION]
    changed = (rows.direct_score - clean).abs().amax(dim=2) > 1e-5
    assert changed.tolist() == [[False, True, False, True], [False] * 4]
