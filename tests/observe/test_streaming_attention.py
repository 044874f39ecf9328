"""The kernel of streamed attention: the output and the columns of dense attention."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.host.attention_replaced import AttentionInputs
from secondary_sinks.observe import streaming_attention
from secondary_sinks.observe.attention_columns import AttentionColumns, ColumnRequest
from secondary_sinks.observe.streaming_attention import StreamingAttention

EVERYTHING = ColumnRequest(maximum=True, thresholds=(0.05, 0.3), entropy=True)


@pytest.fixture
def dealt(monkeypatch):
    """Blocks of short texts are dealt to threads as those of long ones are."""
    monkeypatch.setattr(streaming_attention, "_DISTRIBUTED_FROM", 0)


def dense(query, key, value, *, scale, window=None, softcap=None, sink_logits=None, alibi=None):
    """Attention of one text in float64, with its whole pattern."""
    group = query.shape[0] // key.shape[0]
    key, value = (one.double().repeat_interleave(group, dim=0) for one in (key, value))
    scores = query.double() @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        scores = scores + alibi[:, None]
    n_tokens = query.shape[1]
    ago = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)
    hidden = (ago < 0) | (ago >= (window or n_tokens))
    scores = scores.masked_fill(hidden, -math.inf)
    if sink_logits is not None:
        logits = sink_logits.double()[:, None, None].expand(-1, n_tokens, 1)
        scores = torch.cat([scores, logits], dim=-1)
    pattern = scores.softmax(dim=-1)[..., :n_tokens]
    return (pattern @ value).transpose(0, 1), pattern


def assert_same_columns(found, expected, *, rtol=1e-5, atol=1e-5):
    for name in ("received", "own", "maximum", "entropy"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=rtol, atol=atol
        )
    for threshold, count in expected.above.items():
        # A weight that lies on the threshold may fall on either side.
        assert (found.above[threshold] - count).abs().max() <= 1


def grouped(query, key, row, length):
    """Queries and the keys that stand at their own positions, a key for each head, in float64."""
    group = query.shape[1] // key.shape[1]
    own = key[row, :, :length].double().repeat_interleave(group, dim=0)
    return query[row, :, :length].double(), own


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_dense_attention(window, softcap, sinks, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (2 * torch.randn(*shape, generator=generator)).to(dtype)

    for (n_heads, n_kv_heads), block in (((4, 4), 7), ((6, 2), 16), ((4, 1), 1), ((6, 2), 64)):
        query, key, value = (draw(2, n, 53, 8) for n in (n_heads, n_kv_heads, n_kv_heads))
        settings = {"scale": 0.4, "window": window, "softcap": softcap}
        settings["sink_logits"] = draw(n_heads) if sinks else None
        request = EVERYTHING | ColumnRequest(log_sum_exp=True)
        kernel = StreamingAttention([53, 31], request, block=block)
        output, columns = kernel(AttentionInputs(query, key, value, **settings))
        assert output.dtype == dtype
        assert (output[1, 31:] == 0).all()
        for row, length in enumerate((53, 31)):
            parts = (part[row, :, :length] for part in (query, key, value))
            expected, pattern = dense(*parts, **settings)
            torch.testing.assert_close(
                output[row, :length],
                expected.to(dtype),
                rtol=1e-2 if dtype != torch.float32 else 1e-5,
                atol=1e-5,
            )
            assert_same_columns(columns[row], AttentionColumns.of_pattern(pattern, EVERYTHING))
            # A logit is the logarithm of its weight and of what it was divided by.
            own = torch.einsum("hqd,hqd->hq", *grouped(query, key, row, length)) * 0.4
            own = own if softcap is None else softcap * torch.tanh(own / softcap)
            log_sum = own - columns[row].own.double().log()
            torch.testing.assert_close(
                columns[row].log_sum_exp.double(), log_sum, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("window", [None, 9])
def test_alibi_is_added_to_the_scores_of_each_key(window):
    query, key, value = torch.randn(2, 6, 53, 8), *torch.randn(2, 2, 2, 53, 8)
    slopes = 2.0 ** -torch.arange(1, 7)
    # The first text begins with its first token, the second one with its eighth.
    alibi = slopes[:, None] * (torch.arange(53) + torch.tensor([0, 7])[:, None, None])
    kernel = StreamingAttention([53, 31], EVERYTHING, block=16)
    output, columns = kernel(AttentionInputs(query, key, value, 0.4, window, alibi=alibi))
    for row, length in enumerate((53, 31)):
        parts = (part[row, :, :length] for part in (query, key, value))
        expected, pattern = dense(*parts, scale=0.4, window=window, alibi=alibi[row, :, :length])
        torch.testing.assert_close(output[row, :length], expected.float(), rtol=1e-5, atol=1e-5)
        assert_same_columns(columns[row], AttentionColumns.of_pattern(pattern, EVERYTHING))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("inference", [False, True])
def test_the_number_of_threads_changes_nothing(window, inference, dealt):
    before = torch.get_num_threads()
    request = EVERYTHING | ColumnRequest(log_sum_exp=True)
    with torch.inference_mode(inference):
        parts = [torch.randn(1, heads, 200, 8) for heads in (4, 2, 2)]
        inputs = AttentionInputs(*parts, 0.4, window, sink_logits=torch.randn(4))
        alone = StreamingAttention([200], request, block=16, threads=1)(inputs)
        shared = StreamingAttention([200], request, block=16, threads=3)
        first, again = (shared(inputs) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1][0].received, again[1][0].received)
    torch.testing.assert_close(first[0], alone[0])
    assert_same_columns(first[1][0], alone[1][0])
    torch.testing.assert_close(first[1][0].log_sum_exp, alone[1][0].log_sum_exp)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [torch.get_num_threads()] == [before]


def test_nothing_is_divided_within_a_thread_and_everything_again_behind_it(dealt, monkeypatch):
    def threads_of_torch() -> set[str]:
        lines = torch.__config__.parallel_info().splitlines()
        return {line for line in lines if "get_num_threads" in line or "get_max_threads" in line}

    seen, run = {}, streaming_attention._Worker.run

    def watched(worker, text, blocks):
        seen[threading.current_thread().name] = threads_of_torch()
        return run(worker, text, blocks)

    monkeypatch.setattr(streaming_attention._Worker, "run", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outside = threads_of_torch()
        StreamingAttention([50], block=16, threads=3)(
            AttentionInputs(*torch.randn(3, 1, 4, 50, 8), 1.0)
        )
        assert len(seen) > 1  # a quick thread may take two shares
        assert all(line.endswith(" 1") for lines in seen.values() for line in lines)
        assert threads_of_torch() == outside
        assert any(line.endswith(" 2") for line in outside)
    finally:
        torch.set_num_threads(before)


def test_a_failure_in_a_thread_is_not_lost(dealt):
    before = torch.get_num_threads()
    query, key, value = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 6), torch.randn(1, 2, 50, 8)
    with pytest.raises(RuntimeError, match="size"):
        StreamingAttention([50], threads=2)(AttentionInputs(query, key, value, 1.0))
    assert torch.get_num_threads() == before


def test_columns_of_a_pattern_by_hand():
    pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.5, 0.25, 0.25]]])
    found = AttentionColumns.of_pattern(
        pattern, ColumnRequest(maximum=True, thresholds=(0.6,), entropy=True)
    )
    torch.testing.assert_close(found.received, torch.tensor([[1.25, 0.25, 0.0]]))
    torch.testing.assert_close(found.own, torch.tensor([[1.0, 0.25, 0.25]]))
    torch.testing.assert_close(found.maximum, torch.tensor([[0.75, 0.25, 0.0]]))
    torch.testing.assert_close(found.above[0.6], torch.tensor([[1.0, 0.0, 0.0]]))
    last = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert found.entropy[0, 0] == 0
    assert found.entropy[0, 2] == pytest.approx(last)


def test_only_what_is_asked_for_is_computed():
    plain = StreamingAttention([5])(AttentionInputs(*torch.randn(3, 1, 2, 5, 4), 0.5))[1][0]
    assert plain.maximum is plain.above is plain.entropy is None
    both = ColumnRequest(thresholds=(0.3,)) | ColumnRequest(maximum=True, thresholds=(0.1, 0.3))
    assert both == ColumnRequest(maximum=True, thresholds=(0.1, 0.3))
    with pytest.raises(ss.InputError, match="thresholds"):
        ColumnRequest(thresholds=(2.0,))
