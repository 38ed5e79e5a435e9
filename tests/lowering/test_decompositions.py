"""Operators that are taken apart by memplan's own rules: the pieces give what the whole gives, and only where asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

import memplan
from memplan.ir.config import Config
from memplan.ir.program import Extern, View
from memplan.lowering.decompositions import decomposition_table

aten = torch.ops.aten
Args = tuple[object, ...]
Named = dict[str, object] | None
#: those of a plan for a GPU, which can be called on a CPU as well
TABLE = decomposition_table(Config(target="h100"))
CONVOLUTION, BACKWARD = TABLE[aten.convolution.default], TABLE[aten.convolution_backward.default]


def geometry(dims: int, transposed: bool, groups: int) -> tuple[object, ...]:
    ones = [1] * dims
    return (ones, [0] * dims, ones, transposed, [0] * dims, groups)


def tensors(dims: int, transposed: bool, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    weight = random(4, 6 // groups, *[3] * dims) if transposed else random(6, 4 // groups, *[3] * dims)
    return random(2, 4, *[5] * dims), weight, random(6)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_biases_of_convolutions_on_a_gpu_are_operations_of_their_own(dims: int, transposed: bool, groups: int) -> None:
    x, weight, bias = tensors(dims, transposed, groups)
    rest = geometry(dims, transposed, groups)
    result = aten.convolution(x, weight, bias, *rest)
    torch.testing.assert_close(CONVOLUTION(x, weight, bias, *rest), result)
    for mask in ([True, True, True], [False, True, True], [True, False, True], [False, False, True]):
        found = BACKWARD(result, x, weight, [6], *rest, mask)
        want = aten.convolution_backward(result, x, weight, [6], *rest, mask)
        for a, b in zip(found, want, strict=True):  # type: ignore[call-overload]
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_convolutions_without_biases_and_those_of_a_cpu_stay_whole() -> None:
    x, weight, bias = tensors(2, False, 1)
    rest = geometry(2, False, 1)
    assert CONVOLUTION(x, weight, None, *rest) is NotImplemented
    result = aten.convolution(x, weight, bias, *rest)
    assert BACKWARD(result, x, weight, [6], *rest, [True, True, False]) is NotImplemented
    here = decomposition_table(Config())
    assert here[aten.convolution.default](x, weight, bias, *rest) is NotImplemented
    assert here[aten.convolution_backward.default](result, x, weight, [6], *rest, [True] * 3) is NotImplemented


@pytest.mark.parametrize("target", ["h100", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_under_a_budget_gradients_of_input_and_weight_are_calls_of_their_own(
    target: str | None, transposed: bool
) -> None:
    """With the bits of the one call; asked for one of the two, or for none, nothing changes."""
    backward = decomposition_table(Config(target=target, budget=1 << 30))[aten.convolution_backward.default]
    x, weight, bias = tensors(2, transposed, 1)
    rest = geometry(2, transposed, 1)
    result = aten.convolution(x, weight, bias, *rest)
    asked: list[list[bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: OpOverload, types: object, args: Args = (), kwargs: Named = None) -> object:
            if func is aten.convolution_backward.default:
                asked.append(args[-1])  # type: ignore[arg-type]
            return func(*args, **(kwargs or {}))

    on_gpu = target is not None
    for mask in ([True, True, True], [True, True, False], [True, False, True]):
        asked.clear()
        with Watch():
            found = backward(result, x, weight, [6], *rest, mask)
        want = aten.convolution_backward(result, x, weight, [6], *rest, mask)
        for a, b in zip(found, want, strict=True):  # type: ignore[call-overload]
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
        assert asked == [m for m in ([False, mask[1], mask[2] and not on_gpu], [True, False, False]) if any(m)]
    for mask in ([False, True, False], [True, False, False]):
        assert backward(result, x, weight, [6], *rest, mask) is NotImplemented


def calls(target: str | None) -> list[Extern]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU(), nn.Conv2d(8, 2, 1))
    graphs = memplan.analyze(model, (torch.randn(2, 3, 8, 8),), options={"target": target})
    found = [op for g in graphs for op in g.plan.program.operations if isinstance(op, Extern)]
    return [op for op in found if "convolution" in op.target]


def test_calls_in_a_plan_have_biases_on_a_cpu_and_none_on_a_gpu() -> None:
    for target, biased in (("h100", False), (None, True)):
        found = calls(target)
        assert len(found) == 6
        for op in found:
            if "backward" in op.target:
                assert (op.results[2] is not None) == biased
            else:
                assert isinstance(op.args[2], View) == biased


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_labels_behind_the_first_minus_one_do_not_count(shape: tuple[int, ...], reduction: str) -> None:
    """Torch's own decomposition, which is in its dispatch for autograd, takes them for class 0."""
    x = torch.randn(shape, requires_grad=True)
    labels = torch.randint(-1, 6, shape)

    def loss(x: Tensor) -> Tensor:
        return nn.functional.multilabel_margin_loss(x, labels, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="memplan")
    expected, found = loss(x), compiled(x)
    torch.testing.assert_close(found, expected)
    for ours, eager in zip(*(torch.autograd.grad(t.sum(), x) for t in (found, expected)), strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
