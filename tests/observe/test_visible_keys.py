"""Which queries see a token: by sliding windows and chunks, streamed and eager, whatever a pattern
shows; and means over exactly these."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.visible_keys import visible_keys_read
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest

N = 30
WIDTH = 8  # of the tiny models' windows
KINDS = ("llama", "phi3", "mistral", "gemma2", "gemma3", "gpt-oss", "cohere2", "gpt-neo")


class Pattern(ss.Collector):
    sites = ("pattern",)

    def start(self, run):
        self.layers = []

    def update(self, site, layer, activation):
        self.layers.append(activation.clone())

    def result(self):
        return torch.stack(self.layers)


def collectors():
    return [
        ss.Visibility(),
        ss.SinkScores(min_queries=3),
        ss.SinkScores("all_later", min_queries=3, name="all"),
        ss.ReceivedAttention((0.2,)),
    ]


def assert_measured(trace_result, pattern, visible):
    """By the definitions, from the pattern [layer, head, query, key] and [layer, query, key]."""
    sees = visible.tril(-1)
    n_seeing, n_later = sees.sum(dim=1), torch.arange(N - 1, -1, -1)
    weight = pattern * sees[:, None]
    mean = weight.sum(dim=2) / n_seeing[:, None]
    uniform = (sees / visible.sum(dim=-1, keepdim=True)).sum(dim=1) / n_seeing
    few, unseen = (n_seeing < 3)[:, None], (n_seeing == 0)[:, None]
    found, received = trace_result["Visibility"], trace_result["ReceivedAttention"]
    assert torch.equal(found.n_seeing, n_seeing.float())
    for measured, expected in (
        (found.uniform, uniform),
        (trace_result["SinkScores"], mean.masked_fill(few, torch.nan)),
        (trace_result["all"], (weight.sum(2) / n_later).masked_fill(n_later < 3, torch.nan)),
        (received.maximum, weight.amax(dim=2).masked_fill(unseen, torch.nan)),
        (received.share_above[0], (weight > 0.2).sum(dim=2) / n_seeing[:, None]),
    ):
        torch.testing.assert_close(measured, expected, atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_over_the_queries_that_see_a_token(tiny, kind, tokens_of, visible_keys):
    """In a batch with padding: the text is padded to the other one."""
    texts = [tokens_of(N), tokens_of(N + 6, seed=1)]
    eager, streamed = (
        ss.trace(tiny(kind), texts, wanted, batch_size=2, progress=False, attention=way)[0]
        for way, wanted in (("eager", [Pattern(), *collectors()]), ("streaming", collectors()))
    )
    for trace_result in (eager, streamed):
        assert_measured(trace_result, eager["Pattern"], visible_keys(kind, N))


def test_chunks(tiny, tokens_of):
    """The last token of a chunk is seen by no later query."""
    trace_result = ss.trace(tiny("llama4"), tokens_of(N), [Pattern(), *collectors()])
    chunk, full = torch.arange(N) // WIDTH, torch.ones(N, N, dtype=torch.bool).tril()
    chunked = full & (chunk[:, None] == chunk)
    visible = torch.stack([chunked, full, chunked])
    assert_measured(trace_result, trace_result["Pattern"], visible)
    assert trace_result["Visibility"].n_seeing[0, :10].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 7, 6]


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_without_windows_all_later_queries_count(tiny, kind, tokens_of):
    """MPT's mask is True where keys are hidden."""
    trace_result = ss.trace(tiny(kind), tokens_of(N), collectors())
    found = trace_result["Visibility"]
    assert found.n_seeing.tolist() == [list(range(N - 1, -1, -1))] * 3
    expected = torch.tensor([sum(1 / (i + 1) for i in range(t + 1, N)) for t in range(N - 1)])
    expected = (expected / torch.arange(N - 1, 0, -1)).expand(3, -1)
    torch.testing.assert_close(found.uniform[:, :-1], expected)
    torch.testing.assert_close(trace_result["SinkScores"], trace_result["all"], equal_nan=True)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_a_weight_of_zero_does_not_hide_a_key(make_tiny, kind, tokens_of):
    """Softmaxes that underflow, and a hook that takes all attention from the first token."""
    model = make_tiny(kind)
    expected = ss.trace(model, tokens_of(N), [ss.Visibility()])["Visibility"].n_seeing
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(1e5)

    def away(pattern, hook):
        pattern[..., 0] = 0
        return pattern

    hooks = [(f"blocks.{layer}.attn.hook_pattern", away) for layer in range(3)]
    trace_result = ss.trace(model, tokens_of(N), [Pattern(), *collectors()], fwd_hooks=hooks)
    assert (trace_result["Pattern"] == 0).float().mean() > 0.9
    assert torch.equal(trace_result["Visibility"].n_seeing, expected)
    assert (trace_result["SinkScores"][:, :, 0] == 0).all()


def test_the_score_of_the_first_token_does_not_fall_with_the_length_of_the_text(tiny, tokens_of):
    """Beyond a window, no more queries count."""
    short, long = (
        ss.trace(tiny("mistral"), tokens_of(100)[:n], collectors()) for n in (WIDTH, 100)
    )
    for name in ("SinkScores", "all"):
        torch.testing.assert_close(short[name][:, :, 0], short["SinkScores"][:, :, 0])
    torch.testing.assert_close(long["SinkScores"][:, :, 0], short["SinkScores"][:, :, 0])
    torch.testing.assert_close(long["all"][:, :, 0] * 99, short["SinkScores"][:, :, 0] * 7)


class HookedTransformer(torch.nn.Module):
    """As little of TransformerLens 3's as tells its windows: the masks are inside its modules."""

    class Attention(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.attn_type, self.cfg = kind, SimpleNamespace(window_size=WIDTH)

        def forward(self, attention_mask):
            return attention_mask

    def __init__(self, *kinds):
        super().__init__()
        self.blocks = [SimpleNamespace(attn=self.Attention(kind)) for kind in kinds]


def test_a_hooked_transformer_tells_its_windows():
    model = HookedTransformer("global", "local")
    with visible_keys_read(model, [5, 12]) as n_visible:
        for block in model.blocks:
            block.attn(attention_mask=torch.ones(2, 12))
    assert n_visible[0].tolist() == list(range(1, 13))
    assert n_visible[1].tolist() == [1, 2, 3, 4, 5, 6, 7, *[WIDTH] * 5]
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_without_a_mask_the_pattern_tells(visible_keys):
    """A weight of 0 does not count as hidden if some query reaches as far."""
    pattern = visible_keys("mistral", 12)[:1].float()
    pattern[0, 8, 1] = pattern[0, 10, 3] = 0
    columns = AttentionColumns.of_pattern(pattern / pattern.sum(-1, keepdim=True), ColumnRequest())
    assert columns.n_visible.tolist() == [1, 2, 3, 4, 5, 6, 7, *[8] * 5]
    assert columns.n_seeing.tolist() == [*[7] * 5, 6, 5, 4, 3, 2, 1, 0]


def test_an_unknown_convention_is_refused():
    with pytest.raises(ss.InputError, match="later, all_later, gu"):
        ss.SinkScores("mean")
