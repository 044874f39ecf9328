"""Streamed attention: the numbers of the eager pass without its patterns, and no hook ignored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import secondary_sinks as ss
from secondary_sinks.host.attention_replaced import replaced_attention
from secondary_sinks.intervene.clean_run import CleanRun
from secondary_sinks.intervene.whole_text import run_whole_texts
from secondary_sinks.observe import attention_path, streaming_attention
from secondary_sinks.observe.streaming_attention import StreamingAttention
from secondary_sinks.planted.planted_model import PlantedPhase, planted_model

LONG = 100  # as `auto` sees it, where `long_texts` is in force
N = 40  # longer than every sliding window of the tiny models, and than the blocks of these tests
SITES = ("resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")
# One model for each way in which attention is replaced, of those in `streamed_family`.
REGISTERED, UNREGISTERED, JOINT = ("llama", "gpt-oss", "granite"), ("gpt-neo",), ("phi3", "bloom")
MECHANISMS = (*REGISTERED, *UNREGISTERED, *JOINT)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries, the last one shorter, on short texts."""
    monkeypatch.setattr(streaming_attention, "_LEAST_GROUP", 48)  # blocks of 16


@pytest.fixture
def long_texts(monkeypatch):
    """`auto` streams from half the context of the tiny models on."""
    monkeypatch.setattr(attention_path, "SHORTEST", 64)


def collectors():
    return [
        ss.SinkScores(min_queries=1),
        ss.SinkScores("gu", name="gu"),
        ss.ReceivedAttention((0.05, 0.3)),
        ss.ResidualGeometry(),
        *(ss.Norms(site) for site in SITES),
    ]


def assert_same_trace(streamed, eager, rtol=1e-4):
    assert (streamed.attention, eager.attention) == ("streaming", "eager")
    for name in ("SinkScores", "gu", *(f"{site}_norm" for site in SITES)):
        torch.testing.assert_close(
            streamed[name], eager[name], rtol=rtol, atol=1e-5, equal_nan=True
        )
    one, other = streamed["ReceivedAttention"], eager["ReceivedAttention"]
    for name in ("maximum", "entropy"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=rtol, atol=1e-5, equal_nan=True
        )
    n_tokens = len(eager.tokens)
    off = ((one.share_above - other.share_above) * torch.arange(n_tokens - 1, -1, -1))[..., :-1]
    assert off.abs().max() < 1.5
    assert off.abs().mean() < 0.01


def test_a_streamed_trace_is_the_eager_one(tiny, streamed_family, tokens_of, small_blocks):
    """Batches with padding included: the second and third text are padded to the fourth."""
    model = tiny(streamed_family)
    texts = [tokens_of(n, seed=n) for n in (N, 11, 17, 33)]
    streamed, eager = (
        ss.trace(model, texts, collectors(), batch_size=3, progress=False, attention=way)
        for way in ("streaming", "eager")
    )
    for one, other in zip(streamed, eager, strict=True):
        assert_same_trace(one, other)
    assert eager[0]["ReceivedAttention"].mean_entropy.shape == (3, 4)


EDITS = [
    ("blocks.1.attn.hook_q", lambda value, hook: value * 2),
    ("blocks.1.attn.hook_k", lambda value, hook: value.flip(1)),
    ("blocks.1.attn.hook_v", lambda value, hook: value + 1),
    ("blocks.2.attn.hook_z", lambda value, hook: value * 0.5),
    ("blocks.0.hook_mlp_out", lambda value, hook: value * 0),
    ("blocks.0.hook_resid_post", lambda value, hook: value.roll(1, dims=1)),
]


@pytest.mark.parametrize("kind", MECHANISMS)
def test_hooks_fire_and_edit_as_they_do_eagerly(make_tiny, kind, tokens_of, small_blocks):
    model, tokens = make_tiny(kind), tokens_of(N)
    plain = ss.trace(model, tokens, collectors(), attention="eager")
    for name, edit in EDITS[:3]:
        model.add_hook(name, edit)
    streamed, eager = (
        ss.trace(model, tokens, collectors(), fwd_hooks=EDITS[3:], attention=way)
        for way in ("streaming", "eager")
    )
    assert_same_trace(streamed, eager)
    assert not torch.allclose(eager["resid_post_norm"][2], plain["resid_post_norm"][2], rtol=1e-3)


class Pattern(ss.Collector):
    sites = ("pattern",)

    def update(self, site, layer, activation):
        self.last = activation.shape

    def result(self):
        return self.last


def look(value, hook):
    return None


@pytest.mark.parametrize(
    "hooks",
    [
        [("blocks.1.attn.hook_pattern", look)],
        [("blocks.1.attn.hook_rot_q", look)],
        [("blocks.1.hook_mlp_out", look), (lambda name: name.endswith("scores"), look)],
    ],
)
@pytest.mark.parametrize("where", ["in the call", "on the model"])
def test_a_hook_that_would_not_fire_is_never_ignored(
    make_tiny, tokens_of, long_texts, hooks, where
):
    model, tokens = make_tiny("llama"), tokens_of(LONG)
    calls = []
    counted = [(name, lambda value, hook: calls.append(hook.name)) for name, _ in hooks]
    arguments = {"fwd_hooks": counted} if where == "in the call" else {}
    if where == "on the model":
        for name, function in counted:
            model.add_hook(name, function)
    with pytest.raises(ss.ModelError, match=r"cannot be streamed here: .*does not fire"):
        ss.trace(model, tokens, [ss.SinkScores()], attention="streaming", **arguments)
    calls.clear()
    trace_result = ss.trace(model, tokens, [ss.SinkScores()], **arguments)
    assert trace_result.attention == "eager"
    assert any("attn.hook" in name for name in calls)


def test_a_collector_of_patterns_gets_them(tiny, tokens_of, long_texts):
    model, tokens = tiny("qwen2"), tokens_of(LONG)
    trace_result = ss.trace(model, tokens, [Pattern(), ss.SinkScores()])
    assert trace_result.attention == "eager"
    assert trace_result["Pattern"] == (4, LONG, LONG)
    with pytest.raises(ss.ModelError, match="'pattern' is requested"):
        ss.trace(model, tokens, [Pattern()], attention="streaming")
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ss.ModelError, match="PyTorch hooks"):
        ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")
    handle.remove()


def test_a_model_that_was_asked_for_its_hidden_states_streams(make_tiny, tokens_of):
    """Transformers leaves hooks of its own on all modules then."""
    model, tokens = make_tiny("llama"), tokens_of(N)
    before = ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")["SinkScores"]
    with torch.no_grad():
        model.original_model(tokens[None], output_hidden_states=True, output_attentions=True)
    assert model.blocks[0].attn.original_component._forward_hooks
    after = ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")["SinkScores"]
    assert torch.equal(after.nan_to_num(), before.nan_to_num())


def test_auto_streams_long_texts(tiny, tokens_of, long_texts):
    model = tiny("llama")
    lengths = (attention_path.SHORTEST - 1, attention_path.SHORTEST)
    texts = [tokens_of(n) for n in lengths]
    short, long = ss.trace(model, texts, [ss.SinkScores()], progress=False)
    assert (short.attention, long.attention) == ("eager", "streaming")
    assert ss.detect_sinks(model, texts[1]).provenance.attention == "streaming"
    for wrong in ("flash", None):
        with pytest.raises(ss.InputError, match="attention"):
            ss.trace(model, texts[0], [ss.SinkScores()], attention=wrong)


@pytest.mark.parametrize("family_of_kind", ["mistral", "gpt2"])
def test_a_model_that_computes_something_else_stays_eager(
    make_tiny, tokens_of, monkeypatch, long_texts, family_of_kind
):
    """As if the model did not name its window, or scaled in another way."""
    model, tokens = make_tiny(family_of_kind), tokens_of(LONG)
    real = StreamingAttention.__call__

    def deaf(self, inputs):
        scale = inputs.scale * (1.5 if inputs.window is None else 1)
        return real(self, replace(inputs, window=None, scale=scale))

    monkeypatch.setattr(StreamingAttention, "__call__", deaf)
    with pytest.raises(ss.ModelError, match="differs from its eager pass"):
        ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")
    assert ss.trace(model, tokens, [ss.SinkScores()]).attention == "eager"


def test_attention_of_an_unknown_kind_stays_eager(make_tiny, tokens_of, long_texts):
    model = make_tiny("llama")

    class Own(type(model.blocks[1].attn)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.blocks[1].attn.__class__ = Own
    with pytest.raises(ss.ModelError, match="is of an unknown kind"):
        ss.trace(model, tokens_of(LONG), [ss.SinkScores()], attention="streaming")
    assert ss.trace(model, tokens_of(LONG), [ss.SinkScores()]).attention == "eager"


class OneMoreKey:
    def update(self, key, value, *_, **__):
        return (torch.cat([one[:, :, :1], one], dim=2) for one in (key, value))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 1, 1)}, "hides keys by a rule"),
        ({"past_key_values": OneMoreKey()}, "keys that are not tokens"),
    ],
)
def test_attention_over_other_keys_stays_eager(make_tiny, tokens_of, long_texts, arguments, reason):
    model = make_tiny("llama")
    module = model.blocks[1].attn.original_component
    forward = module.forward
    module.forward = lambda *args, **given: forward(*args, **(given | arguments))
    with pytest.raises(ss.ModelError, match=reason):
        ss.trace(model, tokens_of(LONG), [ss.SinkScores()], attention="streaming")
    assert ss.trace(model, tokens_of(LONG), [ss.SinkScores()]).attention == "eager"


@pytest.mark.parametrize("kind", ["mpt", "falcon-alibi"])
def test_alibi_of_another_kind_stays_eager(tiny, tokens_of, kind):
    with pytest.raises(ss.ModelError, match="is of an unknown kind"):
        ss.trace(tiny(kind), tokens_of(N), [ss.SinkScores()], attention="streaming")


def everything_exchangeable(model):
    from transformers import AttentionInterface, AttentionMaskInterface

    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        [
            m.config._attn_implementation
            for m in model.original_model.modules()
            if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
        ],
        [
            sorted(vars(module))
            for block in model.blocks
            for module in (block.attn, block.attn.original_component)
        ],
    )


@pytest.mark.parametrize("kind", MECHANISMS)
def test_nothing_is_left_behind(make_tiny, kind, tokens_of):
    model, tokens = make_tiny(kind), tokens_of(N)[None]
    with torch.no_grad():
        before, state = model(tokens), everything_exchangeable(model)
    ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")

    def broken(layer, inputs):
        if layer == 1:
            raise ZeroDivisionError
        return torch.zeros_like(inputs.query).transpose(1, 2)

    with pytest.raises(ZeroDivisionError), replaced_attention(model, broken), torch.no_grad():
        model(tokens)
    assert everything_exchangeable(model) == state
    with torch.no_grad():
        assert torch.equal(model(tokens), before)


class Shapes(TorchDispatchMode):
    """Every shape that any operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*REGISTERED, *JOINT])
def test_no_pattern_is_ever_in_memory(hf_model, tiny, tokens_of, kind, monkeypatch):
    monkeypatch.setattr(streaming_attention, "_MOST_THREADS", 1)  # a thread sees its own operations
    monkeypatch.setattr(streaming_attention, "_ROWS", 128)  # small blocks for a short text
    hf, n_tokens = hf_model(kind), 512
    hf.config.max_position_embeddings = n_tokens
    model = ss.load_model(hf, tokenizer=tiny("llama").tokenizer, progress=False)
    tokens = tokens_of(n_tokens)
    request = [ss.SinkScores(), ss.ReceivedAttention(), ss.ResidualGeometry()]
    ss.trace(model, tokens, request, attention="streaming")  # with the comparison
    squares = {}
    for way in ("streaming", "eager"):
        with Shapes() as operations:
            ss.trace(model, tokens, request, attention=way)
        squares[way] = [s for s in operations.shapes if sum(side >= n_tokens for side in s) > 1]
        largest = max(math.prod(shape) for shape in operations.shapes)
        assert (largest < n_tokens**2 / 2) == (way == "streaming")
    assert not squares["streaming"]
    assert squares["eager"]


def test_one_pass_a_text_after_the_first_comparison(make_tiny, tokens_of):
    model = make_tiny("mistral")
    lengths = []
    model.original_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            (args[0] if args else kwargs["input_ids"]).shape[1]
        ),
        with_kwargs=True,
    )
    for _ in range(2):
        ss.trace(model, tokens_of(LONG), [ss.SinkScores()], attention="streaming")
    # The axes of sites with heads; both ways, with more tokens than the window; then the texts.
    assert lengths[0] <= 19
    assert lengths[1:] == [64, 64, LONG, LONG]


def test_the_way_is_saved_with_the_trace(tiny, tokens_of, tmp_path):
    trace_result = ss.trace(tiny("llama"), tokens_of(N), [ss.SinkScores()], attention="streaming")
    assert ss.Trace.load(trace_result.save(tmp_path / "trace.safetensors")).attention == "streaming"


@pytest.mark.slow
def test_planted_sinks_are_found_streaming():
    planted = planted_model(n_layers=8, phases=(PlantedPhase(start=1, end=7, norm=200),))
    model, tokens = planted.load(), planted.tokens(300)
    streamed, eager = (
        ss.detect_sinks(model, tokens, attention=way) for way in ("streaming", "eager")
    )
    assert streamed.provenance.attention == "streaming"
    sinks = [[(s.position, s.kind, s.layers) for s in m.sinks] for m in (streamed, eager)]
    assert sinks[0] == sinks[1] != []


def test_whole_texts_are_the_same_streamed(tiny, tokens_of, small_blocks):
    model, tokens = tiny("qwen2"), tokens_of(N)
    sinks = ss.detect_sinks(model, tokens, primary=0)
    clean = CleanRun.of(model, sinks)
    assert not clean.shows_scores
    texts = [
        [ss.Intervention("mlp_out", 1, 3, ss.Zero()), ss.Intervention("z", 2, 5, ss.Scale(2.0))],
        [ss.Intervention("k", 0, 0, ss.Zero())],
    ]
    states = {}
    for way in ("streaming", "eager"):
        state, rest = run_whole_texts(model, clean, texts, attention=way)
        states[way] = [state, *rest]
    for one, other in zip(*states.values(), strict=True):
        for name in ("sink_score", "norm", "alignment", "centered_norm", "centered_alignment"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5, equal_nan=True
            )
        torch.testing.assert_close(one.output.token_loss, other.output.token_loss)


@pytest.mark.slow
def test_the_oracle_and_rows_stream_long_texts(tiny, tokens_of, small_blocks, monkeypatch):
    """Full passes and cached rows of a text beyond the window, without a pattern, are the eager."""
    model, sinks = tiny("mistral"), ss.detect_sinks(tiny("mistral"), tokens_of(LONG))
    rows = [ss.Intervention("mlp_out", 1, p, ss.Zero()) for p in (3, 40, 90)]
    eager = ss.counterfactuals(model, sinks, rows, method="full", progress=False)
    monkeypatch.setattr(attention_path, "SHORTEST", 64)
    with Shapes() as operations:
        streamed = ss.counterfactuals(model, sinks, rows, method="full", progress=False)
        cached = ss.counterfactuals(model, sinks, rows, method="cached")
    heads = model.cfg.n_heads
    assert (2, heads, LONG, LONG) not in operations.shapes
    for name in ("norm", "alignment", "direct_score"):
        for rows_of_engine in (streamed, cached):
            torch.testing.assert_close(
                getattr(rows_of_engine, name), getattr(eager, name), rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(
        streamed.totals.sink_score, eager.totals.sink_score, rtol=1e-4, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("qwen2", torch.bfloat16),
        ("gemma2", torch.float16),
        ("neox", torch.bfloat16),
        ("bloom", torch.float16),
    ],
)
def test_half_precision(make_tiny, tokens_of, dtype, kind):
    """Streamed weights are closer to those in float32 than eager ones, which are rounded."""
    model, tokens = make_tiny(kind), tokens_of(N)
    exact = ss.trace(model, tokens, collectors())["SinkScores"][0, :, :-1]
    model.to(dtype)
    score = {
        way: ss.trace(model, tokens, collectors(), attention=way)["SinkScores"][0, :, :-1]
        for way in ("streaming", "eager")
    }
    torch.testing.assert_close(score["streaming"], exact, rtol=0.05, atol=0.02)
    error = {way: (value - exact).abs().mean() for way, value in score.items()}
    assert error["streaming"] < 1.2 * error["eager"]
