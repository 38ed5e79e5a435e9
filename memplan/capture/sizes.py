"""torch's symbolic sizes as memplan's: ints where they are static, expressions over size symbols elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
from torch.utils._sympy import functions as torch_functions

from ..ir.index import FloorDiv, Mod
from ..ir.loops import Size


def convert(expr: sympy.Expr) -> sympy.Expr:
    """torch's sympy functions replaced by those of `memplan.ir.index`."""
    if expr.is_Atom:
        return expr
    args = [convert(a) for a in expr.args]
    if isinstance(expr, torch_functions.FloorDiv):
        return FloorDiv(args[0], args[1])
    if isinstance(expr, torch_functions.ModularIndexing):
        return Mod(FloorDiv(args[0], args[1]), args[2])
    if isinstance(expr, (torch_functions.Mod, torch_functions.PythonMod)):
        return Mod(args[0], args[1])
    if isinstance(expr, torch_functions.Max):
        return sympy.Max(*args)
    if isinstance(expr, torch_functions.Min):
        return sympy.Min(*args)
    return expr.func(*args)


def size_of(value: int | torch.SymInt) -> Size:
    """A size, stride or offset of a fake tensor."""
    if isinstance(value, int):
        return value
    expr = value.node.expr
    if expr.is_Integer:
        return int(expr)
    return convert(expr)


def solved(expr: sympy.Expr) -> tuple[sympy.Symbol, int, int] | None:
    """(symbol, factor, offset) of a size that is ``factor * symbol + offset``; None of others, which tell no symbol."""
    if len(expr.free_symbols) != 1:
        return None
    (symbol,) = expr.free_symbols
    factor = sympy.diff(expr, symbol) if expr.is_polynomial(symbol) else None
    if factor is None or not factor.is_Integer or factor <= 0:
        return None
    return symbol, int(factor), int(expr.xreplace({symbol: sympy.Integer(0)}))


def sizes_of(values: Iterable[int | torch.SymInt]) -> tuple[Size, ...]:
    return tuple(size_of(v) for v in values)


def extent(sizes: tuple[Size, ...], strides: tuple[Size, ...]) -> Size:
    """Elements from the first to the last of a strided view; 0 if it has none."""
    if any(s == 0 for s in sizes):
        return 0
    out: Size = 1
    for n, s in zip(sizes, strides, strict=True):
        out = out + (n - 1) * s
    return out if isinstance(out, int) else sympy.expand(out)
