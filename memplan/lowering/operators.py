"""Operators of memplan's own that decompositions give: max pooling that keeps a byte where eager keeps eight.

``memplan.max_pool2d`` returns, beside the maxima, the winner's position within its window as an int8;
``memplan.pool_positions`` turns it into the flat positions that `max_pool2d_with_indices` returns. The partitioner
then keeps the bytes and recomputes the positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("memplan", "FRAGMENT")  # type: ignore[no-untyped-call]

if not hasattr(torch.ops.memplan, "max_pool2d"):
    LIBRARY.define(  # type: ignore[no-untyped-call]
        "max_pool2d(Tensor self, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation,"
        " bool ceil_mode) -> (Tensor, Tensor)"
    )
    LIBRARY.define(  # type: ignore[no-untyped-call]
        "pool_positions(Tensor offsets, SymInt width, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding,"
        " SymInt[2] dilation) -> Tensor"
    )


def _max_pool2d(
    self: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.max_pool2d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode)
    rows, columns = _window_starts(indices, stride, padding)
    width = self.shape[-1]
    down = (indices // width - rows) // dilation[0]
    along = (indices % width - columns) // dilation[1]
    return values, (down * kernel_size[1] + along).to(torch.int8)


def _max_pool2d_meta(
    self: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.max_pool2d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode)
    return values, torch.empty_like(indices, dtype=torch.int8)


def _pool_positions(
    offsets: Tensor, width: int, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    rows, columns = _window_starts(offsets, stride, padding)
    offset = offsets.to(torch.int64)
    down = rows + offset // kernel_size[1] * dilation[0]
    return down * width + columns + offset % kernel_size[1] * dilation[1]


def _pool_positions_meta(
    offsets: Tensor, width: int, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    return torch.empty_like(offsets, dtype=torch.int64)


def _window_starts(like: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """Row and column at which each output's window begins."""
    rows = torch.arange(like.shape[-2], device=like.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(like.shape[-1], device=like.device) * stride[1] - padding[1]
    return rows, columns


for _name, _run, _meta in (
    ("max_pool2d", _max_pool2d, _max_pool2d_meta),
    ("pool_positions", _pool_positions, _pool_positions_meta),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(_name, _meta, "Meta")  # type: ignore[no-untyped-call]


def _pair(value: list[int] | int) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    return [value[0], value[0]] if len(value) == 1 else list(value)


def max_pool2d_with_indices(
    self: Tensor,
    kernel_size: list[int],
    stride: list[int] | None = None,
    padding: list[int] | int = 0,
    dilation: list[int] | int = 1,
    ceil_mode: bool = False,
) -> object:
    """Decomposition of ``aten.max_pool2d_with_indices``; a window of more than 127 points stays whole."""
    window = _pair(kernel_size)
    step = _pair(stride) if stride else window
    if window[0] * window[1] > 127:
        return NotImplemented
    pads, dilations = _pair(padding), _pair(dilation)
    values, offsets = torch.ops.memplan.max_pool2d(self, window, step, pads, dilations, ceil_mode)
    positions = torch.ops.memplan.pool_positions(offsets, self.shape[-1], window, step, pads, dilations)
    return values, positions


def efficient_zeros(
    size: list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """Ordinary zeros for autograd's zeros without storage, which nothing may be written over: a plan would."""
    return torch.zeros(size, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory)
