"""Traced graphs that are run as they are, by `memplan.analyze`."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.capture.traced import runnable

aten = torch.ops.aten


def graph() -> torch.fx.GraphModule:
    made = torch.fx.Graph()
    total, a, b = (made.placeholder(n) for n in ("total", "a", "b"))
    made.output((made.call_function(aten.addmm.dtype, (total, a, b, torch.float32)),))
    return torch.fx.GraphModule({}, made)


def test_products_added_in_another_dtype_run_on_fake_tensors() -> None:
    module = graph()
    with FakeTensorMode():
        a, b = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(8, 16, dtype=torch.bfloat16)
        (out,) = runnable(module)(torch.empty(4, 16), a, b)
    assert out.shape == (4, 16)
    assert out.dtype is torch.float32
    assert any(n.target is aten.addmm.dtype for n in module.graph.nodes)  # what is planned stays as it was


def test_other_graphs_are_left_alone() -> None:
    module = torch.fx.symbolic_trace(lambda x: x + 1)
    assert runnable(module) is module
