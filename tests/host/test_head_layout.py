"""Activations with heads are [token, head, d_head], however a model lays them out."""

from __future__ import annotations

import pytest
import torch
from einops import einsum, rearrange

import secondary_sinks as ss
from secondary_sinks.host import head_layout as layouts
from secondary_sinks.host.forward import forward
from secondary_sinks.host.head_layout import HeadLayout, head_layout
from secondary_sinks.host.sites import Site

N_HEADS = 4


def seen_at(model, tokens, site):
    seen = []
    forward(model, tokens[None], [(site, lambda value: seen.append(value[0].clone()))])
    return seen[0]


def shown_at(model, tokens, hook):
    _, cache = model.run_with_cache(tokens[None], names_filter=[hook])
    return cache[hook][0]


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tokens_come_before_heads_with_as_many_heads_as_tokens(tiny, tokens_of, name):
    model, tokens = tiny("deepseek"), tokens_of(N_HEADS)
    value = seen_at(model, tokens, Site(name, 1))
    shown = shown_at(model, tokens, f"blocks.1.attn.hook_{name}")
    assert value.shape == shown.shape  # so that only the values tell
    torch.testing.assert_close(value, shown.transpose(0, 1))


def test_an_edit_of_one_token_reaches_that_token_alone(tiny, tokens_of):
    model, tokens = tiny("deepseek"), tokens_of(N_HEADS)
    logits = []

    def edit(value):
        value = value.clone()
        value[:, 2] = 0
        return value

    for editors in ([], [(Site("v", 1), edit)]):
        logits.append(forward(model, tokens[None], editors, logits=True)[0])
    changed = (logits[0] - logits[1]).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [False, False, True, True]


def test_heads_of_another_width_than_the_configuration_says(tiny, tokens_of):
    """Each head of `z` through its part of W_O: what the attention writes."""
    model, tokens = tiny("deepseek"), tokens_of(9)
    z = seen_at(model, tokens, Site("z", 1))
    assert z.shape == (9, N_HEADS, 8)
    weight = model.blocks[1].attn.original_component.o_proj.weight
    by_head = rearrange(weight, "d_model (head d) -> head d d_model", head=N_HEADS)
    written = einsum(z, by_head, "token head d, head d d_model -> token d_model")
    torch.testing.assert_close(written, seen_at(model, tokens, Site("attn_out", 1)))


def test_gates_are_no_heads(tiny, tokens_of):
    model, tokens = tiny("qwen3-next"), tokens_of(9)
    q = seen_at(model, tokens, Site("q", 1))
    assert q.shape == (9, N_HEADS, 8)
    normed = shown_at(model, tokens, "blocks.1.attn.hook_q_normed").transpose(0, 1)
    torch.testing.assert_close(
        q / q.square().mean(-1, keepdim=True).sqrt(), normed, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "layout", [HeadLayout(4, heads_first=True), HeadLayout(4), HeadLayout(4, gated=True)]
)
def test_what_is_written_is_read_again(layout):
    shape = (2, 4, 7, 6) if layout.heads_first else (2, 7, 8, 6)
    shown = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    value = layout.read(shown)
    assert value.shape[:3] == (2, 7, 4)
    torch.testing.assert_close(layout.write(shown, value), shown)
    torch.testing.assert_close(layout.read(layout.write(shown, 2 * value)), 2 * value)
    changed = (layout.write(shown, value + 1) != shown).float().mean()
    assert changed == (0.5 if layout.gated else 1)


def test_models_that_need_nothing_get_nothing(tiny):
    for family in ("llama", "gpt2"):
        model = tiny(family)
        assert all(head_layout(model, Site(name, 1)) is None for name in layouts.HEAD_SITES)


@pytest.mark.parametrize("shape", [(1, 5, 4, 8), (1, 4, 8), (1, 11, 3, 8), (1, 2, 11, 4, 2)])
def test_unknown_axes_are_refused(make_tiny, tokens_of, monkeypatch, shape):
    model = make_tiny("llama")
    monkeypatch.setattr(layouts, "_shapes", lambda *_: {Site("v", 1): (11, *shape)})
    with pytest.raises(ss.ModelError, match=r"v of layer 1 .* leave this site out"):
        ss.trace(model, tokens_of(9), [ss.Norms("v")])
