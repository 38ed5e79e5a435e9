"""`memplan verify` compares with eager: what it must see, and what it must not take for an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memplan.reports import answers
from memplan.reports.answers import compare_with_eager
from memplan.reports.target import Made, Request

REAL = Request(fake=False)


class BiasBeforeNorm(nn.Module):
    """The exact gradient of the convolution's bias is zero: the norm takes away every constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e5 * self.head(self.norm(self.conv(x)).relu().mean((2, 3))).square().mean()


def made(model: nn.Module, *shape: int) -> Made:
    torch.manual_seed(1)
    return Made(model, (torch.randn(*shape),), {})


@pytest.fixture
def compiled_as(monkeypatch: pytest.MonkeyPatch) -> object:
    """Instead of memplan's, a call of ours stands for the compiled model."""

    def use(call: object) -> None:
        monkeypatch.setattr(answers, "compiled_with", lambda made, request, backend: call)

    return use


def test_a_gradient_that_is_rounding_alone_is_no_error(compiled_as: object) -> None:
    torch.manual_seed(0)
    model = BiasBeforeNorm()

    class Negated(torch.autograd.Function):
        """Rounded the other way."""

        @staticmethod
        def forward(context: object, bias: torch.Tensor) -> torch.Tensor:
            return bias.clone()

        @staticmethod
        def backward(context: object, grad: torch.Tensor) -> torch.Tensor:
            return -grad

    def noisy(x: torch.Tensor) -> torch.Tensor:
        weight, bias = model.conv.weight, Negated.apply(model.conv.bias)
        hidden = nn.functional.conv2d(x, weight, bias)
        return 1e5 * model.head(model.norm(hidden).relu().mean((2, 3))).square().mean()

    compiled_as(noisy)  # type: ignore[operator]
    found = compare_with_eager(made(model, 8, 3, 12, 12), REAL, "t")
    assert found.right
    assert found.rounding == ("gradient of conv.bias",)


def test_memplan_itself_is_right_about_it() -> None:
    torch.manual_seed(0)
    found = compare_with_eager(made(BiasBeforeNorm(), 8, 3, 12, 12), REAL, "t")
    assert found.right, found
    assert set(found.rounding) <= {"gradient of conv.bias"}


@pytest.mark.parametrize("error", [0.05, 1.0])
def test_a_wrong_gradient_is_an_error(compiled_as: object, error: float) -> None:
    torch.manual_seed(0)
    model = BiasBeforeNorm()
    handle = model.head.weight.register_hook(lambda g: g * (1 + error * wrong))
    wrong = 0.0

    def call(x: torch.Tensor) -> torch.Tensor:
        nonlocal wrong
        wrong = 1.0
        return model(x)

    compiled_as(call)  # type: ignore[operator]
    found = compare_with_eager(made(model, 8, 3, 12, 12), REAL, "t")
    handle.remove()
    assert not found.right
    assert found.where == "gradient of head.weight"
    assert found.difference == pytest.approx(error, rel=0.01)


def test_a_small_gradient_that_is_wrong_is_an_error(compiled_as: object) -> None:
    """Small beside the others, but exactly computed by eager: ours is not rounding."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.a).sum() + 1e-6 * (x * self.b).sum()

    model = Small()

    def call(x: torch.Tensor) -> torch.Tensor:
        return (x * model.a).sum() + 2e-6 * (x * model.b).sum()

    compiled_as(call)  # type: ignore[operator]
    found = compare_with_eager(made(model, 4), REAL, "t")
    assert (found.right, found.where, found.rounding) == (False, "gradient of b", ())


def test_float64_that_draws_other_numbers_excuses_nothing() -> None:
    exact = {"result 0": torch.tensor(5.0), "gradient of a": torch.tensor([3.0]), "gradient of b": torch.tensor([1e-9])}
    eager = {"result 0": torch.tensor(1.0), "gradient of a": torch.tensor([9.0]), "gradient of b": torch.tensor([2e-9])}
    got = eager | {"gradient of b": torch.tensor([4e-9])}
    off = {"result 0": 0.0, "gradient of a": 0.0, "gradient of b": 1.0}
    assert not answers.is_rounding("gradient of b", got, eager, exact, off)
    agreeing = eager | {"gradient of b": torch.tensor([1e-9])}
    assert answers.is_rounding("gradient of b", got, eager, agreeing, off)
    assert not answers.is_rounding("gradient of b", got, eager, {}, off), "no float64"


def test_state_is_compared_and_put_back(compiled_as: object) -> None:
    model = BiasBeforeNorm()
    before = {k: v.clone() for k, v in model.named_buffers()}

    def forgets(x: torch.Tensor) -> torch.Tensor:
        mean = model.norm.running_mean.clone()
        result = model(x)
        model.norm.running_mean = mean + 7
        return result

    compiled_as(forgets)  # type: ignore[operator]
    found = compare_with_eager(made(model, 8, 3, 12, 12), REAL, "t")
    assert (found.right, found.where) == (False, "buffer norm.running_mean")
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_inputs_are_copies_and_what_is_written_to_them_is_compared(compiled_as: object) -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x.sum()

    given = Made(InPlace(), (torch.zeros(3),), {})
    assert compare_with_eager(given, REAL, "t").right, "memplan writes it, too"
    assert given.args[0].sum() == 0
    compiled_as(lambda x: (x + 1).sum())  # type: ignore[operator]
    found = compare_with_eager(given, REAL, "t")
    assert (found.right, found.where) == (False, "input 0")


def test_a_missing_gradient_is_an_error(compiled_as: object) -> None:
    model = BiasBeforeNorm()
    compiled_as(lambda x: model.head(x.mean((2, 3)).repeat(1, 3)[:, :8]).square().mean())  # type: ignore[operator]
    found = compare_with_eager(made(model, 8, 3, 12, 12), REAL, "t")
    assert not found.right
    assert "gradient of conv.weight" in found.where
