"""Which texts share a forward pass: no batch is more than a quarter padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secondary_sinks as ss
from secondary_sinks.observe.batch import MOST_PADDING, batches_of


def padded(batch, lengths):
    return len(batch) * max(lengths[index] for index in batch)


@given(st.lists(st.integers(2, 1000), min_size=1, max_size=60), st.integers(1, 20))
def test_every_text_once_and_no_batch_wasteful(lengths, batch_size):
    batches = batches_of(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        n_padded = padded(batch, lengths)
        assert n_padded - sum(lengths[index] for index in batch) <= MOST_PADDING * n_padded
    # No text that would have fitted into the batch before it has begun another.
    for batch, following in itertools.pairwise(batches):
        larger = [*batch, following[0]]
        waste = padded(larger, lengths) - sum(lengths[index] for index in larger)
        assert len(batch) == batch_size or waste > MOST_PADDING * padded(larger, lengths)


def test_equal_texts_fill_batches():
    assert [len(batch) for batch in batches_of([50] * 10, 4)] == [4, 4, 2]


def tokens_run(model, texts, batch_size):
    """Shapes of all passes, and the results."""
    shapes = []
    handle = model.original_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(
            tuple((args[0] if args else kwargs["input_ids"]).shape)
        ),
        with_kwargs=True,
    )
    traces = ss.trace(model, texts, [ss.ResidualNorms()], batch_size=batch_size, progress=False)
    handle.remove()
    return shapes, traces


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_short_and_long_texts_do_not_share_a_pass(make_tiny, tokens_of, batch_size):
    model = make_tiny("llama")
    ss.trace(model, tokens_of(9), [ss.ResidualNorms()])  # with the checks of a first use
    lengths = [5, 110, 6, 6, 100, 5, 7, 6]
    texts = [tokens_of(n, seed=index) for index, n in enumerate(lengths)]
    shapes, traces = tokens_run(model, texts, batch_size)
    n_run = sum(rows * length for rows, length in shapes)
    assert sum(lengths) <= n_run <= sum(lengths) / (1 - MOST_PADDING)
    assert len(shapes) == {1: 8, 2: 4, 16: 2}[batch_size]
    assert max(rows for rows, _ in shapes) <= batch_size
    # In the order of the texts, with the numbers of each alone.
    for text, in_batch in zip(texts, traces, strict=True):
        assert torch.equal(in_batch.tokens, text)
        alone = ss.trace(model, text, [ss.ResidualNorms()])
        torch.testing.assert_close(in_batch["ResidualNorms"], alone["ResidualNorms"])
