"""A step whose saved tensors share allocations: the report counts each of them once, for as long as it is held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memplan.analysis import analyze
from memplan.passes.reserved import step_memory
from memplan.passes.step_peak import step_peak
from memplan.reports.allocation import residue
from memplan.reports.build import build_report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x.square().mean()


@pytest.mark.parametrize("pools", ["always", "never"])
def test_slabs_count_once(pools: str) -> None:
    graphs = analyze(Net(), (torch.randn(256, 64, requires_grad=True),), options={"pools": pools})
    plans = [g.plan for g in graphs]
    assert bool(plans[1].slabs) == (pools == "always")
    report = build_report(plans, joins=graphs[1].joins)
    assert all(r == 0 for g in report.graphs for r in residue(g))
    assert report.whole is not None
    joins = {later: earlier for earlier, later in graphs[1].joins}
    peak = step_peak(plans, joins).nbytes
    assert report.predicted == {"cpu": peak}
    simulated = step_memory(plans, joins, device="cpu")
    assert abs(simulated.live - simulated.resident - peak) <= 512 * len(report.whole.buffers)
    slabs = {f"{report.graphs[0].name}:{s.name}" for s in plans[1].slabs}
    assert slabs <= {p.name for p in report.whole.pools}
    assert not any(p.name.startswith(f"{report.graphs[1].name}:slab") for p in report.whole.pools)


def test_joins_name_what_the_plans_have() -> None:
    """A saved value that was written in place has the name of what it was written into."""

    def model(x: Tensor, at: Tensor, v: Tensor) -> Tensor:
        y = x.sin()
        y[at] = v.exp()
        return (y * y).sum()

    given = (torch.randn(8, 4, requires_grad=True), torch.tensor([1, 3]), torch.randn(2, 4, requires_grad=True))
    graphs = analyze(model, given)
    forward, backward = (g.plan for g in graphs)
    assert graphs[1].joins
    for saved, received in graphs[1].joins:
        assert saved in forward.placements
        assert received in backward.placements
    build_report([forward, backward], joins=graphs[1].joins)
