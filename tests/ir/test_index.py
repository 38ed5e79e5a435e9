"""Affine indices as integers: the same answers as sympy's, and right at every point."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.index import (
    FloorDiv,
    Mod,
    affine,
    affine_sum,
    bounds,
    flat_index,
    floor_div,
    is_nonnegative,
    modulo,
    simplify,
    stride_of,
)
from memplan.ir.index_inversion import invert
from memplan.ir.loops import outer_symbol, value_symbol
from memplan.ir.verify_kernel import evaluate_index

X = tuple(outer_symbol(k) for k in range(3))
N = sympy.Symbol("n", integer=True, positive=True)
sizes = st.tuples(*[st.integers(1, 5)] * 3)
factors = st.tuples(*[st.integers(-9, 24)] * 3)
few = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def points(extent: tuple[int, int, int]) -> list[dict[sympy.Symbol, int]]:
    return [dict(zip(X, p, strict=True)) for p in itertools.product(*[range(n) for n in extent])]


@given(factors, st.integers(-20, 20))
@few
def test_the_form_and_its_expression(coefficients: tuple[int, int, int], constant: int) -> None:
    expr = sympy.Integer(constant) + sum(c * s for c, s in zip(coefficients, X, strict=True))
    form = affine(expr)
    assert form is not None
    assert (form[0], dict(form[1])) == (constant, {s: c for s, c in zip(X, coefficients, strict=True) if c})
    assert affine_sum(*form) == expr
    for s in X:
        assert stride_of(expr, s) == expr.coeff(s, 1)
    assert flat_index(X, coefficients, constant) == sympy.expand(expr)


@pytest.mark.parametrize("expr", [X[0] * X[1], FloorDiv(X[0], 2), X[0] / 2, X[0] ** 2 + 1, N * X[0], sympy.Float(2.0)])
def test_what_has_no_form(expr: sympy.Expr) -> None:
    assert affine(expr) is None
    assert stride_of(expr, X[0]) == expr.coeff(X[0], 1)


@given(factors, st.integers(-20, 20), sizes)
@few
def test_bounds_are_reached(coefficients: tuple[int, int, int], constant: int, extent: tuple[int, int, int]) -> None:
    expr = flat_index(X, coefficients, constant)
    values = [evaluate_index(expr, p) for p in points(extent)]
    found = bounds(expr, tuple(zip(X, extent, strict=True)))
    assert found == (min(values), max(values))


@given(factors, st.integers(-20, 40), sizes, st.integers(1, 12))
@few
def test_divisions_are_right_at_every_point(
    coefficients: tuple[int, int, int], constant: int, extent: tuple[int, int, int], divisor: int
) -> None:
    ranges = tuple(zip(X, extent, strict=True))
    expr = flat_index(X, coefficients, constant)
    simple = simplify(expr, ranges)
    quotient, rest = floor_div(simple, sympy.Integer(divisor), ranges), modulo(simple, sympy.Integer(divisor), ranges)
    same = simplify(FloorDiv(expr, divisor), ranges), simplify(Mod(expr, divisor), ranges)
    for p in points(extent):
        value = evaluate_index(expr, p)
        assert evaluate_index(simple, p) == value
        assert (evaluate_index(quotient, p), evaluate_index(rest, p)) == divmod(value, divisor)
        assert tuple(evaluate_index(e, p) for e in same) == divmod(value, divisor)


@given(factors, st.integers(0, 20), sizes)
@few
def test_an_inverse_finds_every_point(
    coefficients: tuple[int, int, int], constant: int, extent: tuple[int, int, int]
) -> None:
    ranges = tuple(zip(X, extent, strict=True))
    store = flat_index(X, coefficients, constant)
    target = sympy.Symbol("t", integer=True, nonnegative=True)
    found = invert(store, ranges, target, ())
    if found is None:
        return
    for p in points(extent):
        at = {target: evaluate_index(store, p)}
        assert {s: evaluate_index(e, at) for s, e in found.items()} == p


def test_an_inverse_of_nested_strides_is_found() -> None:
    ranges = tuple(zip(X, (3, 4, 1), strict=True))
    assert invert(9 * X[0] + 2 * X[1] + 7, ranges, sympy.Symbol("t", integer=True), ()) is None  # 9 is no multiple of 8
    found = invert(4 * X[0] + X[1] + 7, ranges, 4 * X[2] + X[1] + 7, tuple(zip(X, (9, 4, 3), strict=True)))
    assert found == {X[0]: X[2], X[1]: X[1], X[2]: 0}


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (X[0] + 3, True),
        (X[0] - 1, False),
        (3 - X[0], False),
        (N - 1, True),
        (2 * N - 1, True),
        (N - 2, False),
        (N - X[0], False),
        (N * X[0] - X[0], True),
        (value_symbol(3) + 5, False),
        (Mod(X[0], 4), True),
        (Mod(X[0], 4) - 1, False),
    ],
)
def test_nonnegative(expr: sympy.Expr, expected: bool) -> None:
    assert is_nonnegative(expr) is expected
