"""Scatters that need no atomics: whether the points of one range ever write to the same element.

The gradient of an embedding adds ``grad[n, c]`` to ``weight[index[n], c]``. Whatever the indices are, two values of
``c`` never meet in one element, so threads that each own a part of the columns and walk over all rows need no atomics,
add in program order (the same bits on any number of threads), and their inner loops are vectorised.
"""

from __future__ import annotations

import math

import sympy

from memplan.ir.index import expand
from memplan.ir.loops import Kernel, Range, StoreMode, value_references

from .cpp_loops import dependencies, stride


def owns_its_elements(kernel: Kernel, owner: Range) -> bool:
    """Whether no two points with different values of ``owner`` write to one element, in any store of the kernel."""
    if not isinstance(owner.size, int) or kernel.row:
        return False
    depends = dependencies(kernel)
    for store in kernel.stores:
        if any(owner.symbol in depends[k] for k in value_references(store.index)):
            return False
        if not _apart(store.index, owner.symbol, owner.size):
            return False
    return True


def updates(kernel: Kernel) -> bool:
    """Whether the kernel adds to, or takes extremes with, what is there."""
    return any(s.mode is not StoreMode.SET for s in kernel.stores)


def _apart(index: sympy.Expr, symbol: sympy.Symbol, size: int) -> bool:
    """Whether ``index = step * symbol + rest`` where all of ``rest`` that varies is a multiple of ``step * size`` or
    more: its remainder then tells the values of the symbol apart."""
    step = stride(index, symbol)
    if step is None or not step.is_Integer or step <= 0:
        return False
    rest = expand(index - step * symbol)
    common = 0
    for term in sympy.Add.make_args(rest):
        coefficient, varying = term.as_coeff_Mul()
        if not coefficient.is_Integer:
            return False
        if not varying.is_Number:
            common = math.gcd(common, int(coefficient))
    return not common or (common % int(step) == 0 and common // int(step) >= size)
