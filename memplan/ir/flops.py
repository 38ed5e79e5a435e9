"""Floating point operations of an ATen call, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.utils.flop_counter import flop_registry


def has_formula(target: object) -> bool:
    """Whether torch counts the operations of this overload."""
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in flop_registry


def flops(target: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object], result: object) -> int:
    """Operations of a call of an overload that `has_formula`.

    Parameters
    ----------
    args, kwargs:
        As the operator is called: tensors (meta tensors will do) and numbers, no symbols; nothing given for ``out=``.
    result:
        What the call returns.

    The formulas count by shapes. Not all of them take the dtype of a product's result (``aten.mm.dtype`` and its like,
    torch 2.11), so none of them is given it.
    """
    formula = flop_registry[target.overloadpacket]
    names = [a.name for a in target._schema.arguments]
    given = [a for name, a in zip(names, args, strict=False) if name != "out_dtype"]
    named = {name: a for name, a in kwargs.items() if name != "out_dtype"}
    return int(formula(*given, **named, out_val=result))
