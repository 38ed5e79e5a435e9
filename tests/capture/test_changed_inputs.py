"""Inputs that the forward changes: the backward reads what they were, as in eager, where torch's own cut does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memplan.ir.program import Phase
from tests.capture.tracing import traced
from tests.tolerances import assert_near


def a_copy_of_before(x: Tensor, w: Tensor) -> Tensor:
    before = x.clone()
    x.mul_(2)
    return (before * w).sin() @ x


def made_of_before(x: Tensor, w: Tensor) -> Tensor:
    h = (x * 3).sin()
    x.copy_(h * 2)
    return (h * w).sum(0)


def another_layout(x: Tensor, w: Tensor) -> Tensor:
    before = x.t().contiguous()
    x.mul_(2)
    return (before @ w).exp()


def a_part(x: Tensor, w: Tensor) -> Tensor:
    before = x[:4].clone()
    x[:4] = 7.0
    return (before @ w.t()).tanh() + x.mean()


def twice(x: Tensor, w: Tensor) -> Tensor:
    first = x.exp()
    x.add_(1)
    second = x.exp()
    x.add_(1)
    return (first * w + second * w * w).sum(0)


FUNCTIONS = (a_copy_of_before, made_of_before, another_layout, a_part, twice)


def answers(function: Callable[[Tensor, Tensor], Tensor], differentiable: bool) -> list[Tensor]:
    """The result, the changed input, and gradients; by an input that autograd follows or does not."""
    torch.manual_seed(0)
    start, w = torch.randn(8, 8, requires_grad=differentiable), torch.randn(8, 8, requires_grad=True)
    x = start * 1.0 if differentiable else start
    out = function(x, w)
    leaves = [w, start] if differentiable else [w]
    return [out.detach(), x.detach().clone(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("differentiable", [False, True], ids=["buffer", "differentiable"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_backward_reads_what_was(function: Callable[[Tensor, Tensor], Tensor], differentiable: bool) -> None:
    expected = answers(function, differentiable)
    for options in ({}, {"disable": ["rematerialize"]}, {"recompute_products": 0.5}, {"recompute_time": 0}):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="memplan", options=options)
        for ours, eager in zip(answers(compiled, differentiable), expected, strict=True):
            assert_near(ours, eager, str(options))


@pytest.mark.parametrize("dynamic", [False, True])
def test_within_a_budget_and_with_sizes_that_change(dynamic: bool) -> None:
    class Codebook(nn.Module):
        """Distances to entries that move with every step."""

        def __init__(self) -> None:
            super().__init__()
            self.entries = nn.Buffer(torch.randn(6, 8))
            self.project = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.project(x)
            near = torch.softmax(-(y[:, None] - self.entries).square().sum(-1), -1)
            with torch.no_grad():
                self.entries.lerp_(y.detach().mean(0, keepdim=True).expand(6, 8), 0.5)
            return (near @ self.entries.square()).sum()

    found = []
    for options in (None, {}, {"budget": "1MiB", "recompute_products": 0.5}):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Codebook()
        call = model if options is None else torch.compile(model, backend="memplan", options=options, dynamic=dynamic)
        for rows in (5, 9):
            call(torch.randn(rows, 8)).backward()
        found.append([model.entries, *(p.grad for p in model.parameters())])
    for ours in found[1:]:
        for a, b in zip(ours, found[0], strict=True):
            assert a is not None
            assert b is not None
            assert_near(a, b)


def test_what_the_backward_does_not_need_is_not_copied() -> None:
    norm = nn.BatchNorm1d(8)
    compiled, found = traced(lambda x: norm(x).sin())
    out = compiled(torch.randn(16, 8, requires_grad=True))
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert not any(t.startswith("aten.clone") for t in found.targets(Phase.FORWARD))
