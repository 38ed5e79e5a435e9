"""Index arithmetic: floor division, modulo, and simplification under known ranges.

Flat element offsets are the common tongue of all kernels: a producer's store at offset ``e`` meets a consumer's load
at offset ``f`` by solving ``e(x) = f(y)`` for ``x`` (`invert`), which gives floor divisions and moduli that
`simplify` removes wherever the ranges prove it (``(8*y0 + y1) // 8 -> y0`` for ``y1 < 8``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias

import sympy

from .loops import Range, Size, free_symbols

Ranges: TypeAlias = tuple[tuple[sympy.Symbol, Size], ...]
_ZERO = sympy.Integer(0)
_ONE = sympy.Integer(1)


class FloorDiv(sympy.Expr):  # type: ignore[misc]
    """``a // b`` of integers, rounding down. Evaluates literals only: `simplify` does the rest, with the ranges.

    A plain `sympy.Expr`: building a `sympy.Function` costs a millisecond, which a compiler cannot afford.
    """

    is_integer = True
    is_commutative = True

    def __new__(cls, base: sympy.Expr | int, divisor: sympy.Expr | int) -> sympy.Expr:
        base, divisor = sympy.sympify(base), sympy.sympify(divisor)
        if divisor.is_Integer:
            if divisor == 0:
                raise ZeroDivisionError(f"{base} // 0")
            if divisor == 1:
                return base
            if base.is_Integer:
                return sympy.Integer(int(base) // int(divisor))
        if base.is_Integer and base == 0:
            return _ZERO
        return sympy.Expr.__new__(cls, base, divisor)

    def _eval_is_nonnegative(self) -> bool | None:
        base, divisor = self.args
        return True if base.is_nonnegative and divisor.is_positive else None

    def _sympystr(self, printer: object) -> str:
        return f"FloorDiv({self.args[0]}, {self.args[1]})"


class Mod(sympy.Expr):  # type: ignore[misc]
    """``a % b`` of integers, with the sign of ``b``, as in Python."""

    is_integer = True
    is_commutative = True

    def __new__(cls, base: sympy.Expr | int, divisor: sympy.Expr | int) -> sympy.Expr:
        base, divisor = sympy.sympify(base), sympy.sympify(divisor)
        if divisor.is_Integer:
            if divisor == 0:
                raise ZeroDivisionError(f"{base} % 0")
            if divisor == 1:
                return _ZERO
            if base.is_Integer:
                return sympy.Integer(int(base) % int(divisor))
        if base.is_Integer and base == 0:
            return _ZERO
        return sympy.Expr.__new__(cls, base, divisor)

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[1].is_positive else None

    def _sympystr(self, printer: object) -> str:
        return f"Mod({self.args[0]}, {self.args[1]})"


Affine: TypeAlias = tuple[int, tuple[tuple[sympy.Symbol, int], ...]]


@lru_cache(maxsize=65536)
def affine(expr: sympy.Expr) -> Affine | None:
    """(constant, (symbol, coefficient) of every other term) with integer literals; None of anything else.

    Most indices are of this form, and what is asked of them is then arithmetic on integers, not on expressions.
    """
    constant, terms = 0, []
    for term in sympy.Add.make_args(expr):
        if term.is_Symbol:
            terms.append((term, 1))
        elif term.is_Integer:
            constant = int(term)
        elif term.is_Mul and len(term.args) == 2 and term.args[0].is_Integer and term.args[1].is_Symbol:
            terms.append((term.args[1], int(term.args[0])))
        else:
            return None
    return constant, tuple(terms)


@lru_cache(maxsize=65536)
def affine_sum(constant: int, terms: tuple[tuple[sympy.Symbol, int], ...]) -> sympy.Expr:
    """The expression of an affine form (see `affine`)."""
    return sympy.Add(constant, *(s if c == 1 else s * c for s, c in terms))


@lru_cache(maxsize=65536)
def stride_of(expr: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """The coefficient of the symbol itself: ``expr.coeff(symbol, 1)``."""
    found = affine(expr)
    if found is None:
        return expr.coeff(symbol, 1)
    return sympy.Integer(next((c for s, c in found[1] if s == symbol), 0))


@lru_cache(maxsize=65536)
def expand(expr: sympy.Expr) -> sympy.Expr:
    """Products multiplied out; what is a sum of plain terms already is returned as it is (the common case)."""
    for term in sympy.Add.make_args(expr):
        if term.is_Mul:
            if any(f.is_Add for f in term.args):
                return sympy.expand_mul(expr)
        elif term.is_Pow and term.args[0].is_Add:
            return sympy.expand(expr)
    return expr


def ranges_of(ranges: Iterable[Range]) -> Ranges:
    """Hashable (symbol, size) pairs for `simplify` and `bounds`."""
    return tuple((r.symbol, r.size) for r in ranges)


def is_nonnegative(expr: sympy.Expr) -> bool:
    """Whether the expression is provably at least zero; size symbols are positive integers."""
    if expr.is_Integer:
        return int(expr) >= 0
    return _is_nonnegative(expr)


@lru_cache(maxsize=65536)
def _is_nonnegative(expr: sympy.Expr) -> bool:
    """`is_nonnegative`: a polynomial in what is at least one is written in what is more than that, and has to have no
    negative coefficient; anything else is asked of sympy."""
    expanded = expr if expr.is_Atom else expand(expr)
    if _has_no_negative_term(expanded):
        return True
    form = affine(expanded)
    if form is not None and all(s.is_nonnegative for s, _ in form[1]):
        return False  # negative where everything is as small as can be, or a symbol with a negative factor is large
    return bool(expr.is_nonnegative or expanded.is_nonnegative)


def _has_no_negative_term(expr: sympy.Expr) -> bool:
    total: dict[tuple[sympy.Symbol, ...], int] = {}
    for term in sympy.Add.make_args(expr):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer:
            return False
        powers: dict[tuple[sympy.Symbol, ...], int] = {(): int(coefficient)}
        for factor in sympy.Mul.make_args(rest):
            base, exponent = factor.as_base_exp()
            if factor is not _ONE and not (base.is_Symbol and base.is_nonnegative and exponent.is_Integer):
                return False
            for _ in range(int(exponent) if factor is not _ONE else 0):
                powers = _times(powers, base)
        for key, value in powers.items():
            total[key] = total.get(key, 0) + value
    return all(c >= 0 for c in total.values())


def _times(powers: dict[tuple[sympy.Symbol, ...], int], symbol: sympy.Symbol) -> dict[tuple[sympy.Symbol, ...], int]:
    """The polynomial times the symbol, a positive one written as one and the rest."""
    out = dict(powers) if symbol.is_positive else {}
    for key, value in powers.items():
        longer = tuple(sorted((*key, symbol), key=str))
        out[longer] = out.get(longer, 0) + value
    return out


@lru_cache(maxsize=65536)
def bounds(expr: sympy.Expr, ranges: Ranges) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Inclusive (least, greatest) value over the ranges, or None where it is not known."""
    if expr.is_Integer:
        return expr, expr
    sizes = dict(ranges)
    form = affine(expr)
    if form is not None and all(isinstance(sizes.get(s), int) for s, _ in form[1]):
        last = [(c, c * (int(sizes[s]) - 1)) for s, c in form[1]]
        low, high = (form[0] + sum(end for c, end in last if (c > 0) is up) for up in (False, True))
        return sympy.Integer(low), sympy.Integer(high)
    return _bounds(expr, sizes, ranges)


def _bounds(
    expr: sympy.Expr, sizes: Mapping[sympy.Symbol, Size], ranges: Ranges
) -> tuple[sympy.Expr, sympy.Expr] | None:
    if expr.is_Symbol:
        if expr in sizes:
            return _ZERO, sympy.sympify(sizes[expr]) - 1
        return (expr, expr) if expr.is_nonnegative else None
    if expr.is_Add:
        low, high = _ZERO, _ZERO
        for term in expr.args:
            found = bounds(term, ranges)
            if found is None:
                return None
            low, high = low + found[0], high + found[1]
        return low, high
    if expr.is_Mul:
        sign = 1
        low, high = _ONE, _ONE
        for factor in expr.args:
            if factor.is_Integer and factor < 0:
                sign, factor = -sign, -factor
            found = bounds(factor, ranges)
            if found is None or not is_nonnegative(found[0]):
                return None
            low, high = low * found[0], high * found[1]
        return (low, high) if sign > 0 else (-high, -low)
    if expr.is_Pow:
        found = bounds(expr.args[0], ranges)
        if found is None or not is_nonnegative(found[0]) or not expr.args[1].is_Integer or expr.args[1] < 0:
            return None
        return found[0] ** expr.args[1], found[1] ** expr.args[1]
    if isinstance(expr, FloorDiv):
        base, divisor = expr.args
        found = bounds(base, ranges)
        if found is None or not divisor.is_positive:
            return None
        return FloorDiv(found[0], divisor), FloorDiv(found[1], divisor)
    if isinstance(expr, Mod):
        return (_ZERO, expr.args[1] - 1) if expr.args[1].is_positive else None
    return None


@lru_cache(maxsize=65536)
def simplify(expr: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """An equal expression over the given ranges, with divisions and moduli removed where that is proved."""
    if expr.is_Atom:
        sizes = dict(ranges)
        return _ZERO if expr in sizes and sizes[expr] == 1 else expr
    form = affine(expr)
    if form is not None:
        single = {s for s, n in ranges if n == 1}
        left = tuple([t for t in form[1] if t[0] not in single])
        return expr if len(left) == len(form[1]) else affine_sum(form[0], left)
    if not expr.has(FloorDiv, Mod):
        ones = {s: _ZERO for s, n in ranges if n == 1}
        return expand(expr.xreplace(ones) if ones else expr)
    args = [simplify(a, ranges) for a in expr.args]
    if isinstance(expr, FloorDiv):
        return floor_div(args[0], args[1], ranges)
    if isinstance(expr, Mod):
        return modulo(args[0], args[1], ranges)
    out = expr.func(*args)
    if out.is_Add or out.is_Mul:
        out = _recombine(expand(out))
    return out


def _split(base: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(quotient, rest) with ``base = quotient * divisor + rest``, the quotient from terms that divide exactly."""
    form = affine(base)
    if form is not None and divisor.is_Integer:
        d = int(divisor)
        constant = form[0] // d if form[0] % d == 0 else 0
        return (
            affine_sum(constant, tuple([(s, c // d) for s, c in form[1] if c % d == 0])),
            affine_sum(0 if form[0] % d == 0 else form[0], tuple([t for t in form[1] if t[1] % d])),
        )
    quotient, rest = _ZERO, _ZERO
    for term in sympy.Add.make_args(expand(base)):
        exact = _divide_term(term, divisor)
        if exact is None:
            rest += term
        else:
            quotient += exact
    return quotient, rest


def _divide_term(term: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    if divisor.is_Integer:
        coefficient, factor = term.as_coeff_Mul()
        if coefficient.is_Integer:
            d = int(divisor)
            c = int(coefficient)
            if c % d == 0:
                return sympy.Integer(c // d) * factor
        return None
    return None if divisor.is_Add else divide_monomials(term, divisor)


@lru_cache(maxsize=65536)
def divide_monomials(term: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """The quotient of two products of powers, if it is such a product with an integer coefficient; else None."""
    quotient = term / divisor
    coefficient, factor = quotient.as_coeff_Mul()
    if not coefficient.is_Integer:
        return None
    for part in sympy.Mul.make_args(factor):
        if part.is_Pow and not (part.exp.is_Integer and part.exp.is_positive):
            return None
    return quotient


def floor_div(base: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """``base // divisor`` simplified; both are simplified already."""
    if divisor == 1:
        return base
    quotient, rest = _split(base, divisor)
    found = bounds(rest, ranges)
    if found is not None and is_nonnegative(found[0]):
        if is_nonnegative(divisor - 1 - found[1]):
            return quotient
        reduced = _reduce_common(rest, divisor, ranges)
        if reduced is not None:
            return quotient + reduced
        if isinstance(rest, FloorDiv):
            return quotient + floor_div(rest.args[0], expand(rest.args[1] * divisor), ranges)
        if isinstance(rest, Mod) and (periods := _divide_term(rest.args[1], divisor)) is not None:
            # (e % (d*m)) // d = (e // d) % m: one form, which `_recombine` knows
            return quotient + modulo(floor_div(rest.args[0], divisor, ranges), periods, ranges)
        return quotient + FloorDiv(rest, divisor)
    if quotient != 0 and divisor.is_positive:
        return quotient + FloorDiv(rest, divisor)
    return FloorDiv(base, divisor)


def _reduce_common(rest: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    """``(g*a + b) // (g*d) -> a // d`` where ``0 <= b < g``, for an integer ``g > 1`` dividing the divisor."""
    if not divisor.is_Integer:
        return None
    terms = sympy.Add.make_args(rest)
    coefficients = sorted({abs(int(t.as_coeff_Mul()[0])) for t in terms if t.as_coeff_Mul()[0].is_Integer})
    for g in reversed(coefficients):
        g = int(sympy.igcd(g, int(divisor)))
        if g <= 1:
            continue
        upper, lower = _split(rest, sympy.Integer(g))
        found = bounds(lower, ranges)
        if found is not None and is_nonnegative(found[0]) and is_nonnegative(g - 1 - found[1]):
            smaller = sympy.Integer(int(divisor) // g)
            return floor_div(upper, smaller, ranges)
    return None


def modulo(base: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """``base % divisor`` (sign of the divisor) simplified; both are simplified already."""
    if divisor == 1:
        return _ZERO
    _, rest = _split(base, divisor)
    found = bounds(rest, ranges)
    if found is not None and is_nonnegative(found[0]) and is_nonnegative(divisor - 1 - found[1]):
        return rest
    if isinstance(rest, Mod) and _divide_term(rest.args[1], divisor) is not None:
        return modulo(rest.args[0], divisor, ranges)
    if divisor.is_Integer and found is not None and is_nonnegative(found[0]):
        # (g*a + b) % (g*d) = g*(a % d) + b for 0 <= b < g
        for g in sorted({abs(int(t.as_coeff_Mul()[0])) for t in sympy.Add.make_args(rest)}, reverse=True):
            if g <= 1 or int(divisor) % g:
                continue
            upper, lower = _split(rest, sympy.Integer(g))
            low = bounds(lower, ranges)
            if low is not None and is_nonnegative(low[0]) and is_nonnegative(g - 1 - low[1]):
                return expand(g * modulo(upper, sympy.Integer(int(divisor) // g), ranges) + lower)
    return Mod(rest, divisor)


def _recombine(expr: sympy.Expr) -> sympy.Expr:
    """``d*(e // d) + e % d -> e`` (with a common factor), and ``d*((e // d) % m) + e % d -> e % (d*m)``."""
    if not expr.is_Add:
        return expr
    terms = list(expr.args)
    for i, term in enumerate(terms):
        c, factor = term.as_coeff_Mul()
        symbols = 1
        if factor.is_Mul:
            mods = [f for f in factor.args if isinstance(f, Mod)]
            if len(mods) != 1:
                continue
            symbols = factor / mods[0]
            factor = mods[0]
        if not isinstance(factor, Mod):
            continue
        e, d = factor.args
        inner = FloorDiv(e, d)
        target = expand(c * symbols * d * inner)
        for j, other in enumerate(terms):
            if j == i:
                continue
            if expand(other) == target:
                rest = [t for k, t in enumerate(terms) if k not in (i, j)]
                return _recombine(expand(sympy.Add(*rest, c * symbols * e)))
            oc, of = other.as_coeff_Mul()
            if isinstance(of, Mod) and of.args[0] == inner and symbols == 1 and oc == c * d:
                rest = [t for k, t in enumerate(terms) if k not in (i, j)]
                return _recombine(expand(sympy.Add(*rest, c * Mod(e, expand(d * of.args[1])))))
    return expr


def flat_index(indices: Iterable[sympy.Expr], strides: Iterable[Size], offset: Size = 0) -> sympy.Expr:
    """Element offset of the point ``indices`` of a strided view."""
    terms = [i if s == 1 else i * s for i, s in zip(indices, strides, strict=True)]
    return expand(sympy.Add(*terms, offset))


def delinearize(flat: sympy.Expr, sizes: tuple[Size, ...], ranges: Ranges) -> tuple[sympy.Expr, ...]:
    """Coordinates of row-major position ``flat`` in a space of ``sizes``."""
    out: list[sympy.Expr] = []
    stride: Size = 1
    for k in range(len(sizes) - 1, -1, -1):
        size = sizes[k]
        if size == 1:
            out.append(_ZERO)
            continue
        coordinate = floor_div(flat, sympy.sympify(stride), ranges)
        outermost = all(s == 1 for s in sizes[:k])
        out.append(coordinate if outermost else modulo(coordinate, sympy.sympify(size), ranges))
        stride = stride * size
    return tuple(reversed(out))


def evaluate(size: Size, hints: Mapping[sympy.Symbol, int]) -> int:
    """The integer value of a size at the hinted sizes.

    Raises
    ------
    KeyError
        If a symbol has no hint.
    """
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Integer):
        return int(size)
    symbols = free_symbols(size)
    missing = [s for s in symbols if s not in hints]
    if missing:
        raise KeyError(f"no hint for size symbol {missing[0]} in {size}")
    return _evaluated(size, tuple([(s, hints[s]) for s in symbols]))


@lru_cache(maxsize=1 << 16)
def _evaluated(size: sympy.Expr, values: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    return int(size.xreplace({s: sympy.Integer(n) for s, n in values}))
