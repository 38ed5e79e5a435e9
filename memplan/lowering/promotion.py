"""Type promotion of pointwise operations, as torch does it.

Tensors with dimensions decide; tensors without count only where they are of a higher category (bool < integral <
floating); Python numbers likewise count least.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import sympy
import torch

from ..ir.program import View
from .call_site import Operand


class Promotion(Enum):
    """How the type that is computed in follows from the operands' common type."""

    COMMON = "common"
    TO_FLOAT = "to_float"  # integers and booleans become the default floating type
    BOOL_TO_LONG = "bool_to_long"


def common_dtype(operands: Iterable[Operand]) -> torch.dtype:
    """`torch.result_type` of the operands."""
    dimensioned: torch.dtype | None = None
    zero_dim: torch.dtype | None = None
    number: torch.dtype | None = None
    for operand in operands:
        if isinstance(operand, View):
            if operand.sizes:
                dimensioned = _promoted(dimensioned, operand.dtype)
            else:
                zero_dim = _promoted(zero_dim, operand.dtype)
        else:
            number = _promoted(number, _number_dtype(operand))
    found = _combined(dimensioned, _combined(zero_dim, number))
    assert found is not None, "promotion of no operands"
    return found


def computation_dtype(operands: Iterable[Operand], promotion: Promotion) -> torch.dtype:
    """The common type after the rule of ``promotion``; half types stay half types here."""
    dtype = common_dtype(operands)
    if promotion is Promotion.TO_FLOAT and not (dtype.is_floating_point or dtype.is_complex):
        return torch.get_default_dtype()
    if promotion is Promotion.BOOL_TO_LONG and dtype is torch.bool:
        return torch.int64
    return dtype


def _number_dtype(number: bool | int | float | sympy.Expr) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, int):
        return torch.int64
    if isinstance(number, sympy.Expr) and number.is_integer:
        return torch.int64
    return torch.get_default_dtype()


def _promoted(one: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    return other if one is None else torch.promote_types(one, other)


def _combined(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return lower if higher is None else higher
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return torch.promote_types(higher, lower) if lower.is_complex else higher
    if higher is torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher
