"""Which point of a producer's space stores the element that a consumer loads: index expressions solved for symbols."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import sympy

from .index import Ranges, affine, affine_sum, divide_monomials, expand, floor_div, modulo, simplify
from .loops import Size

_ZERO = sympy.Integer(0)
_ONE = sympy.Integer(1)


def invert(
    store: sympy.Expr, space: Ranges, target: sympy.Expr, ranges: Ranges
) -> dict[sympy.Symbol, sympy.Expr] | None:
    """Solve ``store(space) = target(ranges)`` for the symbols of ``space``.

    ``store`` must be affine in the space's symbols with strides that nest (each stride at least the extent of the
    smaller ones), so that the solution is unique. ``target`` must only take values that the store writes: then the
    solution is exact.

    Returns
    -------
    The value of every symbol of ``space`` as an expression over ``ranges``, or None if the store is not invertible.
    """
    found = _strides(store, space)
    if found is None:
        return None
    strides, rest = found
    order = _nesting_order(strides)
    if order is None:
        return None
    flat = simplify(expand(target) if rest is _ZERO else expand(target - rest), ranges)
    out: dict[sympy.Symbol, sympy.Expr] = {s: _ZERO for s, n in space if n == 1}
    for k, (stride, symbol, size) in enumerate(order):
        coordinate = floor_div(flat, stride, ranges)
        if k:
            # dense nesting makes the modulus exact; the outermost coordinate needs none
            coordinate = modulo(coordinate, sympy.sympify(size), ranges)
        out[symbol] = simplify(coordinate, ranges)
    return out


Strides: TypeAlias = list[tuple[sympy.Expr, sympy.Symbol, Size]]


def _strides(store: sympy.Expr, space: Ranges) -> tuple[Strides, sympy.Expr] | None:
    """The strides of an index along a space, and what of it is the same at all points; None if it is not affine."""
    form, symbols = affine(store), {s for s, _ in space}
    if form is not None:
        factors = dict(form[1])
        if any(n != 1 and s not in factors for s, n in space):
            return None
        rest = affine_sum(form[0], tuple([t for t in form[1] if t[0] not in symbols]))
        return [(sympy.Integer(factors[s]), s, n) for s, n in space if n != 1], rest
    strides: Strides = []
    rest = store
    for symbol, size in space:
        if size == 1:
            rest = rest.xreplace({symbol: _ZERO})
            continue
        stride = store.coeff(symbol, 1)
        if stride == 0 or stride.free_symbols & symbols:
            return None
        strides.append((stride, symbol, size))
        rest = expand(rest - stride * symbol)
    return None if rest.free_symbols & symbols else (strides, rest)


@lru_cache(maxsize=65536)
def _is_multiple(large: sympy.Expr, small: sympy.Expr) -> bool:
    """Whether ``large`` is surely ``small`` times a positive integer."""
    ratio = large / small
    if not (ratio.is_Rational or divide_monomials(large, small) is not None):
        ratio = sympy.cancel(ratio)
    return bool(ratio.is_integer and ratio.is_positive)


def _nesting_order(strides: Strides) -> Strides | None:
    """Strides from the largest to the smallest, if each one divides the next and holds its extent; else None.

    The modulus by a dimension's size is exact only where the next larger stride is a multiple of this dimension's
    whole extent, so gaps (padded rows) are accepted only at multiples of the extent.
    """
    remaining = list(strides)
    ascending: Strides = []
    extent: sympy.Expr = _ONE
    while remaining:
        found = None
        for item in remaining:
            if item[0] == extent:
                found = item
                break
        if found is None:
            divisible = [i for i in remaining if _is_multiple(i[0], extent)]
            if not divisible or any(not i[0].is_Integer for i in divisible):
                return None
            found = min(divisible, key=lambda i: int(i[0]))
        ascending.append(found)
        remaining.remove(found)
        extent = expand(found[0] * found[2])
    return list(reversed(ascending))
