"""Entropies are those of the full pattern, between 0 and that of uniform attention."""

from __future__ import annotations

import torch

import secondary_sinks as ss

N = 24


class Pattern(ss.Collector):
    sites = ("pattern",)

    def start(self, run):
        self.layers = []

    def update(self, site, layer, activation):
        self.layers.append(activation.clone())

    def result(self):
        return torch.stack(self.layers)


def test_entropy_is_that_of_the_pattern(tiny, family, tokens_of):
    seen = ss.trace(tiny(family), tokens_of(N), [Pattern(), ss.AttentionEntropy()])
    pattern, found = seen["Pattern"].double(), seen["AttentionEntropy"]
    weight = pattern / pattern.sum(dim=-1, keepdim=True)
    entropy = torch.distributions.Categorical(probs=weight).entropy()
    torch.testing.assert_close(found.by_head.double(), entropy.mean(dim=2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.by_query.double(), entropy.mean(dim=1), atol=1e-4, rtol=1e-4)
    assert torch.isnan(found.normalized_by_query[:, 0]).all()
    known = found.normalized_by_query[:, 1:]
    assert ((known >= 0) & (known <= 1 + 1e-5)).all()


def test_extremes():
    """A head that looks at one key has entropy 0, uniform attention 1, also within a window."""
    one, uniform = torch.zeros(8, 8), torch.ones(8, 8).tril()
    one[:, 0] = 1
    window = uniform.triu(-2)
    collector = ss.AttentionEntropy()
    run = type("Run", (), {})()
    collector.start(run)
    collector.update("pattern", 0, torch.stack([one, uniform / uniform.sum(-1, keepdim=True)]))
    collector.update("pattern", 1, (window / window.sum(-1, keepdim=True))[None].expand(2, -1, -1))
    found = collector.result()
    torch.testing.assert_close(found.normalized_by_head[0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found.normalized_by_head[1], torch.ones(2))
    assert found.by_query[1, -1].item() == torch.tensor(3.0).log().item()


def test_rows_that_leave_weight_out_are_normalized():
    half = torch.full((1, 4, 4), 0.1).tril()
    collector = ss.AttentionEntropy()
    collector.start(None)
    collector.update("pattern", 0, half)
    torch.testing.assert_close(collector.result().normalized_by_head, torch.ones(1, 1))
