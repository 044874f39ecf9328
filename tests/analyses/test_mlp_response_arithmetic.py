"""Components of inputs: found, turned toward the sinks, and scored."""

from __future__ import annotations

import math

import torch

from secondary_sinks.analyses.mlp_response import input_components, norm_and_cosine
from secondary_sinks.analyses.mlp_stage_alignment import stage_cosines, stage_norms


def test_a_direction_that_sinks_have_is_the_first_component():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    is_sink = torch.arange(40) < 10
    inputs = 0.1 * torch.randn(40, 16, generator=generator)
    inputs[is_sink] -= 3 * direction
    found = input_components(inputs, is_sink, 4)
    assert found.components[0] @ direction < -0.99, "sinks lie on the positive side"
    assert found.separation[0] == 1
    assert (found.separation[1:] < 0.9).all()
    assert found.variance_ratio[0] > 0.8
    assert (found.variance_ratio.diff() <= 0).all()
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(4))
    torch.testing.assert_close(found.projection, inputs @ found.components.T)


def test_nothing_has_a_norm_and_no_cosine():
    norm, cosine = norm_and_cosine(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([3.0, 0]))
    assert norm.tolist() == [0, 2]
    assert math.isnan(cosine[0])
    assert cosine[1] == 0


def test_stages_that_are_missing_or_zero_have_no_cosine():
    tokens = {"input": torch.tensor([[1.0, 0], [0, 0]]), "up": torch.ones(2, 3)}
    found = stage_cosines(tokens, {"input": torch.tensor([[1.0, 1.0]])}, ("input", "up", "output"))
    assert found[0, 0].item() == torch.tensor(0.5).sqrt().item()
    assert found.isnan().tolist() == [[False, True, True], [True, True, True]]
    assert stage_norms(tokens, ("up", "gate"))[0, 0] == torch.tensor(3.0).sqrt()
