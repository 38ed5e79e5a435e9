"""Operations of a call by torch's formulas, whatever they take."""

from __future__ import annotations

import pytest
import torch
from torch.utils import flop_counter

from memplan.ir.flops import flops, has_formula

aten = torch.ops.aten


def strict(a_shape: torch.Size, b_shape: torch.Size, out_shape: torch.Size | None = None) -> int:
    """A formula for products that takes no dtype, as torch 2.11 has them."""
    return 2 * a_shape.numel() * b_shape[1]


def test_the_dtype_of_a_product_is_not_given_to_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flop_counter.flop_registry, aten.mm, flop_counter.shape_wrapper(strict))
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 16, device="meta")
    out = torch.empty(4, 16, device="meta")
    assert flops(aten.mm.dtype, (a, b, torch.float32), {}, out) == 2 * 4 * 8 * 16
    assert flops(aten.mm.dtype, (a, b), {"out_dtype": torch.float32}, out) == 2 * 4 * 8 * 16


def test_what_torch_does_not_count_has_no_formula() -> None:
    assert has_formula(aten.addmm.default)
    assert not has_formula(aten.sort.default)
    assert not has_formula("mm")
