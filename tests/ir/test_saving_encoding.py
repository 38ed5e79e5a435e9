"""Plans written as JSON and read again are equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memplan.analysis import analyze
from memplan.saving_encoding import decode, encode


@pytest.mark.parametrize("dynamic", [False, True])
def test_plans_come_back_equal(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(6, 16)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    graphs = analyze(model, (x,))
    assert len(graphs) == 2
    for g in graphs:
        assert decode(encode(g.plan)) == g.plan
