"""Kernels that differ in the sign of a zero are two kernels, wherever equal ones are made one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memplan.ir.loops import Constant


def test_equal_constants_print_alike() -> None:
    f = torch.float32
    assert Constant(0.0, f) != Constant(-0.0, f)
    assert Constant(1, torch.int64) != Constant(True, torch.int64)
    assert Constant(math.nan, f) == Constant(float("nan"), f)
    assert len({Constant(0.0, f), Constant(-0.0, f), Constant(0.0, f)}) == 2


def test_both_zeros_in_one_program() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x * 0.0, x.T @ x * -0.0

    x = torch.rand(4, 4)
    for actual, expected in zip(torch.compile(f, backend="memplan")(x), f(x), strict=True):
        assert torch.equal(torch.signbit(actual), torch.signbit(expected))
