"""A whole step in the simulated device allocator: bytes add up, and what leaves one plan is there for the next."""

from __future__ import annotations

import torch
from torch import nn

from memplan.analysis import analyze
from memplan.passes.reserved import step_memory

MIB = 2**20


def test_a_training_step() -> None:
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    x = torch.randn(1024, 512)
    graphs = analyze(model, (x,), options={"pools": "never"})
    plans = [g.plan for g in graphs]
    joins = {later: earlier for g in graphs for earlier, later in g.joins}
    found = step_memory(plans, joins, device="cpu")
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert parameters + x.nbytes <= found.resident <= parameters + x.nbytes + 8 * 512
    assert found.resident <= found.segments <= min(found.reserved, found.resident + 64 * MIB)
    # parameters, the input, what GELU needs of its own input, and gradients of one weight at least
    assert found.live >= found.resident + 1024 * 2048 * 4 + 512 * 2048 * 4
    assert found.live <= found.resident + sum(max(p.timeline) for p in plans) + 64 * 512
    assert found.live <= found.reserved <= found.live + 64 * MIB
    assert found.reserved % (2 * MIB) == 0


def test_more_steps_reserve_no_more_than_three() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    graphs = analyze(model, (torch.randn(4096, 64),))
    plans = [g.plan for g in graphs]
    joins = {later: earlier for g in graphs for earlier, later in g.joins}
    assert step_memory(plans, joins, device="cpu", steps=3) == step_memory(plans, joins, device="cpu", steps=6)
