"""The check that streamed attention is the model's, also where a long eager pass would not fit."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host import attention_replaced as streaming
from secondary_sinks.host.memory import is_out_of_memory
from secondary_sinks.observe import attention_path, streaming_check

WINDOW = 16
N = 80
WINDOWED = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},  # one joint projection
    "gemma2": {"sliding_window": WINDOW},  # every other layer; soft-capped
    "gemma3": {"sliding_window": WINDOW},
    "gpt-oss": {"sliding_window": WINDOW},  # learned logits
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.fixture
def no_budget(monkeypatch):
    """Windows are shorter than the first comparison, and nothing longer may be run eagerly."""
    monkeypatch.setattr(streaming_check, "_TESTED", WINDOW // 2)
    monkeypatch.setattr(streaming_check, "MEMORY_BUDGET", 0)


@pytest.fixture
def windowed(hf_model, tiny):
    """A tiny model of a family whose window is `WINDOW`."""

    def build(family, **settings):
        import transformers

        hf = hf_model(family)
        # Which layers have the window follows from the settings.
        config = type(hf.config)(**(hf.config.to_dict() | {"layer_types": None} | settings))
        config.architectures, config._attn_implementation = hf.config.architectures, "eager"
        with torch.no_grad():
            other = transformers.AutoModelForCausalLM.from_config(config).eval()
            other.load_state_dict(hf.state_dict())
        return ss.load_model(other, tokenizer=tiny("llama").tokenizer, progress=False)

    return build


def lengths_of_passes(model, monkeypatch):
    """Tokens of each pass from now on, and whether it held patterns."""
    passes = []
    run = streaming_check._run

    def noted(model, tokens, *, stream):
        passes.append((len(tokens), "streamed" if stream else "eager"))
        return run(model, tokens, stream=stream)

    monkeypatch.setattr(streaming_check, "_run", noted)
    return passes


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_checked_without_a_long_eager_pass(
    windowed, tokens_of, monkeypatch, no_budget, family
):
    model, tokens = windowed(family, **WINDOWED[family]), tokens_of(N)
    assert streaming.sliding_windows(model) == {WINDOW}
    passes = lengths_of_passes(model, monkeypatch)
    collectors = [ss.SinkScores(min_queries=1), ss.ResidualNorms()]
    streamed, again, eager = (
        ss.trace(model, tokens, collectors, attention=way)
        for way in ("streaming", "streaming", "eager")
    )
    assert passes == [(WINDOW // 2, "streamed"), (WINDOW // 2, "eager")]
    for name in ("SinkScores", "ResidualNorms"):
        torch.testing.assert_close(
            streamed[name], eager[name], rtol=1e-4, atol=1e-5, equal_nan=True
        )
        assert torch.equal(streamed[name].nan_to_num(), again[name].nan_to_num())


@pytest.mark.parametrize(
    ("family", "width"),
    [("gemma2", WINDOW - 1), ("gpt-oss", WINDOW + 1), ("gemma2", WINDOW + 1), ("gpt-oss", None)],
)
def test_a_window_that_is_not_the_masks_is_noticed(windowed, tokens_of, no_budget, family, width):
    """The layer names one width, and the model masks by another."""
    model = windowed(family, **WINDOWED[family])
    model.blocks[0].attn.original_component.sliding_window = width
    with pytest.raises(
        ss.ModelError, match=r"differs from a dense computation|no layer's mask has"
    ):
        ss.trace(model, tokens_of(N), [ss.SinkScores()], attention="streaming")


def test_another_rule_of_the_mask_is_noticed(windowed, tokens_of, monkeypatch, no_budget):
    model = windowed("mistral", **WINDOWED["mistral"])
    monkeypatch.setattr(attention_path, "SHORTEST", N)
    build = streaming._mask_builder

    def every_other(look_up):
        def mask(*args, mask_function, **arguments):
            def rule(batch, head, query, key):
                return mask_function(batch, head, query, key) & ((query - key) % 2 == 0)

            return build(look_up)(*args, mask_function=rule, **arguments)

        return mask

    monkeypatch.setattr(streaming, "_mask_builder", every_other)
    trace_result = ss.trace(model, tokens_of(N), [ss.SinkScores()])
    assert trace_result.attention == "eager"
    with pytest.raises(ss.ModelError, match="no layer's mask has the window of 16 tokens"):
        ss.trace(model, tokens_of(N), [ss.SinkScores()], attention="streaming")


def test_a_model_that_shows_no_mask_stays_eager(windowed, tokens_of, monkeypatch, no_budget):
    model = windowed("mistral", **WINDOWED["mistral"])
    monkeypatch.setattr(streaming, "_mask_builder", lambda look_up: lambda *_, **__: None)
    with pytest.raises(ss.ModelError, match="does not show the mask"):
        ss.trace(model, tokens_of(N), [ss.SinkScores()], attention="streaming")
    # Texts within the window need no such check.
    short = ss.trace(model, tokens_of(WINDOW), [ss.SinkScores()], attention="streaming")
    assert short.attention == "streaming"


def test_a_width_that_no_layer_has_is_not_asked_for(windowed, tokens_of, no_budget):
    settings = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 3}
    model = windowed("qwen2", **settings)
    assert streaming.sliding_windows(model) == set()
    ss.trace(model, tokens_of(N), [ss.SinkScores()], attention="streaming")


def test_only_a_few_lines_of_a_pattern_are_ever_computed(windowed, tokens_of, monkeypatch):
    model, tokens = windowed("gemma3", sliding_window=32), tokens_of(100)
    sizes = []
    dense = streaming_check._dense

    def noted(inputs, queries):
        sizes.append((len(queries), inputs.visible.shape))
        return dense(inputs, queries)

    monkeypatch.setattr(streaming_check, "_dense", noted)
    assert streaming_check.window_problem(model, tokens, {32}, 1e-4) is None
    assert sizes == [(11, (11, 100))] * 3


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("no more"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
]


def test_no_memory_for_the_comparison(make_tiny, tokens_of, monkeypatch):
    """`auto` falls back; where the eager pass does not fit either, the message has both reasons."""
    model, tokens, error = make_tiny("llama"), tokens_of(N), OUT_OF_MEMORY[-1]
    monkeypatch.setattr(attention_path, "SHORTEST", N)
    run = streaming_check._run

    def full(model, tokens, *, stream):
        if not stream:
            raise error
        return run(model, tokens, stream=stream)

    monkeypatch.setattr(streaming_check, "_run", full)
    assert ss.trace(model, tokens, [ss.SinkScores()]).attention == "eager"
    with pytest.raises(ss.ModelError, match="not enough memory to compare"):
        ss.trace(model, tokens, [ss.SinkScores()], attention="streaming")

    def no_pass(*_, **__):
        raise error

    hooks = [("blocks.0.hook_mlp_out", no_pass)]
    with pytest.raises(ss.ModelError, match=r"eager attention \(.*not enough memory.*\); shorten"):
        ss.trace(model, tokens, [ss.SinkScores()], fwd_hooks=hooks)
    # Nothing of it is kept: with memory the model streams.
    monkeypatch.setattr(streaming_check, "_run", run)
    assert ss.trace(model, tokens, [ss.SinkScores()]).attention == "streaming"
    with pytest.raises(ss.ModelError, match="with streaming attention; shorten"):
        ss.trace(model, tokens, [ss.SinkScores()], fwd_hooks=hooks)


def test_other_errors_pass_unchanged(make_tiny, tokens_of):
    def broken(*_, **__):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        ss.trace(
            make_tiny("llama"),
            tokens_of(N),
            [ss.SinkScores()],
            fwd_hooks=[("blocks.0.hook_mlp_out", broken)],
        )


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
