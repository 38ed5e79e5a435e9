"""Copies of what the graph holds already go before it is cut, where nobody outside could tell the difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from memplan.ir.program import Phase
from tests.capture.test_partition import leaf, run
from tests.capture.tracing import Traced, traced
from tests.tolerances import assert_near


def copies(found: Traced) -> int:
    return sum(t.startswith("aten.clone") for phase in (Phase.FORWARD, Phase.BACKWARD) for t in found.targets(phase))


def pointless(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return dropout(torch.relu(x @ w), 0.0, training=True) @ v


def test_a_dropout_that_drops_nothing_is_its_argument() -> None:
    found = run(pointless, leaf(32, 16), leaf(16, 64), leaf(64, 8))
    assert copies(found) == 0
    assert found.saved_bytes == 4 * 32 * 64  # the activation, once


def test_the_pass_can_be_switched_off() -> None:
    found = run(pointless, leaf(32, 16), leaf(16, 64), leaf(64, 8), disable=["copies"])
    assert copies(found) > 0


def test_a_copy_of_a_copy() -> None:
    found = run(lambda x, w: (x @ w).sin().clone().clone().exp() @ w, leaf(16, 16), leaf(16, 16))
    assert copies(found) == 0


def test_eager_is_not_charged_with_the_copy() -> None:
    """In eager mode such a dropout returns its argument; a copy that the user asks for is one."""

    def kept(middle: Callable[[Tensor], Tensor]) -> int:
        found = run(lambda x, w, v: middle(torch.relu(x @ w)) @ v, leaf(64, 8), leaf(8, 512), leaf(512, 8))
        assert found.partitioned.eager is not None
        return found.partitioned.eager.between

    plain = kept(lambda h: h)
    assert kept(nn.Dropout(0.0)) == kept(lambda h: dropout(h, 0.5, training=False)) == plain
    assert kept(lambda h: h.clone()) > plain


@pytest.mark.parametrize("dynamic", [False, True])
def test_results_keep_memory_of_their_own(dynamic: bool) -> None:
    """Two results that are equal are two; the user may write over either."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.tanh(x @ w)
        copy = y.clone()
        return y, copy, copy @ w

    compiled, _ = traced(function, dynamic=dynamic)
    answers = []
    for f in (compiled, function):
        torch.manual_seed(0)
        x, w = leaf(8, 8), leaf(8, 8)
        y, copy, product = f(x, w)  # type: ignore[misc]
        assert y.untyped_storage().data_ptr() != copy.untyped_storage().data_ptr()
        gradients = torch.autograd.grad(product.square().sum(), [x, w])
        answers.append((y.detach().clone(), copy.detach().clone(), *gradients))
    for a, b in zip(*answers, strict=True):
        assert_near(a, b)


def test_a_result_may_be_overwritten_before_the_backward() -> None:
    """What the backward reads is the copy, as in eager."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ w) + 1
        kept = y.clone()
        return y, kept.square() @ w

    compiled, _ = traced(function)
    answers = []
    for f in (compiled, function):
        torch.manual_seed(0)
        x, w = leaf(8, 8), leaf(8, 8)
        y, out = f(x, w)  # type: ignore[misc]
        with torch.no_grad():
            y.zero_()
        answers.append(torch.autograd.grad(out.sum(), [x, w]))
    for a, b in zip(*answers, strict=True):
        assert_near(a, b)


def test_a_copy_of_a_part_stays() -> None:
    """Reading the whole instead would keep the whole alive."""
    found = run(lambda x, w: (x @ w)[:2].clone().sin().square() @ w, leaf(64, 16), leaf(16, 16))
    assert found.saved_bytes <= 4 * 16 * 2 * 3


def test_values_changed_inside_of_the_graph() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        before = y.clone()
        y.mul_(3)
        return (before.sin() * y) @ w

    run(function, leaf(8, 8), leaf(8, 8))


def test_checkpointed_regions_keep_their_boundaries() -> None:
    drop = nn.Dropout(0.0)

    def block(x: Tensor, w: Tensor) -> Tensor:
        return drop(torch.tanh(drop(x @ w)))

    def function(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(block, x, w, use_reentrant=False)  # type: ignore[assignment]
        return x * 2

    found = run(function, leaf(8, 16), leaf(16, 16))
    assert found.saved_bytes <= 3 * 8 * 16 * 4
