"""Pointwise operations: broadcast, promotion of types, one kernel over the result's dimensions.

A formula takes values in the type that is computed in (float32 for half types) and gives the result's value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import sympy
import torch
from torch.utils._sympy.functions import FloatTrueDiv, IntTrueDiv, ToFloat

from ..ir.program import View
from .builder import KernelBuilder, Value, opmath
from .call_site import SUPPORTED, CallSite, Operand, Operations, lowers, resolve
from .promotion import Promotion, computation_dtype

SiteFormula = Callable[..., Value]


def element(builder: KernelBuilder, operand: Operand, dtype: torch.dtype) -> Value:
    """The operand's element at the current point, rounded to ``dtype``, in the type that ``dtype`` computes in."""
    if isinstance(operand, View):
        value = builder.load_broadcast(operand, builder.outer_coordinates)
        if value.dtype.is_floating_point or not dtype.is_floating_point:
            return builder.compute(value.cast(dtype))
        return value.cast(opmath(dtype))
    if isinstance(operand, sympy.Expr):
        value = builder.index(operand) if operand.is_integer else real(builder, operand)
        return value.cast(opmath(dtype))
    return builder.constant(operand, opmath(dtype))


def real(builder: KernelBuilder, expr: sympy.Expr) -> Value:
    """A number computed from sizes (``1 / n``), in float64 as Python computes it.

    Raises
    ------
    TypeError
        Where the expression has a function that is none of arithmetic.
    """
    if expr.is_integer:
        return builder.index(expr).cast(torch.float64)
    if expr.is_number:
        return builder.constant(float(expr), torch.float64)
    parts = [real(builder, a) for a in expr.args]
    if expr.is_Add:
        return reduce(lambda a, b: a.call("add", b), parts)
    if expr.is_Mul:
        return reduce(lambda a, b: a.call("mul", b), parts)
    if isinstance(expr, (FloatTrueDiv, IntTrueDiv)):
        return parts[0].call("div", parts[1])
    if isinstance(expr, ToFloat):
        return parts[0]
    raise TypeError(f"{expr} is no arithmetic on sizes")


def is_empty(view: View) -> bool:
    """Whether the view has no elements, whatever the symbols are."""
    return any(size == 0 for size in view.sizes)


def pointwise_kernel(
    site: CallSite, result: View, body: Callable[[KernelBuilder], Value], suffix: str = ""
) -> Operations:
    """One kernel over ``result``'s dimensions that stores ``body``'s value."""
    if is_empty(result):
        return ()
    builder = KernelBuilder(result.sizes)
    builder.store(result, builder.outer_coordinates, body(builder))
    return (site.kernel(builder, suffix),)


def promoted_kernel(
    site: CallSite,
    result: View,
    operands: Sequence[Operand],
    promotion: Promotion,
    formula: Callable[..., Value],
    suffix: str = "",
) -> Operations | None:
    """A formula of operands that promote to a common type; None where a kernel cannot compute in that type."""
    dtype = computation_dtype(operands, promotion)
    if dtype not in SUPPORTED:
        return None

    def body(builder: KernelBuilder) -> Value:
        return formula(*(element(builder, o, dtype) for o in operands))

    return pointwise_kernel(site, result, body, suffix)


def pointwise(
    operator: str,
    names: str = "self",
    promotion: Promotion = Promotion.COMMON,
    *,
    overloads: str = "default",
    foreach: bool = False,
) -> Callable[[SiteFormula], SiteFormula]:
    """Register ``formula(site, *values)`` for an operator whose parameters ``names`` promote together.

    Overloads that the installed torch does not have are left out.
    """

    def register(formula: SiteFormula) -> SiteFormula:
        def lowering(site: CallSite) -> Operations | None:
            operands = [site.operand(name) for name in names.split()]
            return promoted_kernel(site, site.result, operands, promotion, lambda *v: formula(site, *v))

        for overload in overloads.split():
            target = f"{operator}.{overload}"
            if resolve(target) is not None:
                lowers(target)(lowering)
        return formula

    return register


def simple(
    names: str,
    op: str | None = None,
    promotion: Promotion = Promotion.COMMON,
    *,
    arity: int = 1,
    overloads: str = "default",
) -> None:
    """Register operators that are one function of `memplan.ir.loops.OPERATIONS`."""
    parameters = "self other" if arity == 2 else "self"
    for name in names.split():
        function = op or name.rpartition(".")[2].removeprefix("special_")

        def formula(site: CallSite, *values: Value, function: str = function) -> Value:
            return values[0].call(function, *values[1:])

        pointwise(name if "." in name else f"aten.{name}", parameters, promotion, overloads=overloads)(formula)
