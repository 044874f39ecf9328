"""How logits come from queries and keys: found by trying, in every family."""

from __future__ import annotations

import pytest
import torch

from secondary_sinks.host.queries_keys import PAIRINGS, query_key_plan, rotate

EXPECTED = {
    "gpt2": ("none", "", False),
    "neox": ("computed", "halves", False),
    "phi3": ("computed", "halves", False),
    "gpt-oss": ("read", "doubled halves", False),
    "qwen3": ("read", "halves", True),
    "gemma3": ("read", "halves", True),
    "olmo2": ("read", "halves", True),
}


def test_every_family_has_a_plan(tiny, family):
    plan = query_key_plan(tiny(family))
    expected = EXPECTED.get(family, ("read", "halves", False))
    assert (plan.rotation, plan.pairing, plan.normed) == expected
    factor = 16 if family in ("gemma2", "gemma3") else 8**0.5
    assert plan.scale == pytest.approx((1 / factor,) * 3, rel=1e-3)
    assert plan.cap == (50.0 if family == "gemma2" else 0.0)
    assert plan.splits_rotation
    assert plan.splits_biases == (not plan.normed)
    assert query_key_plan(tiny(family)) is plan


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rotations_keep_norms_depend_on_the_distance_and_can_be_undone(pairing):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 12, generator=generator)
    q, k = q.expand(9, 3, 12), k.expand(9, 3, 12)
    angle = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.4, 0.1, 0.02])
    layout = {
        "halves": lambda x: torch.cat([x, x], dim=-1),
        "doubled halves": lambda x: x,
        "neighbors": lambda x: torch.cat([x, x], dim=-1),
        "repeated neighbors": lambda x: x.repeat_interleave(2, dim=-1),
    }[pairing]
    cos, sin = layout(angle.cos()), layout(angle.sin())
    turned_q, turned_k = rotate(q, cos, sin, pairing), rotate(k, cos, sin, pairing)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned_q[..., 8:], q[..., 8:])
    assert not torch.allclose(turned_q[1, :, :8], q[1, :, :8])
    logits = torch.einsum("qhd,khd->hqk", turned_q, turned_k)
    torch.testing.assert_close(logits[:, 1:, 1:], logits[:, :-1, :-1])
    torch.testing.assert_close(rotate(turned_q, cos, sin, pairing, back=True), q.contiguous())
    longer = rotate(q, 1.3 * cos, 1.3 * sin, pairing)
    torch.testing.assert_close(
        rotate(longer, 1.3 * cos, 1.3 * sin, pairing, back=True), q.contiguous()
    )


def test_a_model_whose_logits_have_something_else_in_them_is_unknown(make_tiny):
    model = make_tiny("llama")
    inner = model.blocks[1].attn.hook_attn_scores
    forward = inner.forward
    inner.forward = lambda x: forward(x) + torch.linspace(0, 3, x.shape[-1])
    plan = query_key_plan(model)
    assert (plan.rotation, plan.sites) == ("unknown", ())
    assert not plan.splits_rotation
