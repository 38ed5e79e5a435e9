"""Rows around a product are filled beside it: the product is written where the padded result has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import memplan

BYTES = 4


def compiled_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Predicted peak; what is computed in poison mode equals what eager computes."""
    torch._dynamo.reset()
    with memplan.record() as recording:
        found = torch.compile(function, backend="memplan", options={"poison": True})(*inputs)
    torch.testing.assert_close(found, function(*inputs))
    return max(max(g.plan.predicted_peak.values()) for g in recording.graphs)


@pytest.mark.parametrize("rows", [(2, 2), (0, 3), (1, 0)])
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_a_product_is_written_between_the_rows(rows: tuple[int, int], value: float) -> None:
    x, w = torch.randn(64, 128), torch.randn(128, 32)
    nbytes = compiled_bytes(lambda x, w: pad(x @ w, (0, 0, *rows), value=value), x, w)
    assert nbytes == (64 + sum(rows)) * 32 * BYTES


def test_a_batch_of_products() -> None:
    a, b = torch.randn(8, 16, 32), torch.randn(8, 32, 16)
    nbytes = compiled_bytes(lambda a, b: pad(a @ b, (0, 0, 0, 0, 1, 1)), a, b)
    assert nbytes == 10 * 16 * 16 * BYTES


@pytest.mark.parametrize("around", [(1, 1), (0, 0, -1, 2), (1, 0, 1, 0), (0, 0, -1, -1)])
def test_other_paddings_are_right(around: tuple[int, ...]) -> None:
    x, w = torch.randn(16, 8), torch.randn(8, 8)
    compiled_bytes(lambda x, w: pad(x @ w, around, value=2.0), x, w)


def test_a_product_that_is_read_besides_and_one_that_kernels_read() -> None:
    x, w = torch.randn(16, 8), torch.randn(8, 8)

    def both(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return pad(y, (0, 0, 2, 2))[1:17] * 2 + y.sum()

    compiled_bytes(both, x, w)
    compiled_bytes(lambda x, w: pad(x @ w, (0, 0, 2, 2)) + (x @ w).mean(), x, w)


def test_sizes_that_change() -> None:
    function = torch.compile(lambda x, w: pad(x @ w, (0, 0, 1, 2)), backend="memplan", dynamic=True)
    w = torch.randn(8, 8)
    for rows in (5, 9, 12):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(function(x, w), pad(x @ w, (0, 0, 1, 2)))
