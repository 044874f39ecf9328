"""One pass, the right numbers, nothing left behind."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host import sites
from secondary_sinks.host.forward import observe
from secondary_sinks.host.identity import check_residual_identity
from secondary_sinks.host.model_info import describe
from secondary_sinks.host.sites import Site
from secondary_sinks.planted.planted_model import PlantedPhase, planted_model

N = 24  # longer than every sliding window of the tiny models


class Pattern(ss.Collector):
    """The whole pattern, for comparison; no real collector may do this."""

    sites = ("pattern",)

    def start(self, run):
        self.layers = []

    def update(self, site, layer, activation):
        self.layers.append(activation.clone())

    def result(self):
        return torch.stack(self.layers)


class Everything(ss.Collector):
    """The calls of `update`."""

    sites = ("resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "final_norm")

    def start(self, run):
        self.calls = []

    def update(self, site, layer, activation):
        self.calls.append((site, layer, tuple(activation.shape)))

    def result(self):
        return self.calls


def hidden_states(model, tokens):
    with torch.no_grad():
        out = model.original_model(tokens[None], output_hidden_states=True)
    return torch.stack(out.hidden_states[1:])[:, 0]


def test_scores_are_those_of_the_full_pattern(tiny, family, tokens_of):
    trace_result = ss.trace(
        tiny(family),
        tokens_of(N),
        [
            Pattern(),
            ss.SinkScores("all_later", min_queries=4),
            ss.SinkScores("gu", name="gu"),
        ],
    )
    pattern = trace_result["Pattern"]
    later = torch.full((*pattern.shape[:2], N), torch.nan)
    gu = torch.zeros_like(later)
    for t in range(N):
        gu[:, :, t] = pattern[:, :, t:, t].mean(dim=2)
        if N - 1 - t >= 4:
            later[:, :, t] = pattern[:, :, t + 1 :, t].mean(dim=2)
    torch.testing.assert_close(trace_result["SinkScores"], later, equal_nan=True)
    torch.testing.assert_close(trace_result["gu"], gu)
    rows = pattern.sum(dim=-1)
    if family == "gpt-oss":  # its learned sink takes the rest
        assert (rows < 1 + 1e-6).all()
        assert (rows < 0.99).any()
    else:
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_residual_statistics_are_those_of_hugging_face(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(N)
    trace_result = ss.trace(
        model,
        tokens,
        [
            ss.ResidualNorms(),
            ss.ResidualGeometry(),
            ss.ResidualGeometry(final_norm=True, name="hf"),
            ss.MassiveActivations(),
        ],
    )
    hidden = hidden_states(model, tokens)
    raw, hf = trace_result["ResidualGeometry"], trace_result["hf"]
    torch.testing.assert_close(trace_result["ResidualNorms"][:-1], hidden[:-1].norm(dim=-1))
    torch.testing.assert_close(raw.norm, trace_result["ResidualNorms"])
    torch.testing.assert_close(hf.norm, hidden.norm(dim=-1), rtol=1e-4, atol=1e-4)
    for row, position in enumerate(hf.candidates):
        cosine = torch.cosine_similarity(hidden, hidden[:, position : position + 1], dim=-1)
        torch.testing.assert_close(hf.alignment[row], cosine, rtol=1e-4, atol=1e-4)
    massive = trace_result["MassiveActivations"]
    torch.testing.assert_close(massive.value[:-1].abs(), hidden[:-1].abs().amax(dim=-1))
    median = hidden[0].abs().flatten().median()
    torch.testing.assert_close(massive.ratio[0], massive.value[0].abs() / median)
    picked = hidden[0].gather(1, massive.dimension[0][:, None])[:, 0]
    torch.testing.assert_close(massive.value[0], picked)


def test_centered_alignment_ignores_what_all_tokens_share(tiny, tokens_of):
    """Adding one vector to every residual changes the cosine, not the centered one."""
    model, tokens = tiny("llama"), tokens_of(N)
    shift = 50 * torch.ones(32)
    hooks = [("blocks.1.hook_resid_post", lambda value, hook: value + shift)]
    plain = ss.trace(model, tokens, [ss.ResidualGeometry()])["ResidualGeometry"]
    shifted = ss.trace(model, tokens, [ss.ResidualGeometry()], fwd_hooks=hooks)["ResidualGeometry"]
    assert (shifted.alignment[:, 1] > 0.9).all()
    # The ordinary tokens, over which the mean is taken, are all of them once the shift is large.
    with torch.no_grad():
        hidden = hidden_states(model, tokens)[1]
    centered = hidden - hidden.mean(dim=0)
    expected = torch.cosine_similarity(centered, centered[:1], dim=-1)
    torch.testing.assert_close(shifted.centered_alignment[0, 1], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain.alignment[:, 0], shifted.alignment[:, 0])


def test_every_site_once_in_order_with_its_shape(tiny, tokens_of):
    trace_result = ss.trace(tiny("llama"), tokens_of(N), [Everything()])["Everything"]
    assert len(trace_result) == 3 * 8 + 1
    assert trace_result[-1] == ("final_norm", None, (N, 32))
    assert [layer for site, layer, _ in trace_result if site == "mlp_out"] == [0, 1, 2]
    shapes = {site: shape for site, _, shape in trace_result}
    assert shapes["k"] == (N, 2, 8)  # key-value heads
    assert shapes["q"] == shapes["z"] == (N, 4, 8)


def test_batches_with_padding_equal_single_texts(tiny, family, tokens_of):
    model = tiny(family)
    texts = [tokens_of(n, seed=n) for n in (N, 11, 17, 5)]
    collectors = [
        ss.SinkScores(min_queries=1),
        ss.ResidualGeometry(),
        ss.Norms("v"),
        ss.MassiveActivations(),
    ]
    together = ss.trace(model, texts, collectors, batch_size=3, progress=False)
    for text, one in zip(texts, together, strict=True):
        alone = ss.trace(model, text, collectors)
        assert torch.equal(one.tokens, text)
        for name in ("SinkScores", "v_norm"):
            torch.testing.assert_close(one[name], alone[name], equal_nan=True, rtol=1e-4, atol=1e-5)
        for field in ("norm", "alignment", "centered_alignment", "persistence"):
            torch.testing.assert_close(
                getattr(one["ResidualGeometry"], field),
                getattr(alone["ResidualGeometry"], field),
                equal_nan=True,
                rtol=1e-3,
                atol=1e-4,
            )


def test_permuting_texts_permutes_results(tiny, tokens_of):
    model = tiny("qwen2")
    texts = [tokens_of(n, seed=n) for n in (9, 21, 15)]
    forward = ss.trace(model, texts, [ss.ResidualNorms()], batch_size=2, progress=False)
    backward = ss.trace(model, texts[::-1], [ss.ResidualNorms()], batch_size=2, progress=False)
    for first, second in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(first["ResidualNorms"], second["ResidualNorms"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_with_its_mask_equals_single_texts(tiny, tokens_of, side):
    model = tiny("llama")
    texts = [tokens_of(12, seed=1), tokens_of(7, seed=2)]
    tokens = torch.full((2, 12), 2)
    mask = torch.zeros(2, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(12 - len(text), 12)
        tokens[row, place], mask[row, place] = text, 1
    traces = ss.trace(
        model, tokens, [ss.ResidualNorms()], attention_mask=mask, batch_size=2, progress=False
    )
    for text, one in zip(texts, traces, strict=True):
        alone = ss.trace(model, text, [ss.ResidualNorms()])
        torch.testing.assert_close(one["ResidualNorms"], alone["ResidualNorms"])


def test_one_text_in_one_result_many_in_a_list(tiny, tokens_of):
    model = tiny("llama")
    assert isinstance(ss.trace(model, "w3 w4 w5", [ss.ResidualNorms()]), ss.Trace)
    assert isinstance(ss.trace(model, tokens_of(6)[None], [ss.ResidualNorms()]), ss.Trace)
    many = ss.trace(model, ["w3 w4 w5", "w6 w7"], [ss.ResidualNorms()], progress=False)
    assert [len(one.tokens) for one in many] == [
        len(model.to_tokens(t)[0]) for t in ("w3 w4 w5", "w6 w7")
    ]
    rows = ss.trace(model, tokens_of(6, rows=3), [ss.ResidualNorms()], progress=False)
    assert len(rows) == 3


def test_users_hooks_stay_and_are_seen(make_tiny, tokens_of):
    model, tokens = make_tiny("llama"), tokens_of(N)
    name = "blocks.1.hook_mlp_out"
    before = ss.trace(model, tokens, [ss.ResidualNorms()])["ResidualNorms"]
    model.add_hook(name, lambda value, hook: value * 0)
    with_own = ss.trace(model, tokens, [ss.ResidualNorms(), ss.Norms("mlp_out")])
    assert (with_own["mlp_out_norm"][1] == 0).all()
    assert not torch.allclose(before[1], with_own["ResidualNorms"][1])
    assert count_hooks(model) == 1, "the user's hook is gone, or ours are left"
    model.reset_hooks()
    passed = ss.trace(
        model, tokens, [ss.ResidualNorms()], fwd_hooks=[(name, lambda value, hook: value * 0)]
    )
    torch.testing.assert_close(passed["ResidualNorms"], with_own["ResidualNorms"])
    assert count_hooks(model) == 0


def count_hooks(model) -> int:
    points = {id(point): point for point in model.hook_dict.values()}  # aliases share a point
    lens = sum(len(point.fwd_hooks) for point in points.values())
    return lens + len(model.ln_final._forward_hooks)


def test_an_error_in_a_collector_leaves_no_hook(tiny, tokens_of):
    class Broken(ss.Collector):
        sites = ("mlp_out", "final_norm")

        def update(self, site, layer, activation):
            if site == "final_norm":
                raise RuntimeError("broken")

    model = tiny("llama")
    with pytest.raises(RuntimeError, match="broken"):
        ss.trace(model, tokens_of(N), [Broken()])
    assert count_hooks(model) == 0


def test_hooks_made_for_one_text_are_not_run_on_another(make_tiny, tokens_of):
    """The identity is checked on a few arbitrary tokens; a user's hook may not fit those."""
    model = make_tiny("llama")

    def edit(value, hook):
        value[:, 20] = 0
        return value

    model.add_hook("blocks.1.hook_mlp_out", edit)
    model.add_hook("blocks.1.hook_resid_post", lambda value, hook: value * 2)
    assert check_residual_identity(model) < 1e-5
    trace_result = ss.trace(model, tokens_of(N), [ss.Norms("mlp_out")])["mlp_out_norm"]
    assert trace_result[1, 20] == 0
    assert count_hooks(model) == 2


@pytest.mark.parametrize("name", ["attention_dropout", "attn_pdrop"])
def test_random_attention_is_refused(make_tiny, tokens_of, name):
    model = make_tiny("llama")
    setattr(model.original_model.config, name, 0.5)
    ss.trace(model, tokens_of(N), [ss.ResidualNorms()])
    model.train()
    with pytest.raises(ss.ModelError, match=name):
        ss.trace(model, tokens_of(N), [ss.ResidualNorms()])


def test_frames_of_models_as_deep_as_there_are_candidates(tokens_of):
    """[candidate, layer, token] must not be taken for [layer, head, token]."""
    planted = planted_model(n_layers=8, phases=(PlantedPhase(start=1, end=7, norm=200),))
    model, tokens = planted.load(), planted.tokens(32)
    collectors = [ss.ResidualGeometry(candidates=tuple(range(8))), ss.SinkScores()]
    trace_result = ss.trace(model, tokens, collectors)
    frame = trace_result.to_frame()
    assert "ResidualGeometry.norm" in frame
    assert "ResidualGeometry.alignment" not in frame
    picked = frame[(frame.layer == 3) & (frame.position == 5)].SinkScores.item()
    assert picked == pytest.approx(trace_result["SinkScores"][3, :, 5].mean().item())


def test_mode_weights_and_gradients_are_left_alone(make_tiny, tokens_of):
    model = make_tiny("llama")
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    trace_result = ss.trace(model, tokens_of(N), [ss.ResidualNorms(), ss.SinkScores()])
    assert model.training
    assert not trace_result["ResidualNorms"].requires_grad
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_dropout_in_training_mode_is_refused(make_tiny, tokens_of):
    model = make_tiny("gpt2")
    model.train()
    with pytest.raises(ss.ModelError, match=r"model\.eval\(\)"):
        ss.trace(model, tokens_of(N), [ss.ResidualNorms()])


def test_a_trace_comes_back_from_disk(tiny, tokens_of, tmp_path):
    trace_result = ss.trace(tiny("llama"), tokens_of(N), [ss.SinkScores(), ss.MassiveActivations()])
    back = ss.Trace.load(trace_result.save(tmp_path / "deep" / "trace.safetensors"))
    assert back.provenance == trace_result.provenance
    assert back.token_strings == trace_result.token_strings
    torch.testing.assert_close(back["SinkScores"], trace_result["SinkScores"], equal_nan=True)
    torch.testing.assert_close(
        back["MassiveActivations.ratio"], trace_result["MassiveActivations"].ratio
    )


def test_the_residual_identity_is_checked(tiny, family):
    assert check_residual_identity(tiny(family)) < 1e-5


def test_a_block_that_breaks_the_identity_is_refused(make_tiny, tokens_of):
    model = make_tiny("llama")
    block = model.blocks[1].original_component
    block.register_forward_hook(
        lambda module, inputs, out: out * 1.1 if torch.is_tensor(out) else (out[0] * 1.1, *out[1:])
    )
    with pytest.raises(ss.ModelError, match="layer 1"):
        ss.trace(model, tokens_of(N), [ss.Norms("mlp_out")])
    edit = ss.Intervention("resid_mid", 1, 3, ss.Zero())
    with pytest.raises(ss.ModelError, match="layer 1"):
        ss.counterfactuals(model, ss.detect_sinks(model, tokens_of(N)), [edit])
    # What does not rest on the sum is measured.
    assert ss.trace(model, tokens_of(N), [ss.ResidualNorms()])["ResidualNorms"].isfinite().all()


@pytest.mark.slow
def test_a_hook_that_never_fires_is_refused(tiny, tokens_of, monkeypatch):
    """Some hooks of TransformerLens exist and never fire; they must not give an empty result."""
    model = tiny("neox")
    monkeypatch.setitem(sites.SITE_HOOKS, "never", "blocks.{layer}.attn.hook_rot_q")
    tokens = tokens_of(N)[None]
    with pytest.raises(ss.ModelError, match="fired 0 times"):
        observe(model, tokens, torch.ones_like(tokens), {Site("never", 0): lambda value: None})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_by_layer_and_position(make_tiny, tokens_of, value):
    model = make_tiny("llama")
    check_residual_identity(model)

    def poison(activation, hook):
        activation = activation.clone()
        activation[:, 7, 3] = value
        return activation

    with pytest.raises(ss.ModelError, match="after layer 1, first at position 7"):
        ss.trace(
            model,
            tokens_of(N),
            [ss.ResidualNorms()],
            fwd_hooks=[("blocks.1.hook_mlp_out", poison)],
        )
    assert count_hooks(model) == 0


def test_processed_weights_are_noticed(make_tiny, tokens_of):
    model = make_tiny("gpt2")
    assert describe(model).processing == ()
    model.enable_compatibility_mode()
    info = describe(model)
    assert info.is_processed
    sinks = ss.detect_sinks(model, tokens_of(N))
    assert any("not raw" in note for note in sinks.notes)
    assert sinks.provenance.model.processing == info.processing


def test_compatibility_mode_fires_each_hook_once(make_tiny, tokens_of):
    """There the bridge calls a function once for every alias of a hook."""
    model = make_tiny("gpt2")
    raw = ss.trace(model, tokens_of(N), [ss.Norms("mlp_out")])["mlp_out_norm"]
    model.enable_compatibility_mode(no_processing=True)
    again = ss.trace(model, tokens_of(N), [ss.Norms("mlp_out")])["mlp_out_norm"]
    torch.testing.assert_close(raw, again)
