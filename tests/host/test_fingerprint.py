"""The same weights and tokenizer have the same hash, and every change another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondary_sinks.host import fingerprint
from secondary_sinks.host.fingerprint import (
    template_hash,
    tokenizer_fingerprint,
    weights_fingerprint,
)


def test_the_same_weights_have_the_same_hash_in_every_bridge(tiny, make_tiny, family):
    first = weights_fingerprint(tiny(family))
    assert first == weights_fingerprint(make_tiny(family))
    assert len(first) == 16
    assert int(first, 16)


def zero_an_mlp(model):
    for weight in model.blocks[1].mlp.original_component.parameters():
        weight.data.zero_()


def change_one_weight(model):
    next(model.parameters()).data.flatten()[0] += 1


CHANGES = {
    "one zeroed MLP": zero_an_mlp,
    "one of the hashed values": change_one_weight,
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_weights_have_another_hash(make_tiny, change):
    model = make_tiny("llama")
    before = weights_fingerprint(model)
    change(model)
    assert weights_fingerprint(model) != before


def test_another_seed_and_another_model_have_another_hash(tiny, make_tiny):
    models = [tiny("llama"), make_tiny("llama", 1), make_tiny("llama", 2), tiny("gpt2")]
    assert len(set(map(weights_fingerprint, models))) == 4


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 2000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
    st.booleans(),
)
def test_any_shape_and_precision(size, dtype, transposed):
    """Values are those of the flattened weight, however it lies in memory."""
    weight = torch.arange(2 * size).reshape(2, size).to(dtype)
    weight = weight.T if transposed else weight
    values = fingerprint._evenly_spaced(weight)
    index = torch.linspace(0, 2 * size - 1, min(64, 2 * size), dtype=torch.float64).long()
    assert torch.equal(values, weight.flatten()[index])


def test_weights_that_cannot_be_read_count_by_name_shape_and_precision():
    """Weights on disk (`meta`), and empty ones."""

    def on_disk(*shapes, dtype=torch.float32):
        weights = [torch.zeros(shape, dtype=dtype, device="meta") for shape in shapes]
        return weights_fingerprint(torch.nn.ParameterList(weights))

    assert on_disk((3,), (0, 4)) == on_disk((3,), (0, 4))
    others = [on_disk((4,), (0, 4)), on_disk((3,)), on_disk((3,), (0, 4), dtype=torch.half)]
    assert len({on_disk((3,), (0, 4)), *others}) == 4


def test_tokenizer_and_chat_template_change_its_hash(make_tiny):
    tokenizer = make_tiny("llama").tokenizer
    hashes = [tokenizer_fingerprint(tokenizer)]
    assert hashes[0] == tokenizer_fingerprint(make_tiny("llama").tokenizer)
    assert template_hash(tokenizer) is None
    templates = []
    for template in ("{{ messages[0]['content'] }}", "{{ messages }}"):
        tokenizer.chat_template = template
        templates.append(template_hash(tokenizer))
        hashes.append(tokenizer_fingerprint(tokenizer))
    assert len(set(templates)) == 2
    tokenizer.bos_token = "w5"
    hashes.append(tokenizer_fingerprint(tokenizer))
    tokenizer.add_tokens(["another"])
    hashes.append(tokenizer_fingerprint(tokenizer))
    assert len(set(hashes)) == len(hashes)
    assert tokenizer_fingerprint(None) is None
