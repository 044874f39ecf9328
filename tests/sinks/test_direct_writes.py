"""Direct writes: the parts of a residual along the sink direction add up to the whole."""

from __future__ import annotations

import pytest
import torch

import secondary_sinks as ss
from secondary_sinks.observe.residual_geometry import background_tokens
from secondary_sinks.planted.planted_model import planted_model
from secondary_sinks.sinks.direct_writes import direct_writes


def test_direct_writes_add_up_in_every_family(tiny, family, tokens_of):
    model, tokens = tiny(family), tokens_of(24)
    sink_map = ss.detect_sinks(model, tokens)
    some = [ss.Sink(p, "", int(tokens[p]), "secondary", (layer,)) for p, layer in ((5, 1), (23, 2))]
    writes = direct_writes(model, sink_map, some)
    parts = (writes.mlp + writes.attention).cumsum(dim=1) + writes.embedding[:, None]
    scale = float(writes.projection.abs().max().clamp_min(1))
    torch.testing.assert_close(parts, writes.projection, rtol=1e-4, atol=1e-4 * scale)
    assert writes.error < 1e-5
    # By hand: the projection of the residual on the primary's direction in that layer.
    _, cache = model.run_with_cache(tokens[None])
    for row, sink in enumerate(some):
        residual = cache["resid_post", sink.l_start][0]
        common = residual[background_tokens(residual)].mean(dim=0)
        direction = residual[sink_map.primary_position] - common
        direction = direction / direction.norm()
        written = cache["mlp_out", 0][0, sink.position] @ direction
        assert writes.mlp[row, 0].item() == pytest.approx(written.item(), rel=1e-3, abs=1e-4)
        whole = residual[sink.position] @ direction
        assert writes.projection[row, sink.l_start].item() == pytest.approx(
            whole.item(), rel=1e-3, abs=1e-4
        )


@pytest.mark.slow
def test_a_residual_that_is_not_the_sum_of_its_parts_is_refused():
    planted = planted_model()
    model = planted.load()
    sink_map = ss.detect_sinks(model, planted.tokens(64))
    double = [("blocks.5.hook_resid_post", lambda value, hook: 2 * value)]
    with pytest.raises(ss.ModelError, match="do not add up"):
        direct_writes(model, sink_map, sink_map.secondary, fwd_hooks=double)
