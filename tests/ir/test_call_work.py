"""What calls of libraries move and compute: whole tiles of attention, and convolutions by their channels and groups."""

from __future__ import annotations

import pytest
import torch
from torch.utils import flop_counter

from memplan.ir.call_work import call_work
from memplan.ir.device import Unit, Work

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention.default
BACKWARD = aten._scaled_dot_product_flash_attention_backward.default


def meta(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, device="meta")


def work(target: object, *args: object, result: object = None, elements: int = 0, **kwargs: object) -> Work:
    return call_work(target, args, kwargs, result, nbytes=64, itemsize=2, elements=elements)


def attention(rows: int, columns: int, *, causal: bool = False) -> Work:
    query, key = meta(2, 3, rows, 64), meta(2, 3, columns, 64)
    return work(FORWARD, query, key, key, 0.0, causal)


def convolution(channels: int, results: int, groups: int, *, transposed: bool = False) -> Work:
    shape = (channels, results // groups) if transposed else (results, channels // groups)
    x, weight, out = meta(2, channels, 8, 8), meta(*shape, 3, 3), meta(2, results, 8, 8)
    rest = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], groups)
    return work(aten.convolution.default, x, weight, None, *rest, result=out)


def test_attention_computes_whole_tiles() -> None:
    assert attention(256, 384) == Work(64, 2 * 6 * 256 * 384 * 128, Unit.ATTENTION, 2)
    assert attention(197, 300) == attention(256, 384)
    assert attention(256, 256, causal=True).operations == attention(256, 256).operations // 2


def test_attention_that_fills_its_tiles_is_as_torch_counts_it() -> None:
    query = meta(2, 3, 256, 64)
    formula = flop_counter.flop_registry[aten._scaled_dot_product_flash_attention]
    assert attention(256, 256).operations == formula(query, query, query)
    formula = flop_counter.flop_registry[aten._scaled_dot_product_flash_attention_backward]
    backward = work(BACKWARD, query, query, query, query, query, meta(2, 3, 256), None, None, 256, 256, 0.0, False)
    assert backward.operations == formula(query, query, query, query, out_val=(query,) * 3)


def test_attention_on_a_cpu_counts_as_elsewhere() -> None:
    query = meta(2, 3, 256, 64)
    found = work(aten._scaled_dot_product_flash_attention_for_cpu.default, query, query, query)
    assert found == attention(256, 256)


@pytest.mark.parametrize(
    ("channels", "results", "groups", "unit"),
    [
        (64, 64, 1, Unit.CONVOLUTION),
        (64, 64, 2, Unit.CONVOLUTION),
        (64, 64, 64, Unit.DEPTHWISE),
        (64, 64, 16, Unit.DEPTHWISE),
        (3, 64, 1, Unit.NARROW),
    ],
)
def test_convolutions_by_the_channels_that_one_result_sums(
    channels: int, results: int, groups: int, unit: Unit
) -> None:
    found = convolution(channels, results, groups)
    assert found.unit is unit
    assert found.operations == 2 * (2 * results * 64) * (channels // groups * 9)


def test_transposed_convolutions_sum_over_their_inputs_channels() -> None:
    found = convolution(64, 32, 4, transposed=True)
    assert found.unit is Unit.CONVOLUTION
    assert found.operations == 2 * (2 * 64 * 64) * (32 // 4 * 9)


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("asked", [(True, True), (False, True), (True, False)])
def test_a_convolutions_gradients_take_as_long_as_itself_each(groups: int, asked: tuple[bool, bool]) -> None:
    forward = convolution(16, 16, groups)
    gradient, x, weight = meta(2, 16, 8, 8), meta(2, 16, 8, 8), meta(16, 16 // groups, 3, 3)
    rest = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [*asked, False])
    found = work(aten.convolution_backward.default, gradient, x, weight, *rest)
    assert found.operations == sum(asked) * forward.operations
    assert found.unit is forward.unit


def test_what_nobody_counts_does_an_operation_an_element() -> None:
    assert work(aten.sort.default, meta(8), elements=8) == Work(64, 8, Unit.SCALAR, 2)
    assert work("mine.operator", elements=5) == Work(64, 5, Unit.SCALAR, 2)
