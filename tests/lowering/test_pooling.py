"""Pooling and resizing, and memplan's own max pooling with a byte for each winner."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from memplan.lowering import operators  # noqa: F401
from tests.lowering.harness import LoweringMode, check

aten, memplan = torch.ops.aten, torch.ops.memplan

WINDOWS = [
    ([2, 2], [2, 2], [0, 0], [1, 1], False),
    ([3, 3], [2, 2], [1, 1], [1, 1], False),
    ([3, 2], [1, 2], [1, 0], [1, 2], True),
    ([3, 3], [2, 2], [1, 1], [2, 2], False),
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("special", [None, math.nan, -math.inf])
def test_maxima(window: tuple[object, ...], special: float | None) -> None:
    x = torch.randn(2, 3, 9, 8)
    if special is not None:
        x[:, :, 2:6, 1:5] = special
    values, indices = aten.max_pool2d_with_indices(x, *window)
    assert check(aten.max_pool2d_with_indices.default, x, *window)
    assert check(aten.max_pool2d_with_indices_backward.default, torch.randn_like(values), x, *window, indices)
    own, offsets = memplan.max_pool2d(x, *window)
    assert offsets.dtype is torch.int8
    torch.testing.assert_close(own, values, equal_nan=True)
    assert check(memplan.max_pool2d.default, x, *window)
    positions = memplan.pool_positions(offsets, x.shape[-1], *window[:4])
    torch.testing.assert_close(positions, indices)
    assert check(memplan.pool_positions.default, offsets, x.shape[-1], *window[:4])


def test_maxima_without_a_batch_and_of_integers() -> None:
    assert check(aten.max_pool2d_with_indices.default, torch.randn(3, 6, 6), [2, 2])
    assert check(aten.max_pool2d_with_indices.default, torch.randint(-9, 9, (1, 3, 6, 6)), [3, 3], [1, 1], [1, 1])


@pytest.mark.parametrize("stride", [[2, 2], [1, 3]])
@pytest.mark.parametrize("padding", [[0, 0], [1, 1]])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("divisor", [None, 5])
def test_averages(
    stride: list[int], padding: list[int], ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> None:
    x = torch.randn(2, 3, 8, 7).contiguous(memory_format=torch.channels_last)
    options = ([3, 2], stride, padding, ceil_mode, count_include_pad, divisor)
    out = aten.avg_pool2d(x, *options)
    assert check(aten.avg_pool2d.default, x, *options)
    assert check(aten.avg_pool2d_backward.default, torch.randn_like(out), x, *options)


def test_adaptive_averages() -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.bfloat16)
    assert check(aten._adaptive_avg_pool2d.default, x, [3, 2])
    assert check(aten._adaptive_avg_pool2d_backward.default, torch.randn(2, 3, 3, 2).bfloat16(), x)
    assert check(aten._adaptive_avg_pool2d.default, x, [4, 2]) is None


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2, "mode": "nearest"},
        {"size": (5, 7), "mode": "nearest"},
        {"scale_factor": 1.5, "mode": "nearest-exact"},
        {"scale_factor": 2, "mode": "bilinear"},
        {"size": (13, 3), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 0.7, "mode": "bilinear", "antialias": False},
    ],
    ids=str,
)
def test_resizing(options: dict[str, object]) -> None:
    x = torch.randn(2, 3, 8, 6, requires_grad=True)
    mode = LoweringMode()
    with mode:
        F.interpolate(x, **options).sum().backward()  # type: ignore[arg-type]
    assert any("upsample" in target and "backward" not in target for target in mode.lowered)
