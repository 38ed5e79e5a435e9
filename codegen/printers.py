"""Size and index expressions as text: `pexpr` for Python, `cexpr` for C++.

Both are plain functions over sympy expressions whose value is an integer, a float or a truth value. The text evaluates
to exactly what the expression means over the integers: `FloorDiv` rounds down and `Mod` takes the divisor's sign,
in C++ as in Python; a rational coefficient (``s0*3/2`` where that is known to be whole) is an exact division. C++ text
computes in ``int64_t``: a literal outside of 64 bits, and a power that cannot be a whole number, raise.

Text is fully parenthesised wherever precedence could matter, so it can be put into any context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
from torch.utils._sympy.numbers import int_oo

from memplan.ir.errors import UnsupportedError
from memplan.ir.index import is_nonnegative

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
Names = Mapping[sympy.Symbol, str]
_Print = Callable[[sympy.Basic], str]


def pexpr(expr: sympy.Basic | int, names: Names | None = None) -> str:
    """Python text of an expression; ``names`` gives symbols another spelling than their own name.

    Raises
    ------
    UnsupportedError
        For a function that has no spelling, or a value that cannot be written exactly.
    """
    return _print(sympy.sympify(expr), _PYTHON, names or {})


def cexpr(expr: sympy.Basic | int, names: Names | None = None) -> str:
    """C++ text of an expression (namespace mp of ``cpp_prelude.h`` in scope); integers are ``int64_t``.

    Raises
    ------
    UnsupportedError
        As `pexpr`, and for integer literals that do not fit 64 bits.
    """
    return _print(sympy.sympify(expr), _CPP, names or {})


@dataclass(frozen=True, slots=True)
class _Language:
    """What differs between the two: spellings as functions of already printed (and parenthesised) operands."""

    integer: Callable[[int], str]
    number: Callable[[float], str]
    true: str
    false: str
    conjunction: str
    disjunction: str
    negation: str
    power: Callable[[sympy.Basic, int, _Print], str]
    functions: Mapping[str, Callable[..., str]]
    floor_div: Callable[[sympy.Basic, sympy.Basic, _Print], str]
    modulo: Callable[[sympy.Basic, sympy.Basic, _Print], str]


def _print(expr: sympy.Basic, lang: _Language, names: Names) -> str:
    def recur(e: sympy.Basic) -> str:
        return _print(e, lang, names)

    if isinstance(expr, sympy.Symbol):
        return names.get(expr, expr.name)
    if isinstance(expr, sympy.Integer):
        return lang.integer(int(expr))
    if isinstance(expr, (sympy.Float, sympy.Rational)) or expr in _SPECIAL_FLOATS:
        return lang.number(_exact_float(expr))
    if expr in _TRUTHS:
        return lang.true if expr in _TRUE else lang.false
    if expr.is_Add:
        return f"({_sum(expr, recur)})"
    if expr.is_Mul:
        return _product(expr, lang, recur)
    if expr.is_Pow:
        return _pow(expr, lang, recur)
    if isinstance(expr, sympy.core.relational.Relational):
        return f"({recur(expr.lhs)} {expr.rel_op} {recur(expr.rhs)})"
    if isinstance(expr, sympy.And):
        return "(" + f" {lang.conjunction} ".join(recur(a) for a in _sorted(expr)) + ")"
    if isinstance(expr, sympy.Or):
        return "(" + f" {lang.disjunction} ".join(recur(a) for a in _sorted(expr)) + ")"
    if isinstance(expr, sympy.Not):
        return f"({lang.negation}{recur(expr.args[0])})"
    return _function(expr, lang, recur)


_SPECIAL_FLOATS = (sympy.oo, -sympy.oo, sympy.nan)
_TRUE = (sympy.true,)
_TRUTHS = (sympy.true, sympy.false)


def _exact_float(expr: sympy.Basic) -> float:
    value = float(expr)
    if isinstance(expr, sympy.Rational) and sympy.Rational(value) != expr:
        raise UnsupportedError(f"{expr} is neither an integer nor exactly a float")
    return value


def _sorted(expr: sympy.Basic) -> list[sympy.Basic]:
    return sorted(expr.args, key=sympy.default_sort_key)


def _sum(expr: sympy.Expr, recur: _Print) -> str:
    text = ""
    for term in sorted(expr.args, key=_term_order):
        coefficient, _ = term.as_coeff_Mul()
        negative = text and coefficient.is_negative and coefficient != INT64_MIN
        piece = recur(-term if negative else term)
        text += (" - " if negative else " + ") + piece if text else piece
    return text


def _term_order(term: sympy.Expr) -> tuple[bool, object]:
    return bool(term.is_number), sympy.default_sort_key(term)


def _product(expr: sympy.Expr, lang: _Language, recur: _Print) -> str:
    coefficient, rest = expr.as_coeff_Mul()
    if isinstance(coefficient, sympy.Rational) and not coefficient.is_Integer:
        if not expr.is_integer:
            raise UnsupportedError(f"{expr} is not known to be a whole number")
        numerator = sympy.Mul(sympy.Integer(coefficient.p), rest, evaluate=False) if coefficient.p != 1 else rest
        return lang.floor_div(numerator, sympy.Integer(coefficient.q), recur)
    divisors = [f for f in expr.args if f.is_Pow and f.exp.is_Integer and f.exp < 0]
    if divisors:
        if not expr.is_integer:
            raise UnsupportedError(f"{expr} is not known to be a whole number")
        bottom = sympy.Mul(*(1 / f for f in divisors))
        return lang.floor_div(expr * bottom, bottom, recur)
    factors = sorted(expr.args, key=lambda f: (not f.is_number, sympy.default_sort_key(f)))
    return "(" + "*".join(recur(f) for f in factors) + ")"


def _pow(expr: sympy.Expr, lang: _Language, recur: _Print) -> str:
    base, exponent = expr.args
    if exponent.is_Integer and exponent >= 0:
        return lang.power(base, int(exponent), recur)
    if exponent.is_integer and exponent.is_nonnegative and base.is_integer:
        return lang.functions["PowByNatural"](recur(base), recur(exponent))
    raise UnsupportedError(f"the power {expr} is not known to be a whole number")


def _function(expr: sympy.Basic, lang: _Language, recur: _Print) -> str:
    name = type(expr).__name__
    args = expr.args
    if name == "FloorDiv" and args[1] == int_oo:  # torch's name for 2**64 and more
        return lang.functions["RShift"](recur(args[0]), lang.integer(64))
    if name in ("FloorDiv", "CleanDiv"):
        return lang.floor_div(args[0], args[1], recur)
    if name in ("Mod", "PythonMod"):
        return lang.modulo(args[0], args[1], recur)
    if name == "ModularIndexing":
        inner = args[0] if args[1] == 1 else _Quotient(args[0], args[1])
        return lang.modulo(inner, args[2], recur)
    if name == "_Quotient":
        return lang.floor_div(args[0], args[1], recur)
    if name in ("floor", "ceiling"):
        return _rounded_quotient(expr, name == "ceiling", lang, recur)
    if name == "Identity":
        return recur(args[0])
    if name == "Piecewise":
        return _piecewise(expr, lang, recur)
    if name not in lang.functions:
        raise UnsupportedError(f"no spelling for the function {name} in the size expression {expr}")
    printed = [recur(a) for a in (_sorted(expr) if name in ("Max", "Min") else args)]
    return lang.functions[name](*printed)


class _Quotient(sympy.Expr):  # type: ignore[misc]
    """``a // b`` unevaluated, for printing only."""

    is_integer = True

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative and self.args[1].is_positive else None


def _rounded_quotient(expr: sympy.Basic, up: bool, lang: _Language, recur: _Print) -> str:
    """``floor(a/b)`` and ``ceiling(a/b)`` of whole a, b as exact integer divisions."""
    top, bottom = sympy.together(expr.args[0]).as_numer_denom()
    if not (top.is_integer and bottom.is_integer):
        raise UnsupportedError(f"{expr} is not a quotient of integers")
    if bottom == 1:
        return recur(top)
    if up:
        return f"(-{lang.floor_div(sympy.expand(-top), bottom, recur)})"
    return lang.floor_div(top, bottom, recur)


def _piecewise(expr: sympy.Basic, lang: _Language, recur: _Print) -> str:
    if expr.args[-1].args[1] != sympy.true:
        raise UnsupportedError(f"{expr} does not cover all cases")
    text = recur(expr.args[-1].args[0])
    for value, condition in reversed([p.args for p in expr.args[:-1]]):
        text = lang.functions["Where"](recur(condition), recur(value), text)
    return text


def _fold(name: str) -> Callable[..., str]:
    def printed(*args: str) -> str:
        text = args[-1]
        for a in reversed(args[:-1]):
            text = f"{name}({a}, {text})"
        return text

    return printed


# ---- Python ----------------------------------------------------------------------------------------------------------


def _python_number(value: float) -> str:
    return repr(value) if value == value and abs(value) != float("inf") else f'float("{value}")'


def _python_integer(value: int) -> str:
    return str(value) if value >= 0 else f"({value})"


def _binary(operator: str) -> Callable[..., str]:
    return lambda a, b: f"({a} {operator} {b})"


_PYTHON = _Language(
    integer=_python_integer,
    number=_python_number,
    true="True",
    false="False",
    conjunction="and",
    disjunction="or",
    negation="not ",
    power=lambda base, n, p: f"({p(base)}**{n})",
    floor_div=lambda a, b, p: f"({p(a)} // {p(b)})",
    modulo=lambda a, b, p: f"({p(a)} % {p(b)})",
    functions={
        "Where": lambda c, a, b: f"({a} if {c} else {b})",
        "Max": lambda *a: f"max({', '.join(a)})",
        "Min": lambda *a: f"min({', '.join(a)})",
        "Abs": lambda a: f"abs({a})",
        "PowByNatural": _binary("**"),
        "FloatPow": _binary("**"),
        "CeilDiv": lambda a, b: f"(-(-{a} // {b}))",
        "LShift": _binary("<<"),
        "RShift": _binary(">>"),
        "BitwiseFn_bitwise_and": _binary("&"),
        "BitwiseFn_bitwise_or": _binary("|"),
        "BitwiseFn_bitwise_xor": _binary("^"),
        "IntTrueDiv": _binary("/"),
        "FloatTrueDiv": _binary("/"),
        "ToFloat": lambda a: f"float({a})",
        "TruncToInt": lambda a: f"int({a})",
        "TruncToFloat": lambda a: f"float(int({a}))",
        "FloorToInt": lambda a: f"int({a} // 1)",
        "CeilToInt": lambda a: f"(-int(-{a} // 1))",
        "RoundToInt": lambda a: f"round({a})",
    },
)


# ---- C++ -------------------------------------------------------------------------------------------------------------


def cpp_integer(value: int) -> str:
    """An ``int64_t`` literal.

    Raises
    ------
    UnsupportedError
        If the value does not fit.
    """
    if not INT64_MIN <= value <= INT64_MAX:
        raise UnsupportedError(f"the integer {value} does not fit 64 bits")
    if value == INT64_MIN:
        return "(-9223372036854775807L - 1)"
    return f"{value}L" if value >= 0 else f"({value}L)"


def cpp_double(value: float) -> str:
    """A ``double`` literal, bit for bit (NaN is the quiet one)."""
    if value != value:
        return '__builtin_nan("")'
    if value in (float("inf"), float("-inf")):
        return "__builtin_inf()" if value > 0 else "(-__builtin_inf())"
    return value.hex() if not str(value).startswith("-") else f"({value.hex()})"


def _cpp_power(base: sympy.Basic, n: int, recur: _Print) -> str:
    if n <= 4 and (base.is_Symbol or n == 1):
        return "(" + "*".join([recur(base)] * n) + ")" if n else "1L"
    if not base.is_integer:
        return f"__builtin_pow({recur(base)}, {n}.0)"
    return f"mp::pow<int64_t>({recur(base)}, {n}L)"


def _power_of_two(b: sympy.Basic) -> sympy.Basic | None:
    """The exponent of ``2**exponent``: 64 and more are meant too, where the power itself is beyond 64 bits."""
    if type(b).__name__ in ("Pow", "PowByNatural") and b.args[0] == 2 and b.args[1].is_integer:
        return b.args[1]
    return None


def _cpp_floor_div(a: sympy.Basic, b: sympy.Basic, recur: _Print) -> str:
    exponent = _power_of_two(b)
    if exponent is not None:
        return f"mp::shr<int64_t>({recur(a)}, {recur(exponent)})"
    if b.is_Integer and b > INT64_MAX:
        return f"mp::shr<int64_t>({recur(a)}, 63L)"  # what is left of 64 bits is the sign
    if b.is_positive and is_nonnegative(a):
        return f"({recur(a)} / {recur(b)})"
    return f"mp::floordiv<int64_t>({recur(a)}, {recur(b)})"


def _cpp_modulo(a: sympy.Basic, b: sympy.Basic, recur: _Print) -> str:
    exponent = _power_of_two(b)
    if exponent is not None:
        return f"mp::low_bits({recur(a)}, {recur(exponent)})"
    if b.is_positive and is_nonnegative(a):
        return f"({recur(a)} % {recur(b)})"
    return f"mp::mod<int64_t>({recur(a)}, {recur(b)})"


_CPP = _Language(
    integer=cpp_integer,
    number=cpp_double,
    true="true",
    false="false",
    conjunction="&&",
    disjunction="||",
    negation="!",
    power=_cpp_power,
    floor_div=_cpp_floor_div,
    modulo=_cpp_modulo,
    functions={
        "Where": lambda c, a, b: f"({c} ? {a} : {b})",
        "Max": _fold("mp::maximum<int64_t>"),
        "Min": _fold("mp::minimum<int64_t>"),
        "Abs": lambda a: f"mp::abs<int64_t>({a})",
        "PowByNatural": lambda a, b: f"mp::pow<int64_t>({a}, {b})",
        "FloatPow": lambda a, b: f"__builtin_pow({a}, {b})",
        "CeilDiv": lambda a, b: f"(-mp::floordiv<int64_t>(-{a}, {b}))",
        "LShift": lambda a, b: f"mp::shl<int64_t>({a}, {b})",
        "RShift": lambda a, b: f"mp::shr<int64_t>({a}, {b})",
        "BitwiseFn_bitwise_and": _binary("&"),
        "BitwiseFn_bitwise_or": _binary("|"),
        "BitwiseFn_bitwise_xor": _binary("^"),
        "IntTrueDiv": lambda a, b: f"mp::true_divide({a}, {b})",
        "FloatTrueDiv": _binary("/"),
        "ToFloat": lambda a: f"double({a})",
        "TruncToInt": lambda a: f"int64_t({a})",
        "TruncToFloat": lambda a: f"__builtin_trunc({a})",
        "FloorToInt": lambda a: f"int64_t(__builtin_floor({a}))",
        "CeilToInt": lambda a: f"int64_t(__builtin_ceil({a}))",
        "RoundToInt": lambda a: f"int64_t(__builtin_nearbyint({a}))",
    },
)
