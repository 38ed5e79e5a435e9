"""Convolutions get channels last; what the caller sees, and what depends on strides, stays as it was."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from memplan.capture import layout
from memplan.ir.program import Phase
from tests.capture.tracing import Traced, traced
from tests.tolerances import assert_near

aten = torch.ops.aten
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewriting is of graphs alone, so it can be tried where there is no GPU."""
    monkeypatch.setattr(layout, "DTYPES", {"cpu": (torch.float32,)})


class Network(nn.Module):
    """Encoder and decoder: depthwise, strided, pointwise and transposed convolutions, norms, pooling, a concatenation,
    an attention-like detour through (batch, positions, channels), and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU())
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False)
        self.deep = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.MaxPool2d(2)
        )
        self.mix = nn.Linear(32, 32)
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=4)
        self.head = nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.stem(x)
        d = self.deep(self.down(a))
        mixed = self.mix(d.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(d)
        up = nn.functional.pad(self.up(mixed + d), (0, 2, 0, 2))
        return self.head(torch.cat([a, up], 1)), d


def compared(module: nn.Module, *inputs: Tensor, strides: bool = True) -> Traced:
    """Results, gradients and buffers as eager's, with eager's strides."""
    other = copy.deepcopy(module)
    compiled, found = traced(other.forward)
    answers = []
    for m, call in ((module, module.forward), (other, compiled)):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        results = call(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        if any(r.requires_grad for r in results):
            sum(r.square().sum() for r in results).backward()
        gradients = [t.grad for t in (*leaves, *m.parameters()) if t.grad is not None]
        answers.append([*(r.detach() for r in results), *gradients, *m.buffers()])
    for a, b in zip(*answers, strict=True):
        assert_near(a, b)
        if strides:
            assert layout._strides(a) == layout._strides(b)
    return found


def convolutions(graph: torch.fx.Graph) -> list[bool]:
    """For each convolution of a graph, whether all of its tensors have channels last."""
    found = [n for n in graph.nodes if n.target in layout._TURNED]
    tensors = [[n.args[k].meta["val"] for k in layout._TURNED[n.target]] for n in found]
    return [all(t.is_contiguous(memory_format=LAST) for t in ts) for ts in tensors]


def test_training_has_channels_last_and_the_callers_strides() -> None:
    found = compared(Network(), torch.randn(2, 3, 32, 32, requires_grad=True))
    assert convolutions(found.forward.graph) == [True] * 5
    assert convolutions(found.backward.graph) == [True] * 5


def test_inference_has_channels_last() -> None:
    module = Network().eval()
    with torch.no_grad():
        found = compared(module, torch.randn(2, 3, 32, 32))
    assert convolutions(found.graphs[Phase.INFERENCE].graph) == [True] * 5


def test_what_is_channels_last_already_is_not_copied() -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=LAST)
    found = compared(module, torch.randn(2, 8, 16, 16).to(memory_format=LAST))
    assert not [n for n in found.forward.graph.nodes if n.target is aten.clone.default]


def test_groups_of_several_channels_keep_their_layout() -> None:
    module = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3, groups=4))
    assert not any(convolutions(compared(module, torch.randn(2, 8, 32, 32)).forward.graph))


def stack() -> nn.Sequential:
    """Convolutions that are worth turning their small input round."""
    return nn.Sequential(*(nn.Conv2d(3 if k == 0 else 32, 32, 3, padding=1) for k in range(3)))


class ByStrides(nn.Module):
    """The last convolution's result, turned so that channels last changes it, read by a view of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.body = stack()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)[:, :4].amax(3).exp()
        return y.as_strided((2, 3), (7, 11)) + 1


def test_views_of_a_storage_see_the_storage_that_they_did() -> None:
    found = compared(ByStrides(), torch.randn(2, 3, 64, 64))
    assert all(convolutions(found.forward.graph))


class Turning(nn.Module):
    """Every convolution's result is laid out anew by something that has an opinion of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).cumsum(1)).cumsum(1)


def test_where_more_would_be_copied_than_is_won_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=layout.__name__):
        found = compared(Turning(), torch.randn(2, 16, 32, 32))
    assert not any(convolutions(found.forward.graph))
    assert not caplog.records


def test_two_results_of_one_storage_stay_so() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x)[:, :4].clone()
            return y, y.view(y.shape[0], -1)

    module = Both()
    compiled, found = traced(module.forward)
    y, flat = compiled(torch.randn(2, 3, 64, 64))
    assert y.data_ptr() == flat.data_ptr()
    assert y.is_contiguous()
    assert all(convolutions(found.forward.graph))


def test_off_by_name() -> None:
    module = Network()
    compiled, found = traced(module.forward, disable=["layout"])
    compiled(torch.randn(2, 3, 32, 32))
    assert not any(convolutions(found.forward.graph))
