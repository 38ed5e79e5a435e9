"""Kernels that go over rows and sum columns besides: how many rows share an element of the sums.

A kernel of one outer range ``x`` stores totals (`StoreMode.TOTAL`) at ``FloorDiv(x, n) * columns + column``: each ``n``
consecutive rows have a row of their own in a buffer of partial sums, so that nothing is added atomically and the order
of summation is the same in every run.
"""

from __future__ import annotations

import sympy

from .errors import LoweringError
from .index import FloorDiv
from .loops import Kernel, Level, Store, StoreMode, free_symbols, value_references

#: what stands for the number of a group of rows
GROUP = sympy.Symbol("xgroup", integer=True, nonnegative=True)


def rows_together(kernel: Kernel) -> int:
    """Rows whose totals are one; 0 for a kernel without totals.

    Raises
    ------
    LoweringError
        If an index of totals is not of that form, or two of them have other groups.
    """
    found = {_rows(kernel, s) for s in kernel.stores if s.mode is StoreMode.TOTAL}
    if len(found) > 1:
        raise LoweringError(f"totals of {' and of '.join(map(str, sorted(found)))} rows in one kernel")
    return found.pop() if found else 0


def by_group(store: Store, rows: int) -> sympy.Expr:
    """The index of a store of totals with `GROUP` for the number of its group."""
    divisions = {d: GROUP for d in store.index.atoms(FloorDiv) if d.args[1] == rows}
    return store.index.xreplace(divisions)


def _rows(kernel: Kernel, store: Store) -> int:
    if len(kernel.outer) == 1 and not value_references(store.index) and kernel.store_level(store) is Level.POINT:
        (x,) = kernel.outer
        divisions = [d for d in store.index.atoms(FloorDiv) if d.args[0] == x.symbol and d.args[1].is_Integer]
        if len(divisions) == 1:
            rows = int(divisions[0].args[1])
            if x.symbol not in free_symbols(by_group(store, rows)):
                return rows
    raise LoweringError(f"a store of totals at {store.index} is not one of groups of consecutive rows")
