"""Text of Triton: index expressions, types and literals.

Triton divides integers as C does, rounding towards zero; `FloorDiv` and `Mod` round down. Where the dividend is
provably not negative and the divisor positive both agree and the plain operators are printed; elsewhere calls of the
device functions ``floor_divide`` and ``floor_modulo`` are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sympy
import torch

from memplan.ir.errors import LoweringError
from memplan.ir.index import FloorDiv, Mod, Ranges, bounds, is_nonnegative
from memplan.ir.loops import Scalar

_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "int1",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float8_e4m3fn: "float8e4nv",
    torch.float8_e5m2: "float8e5",
}

_SIGNATURE: Mapping[torch.dtype, str] = {
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are computed in: float32 for all smaller floats."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def type_name(dtype: torch.dtype) -> str:
    """``tl.bfloat16`` and so on.

    Raises
    ------
    LoweringError
        If Triton has no such type (complex numbers, quantised and packed types).
    """
    if dtype not in _NAMES:
        raise LoweringError(f"Triton kernels cannot hold {dtype}")
    return f"tl.{_NAMES[dtype]}"


def signature_name(dtype: torch.dtype) -> str:
    """The type in a kernel's signature: ``bf16``, ``i64``; a pointer is a star before it."""
    if dtype not in _SIGNATURE:
        raise LoweringError(f"Triton kernels cannot hold {dtype}")
    return _SIGNATURE[dtype]


def literal(value: Scalar, dtype: torch.dtype) -> str:
    """A Python literal of a value of this dtype, in brackets where it is negative."""
    if dtype == torch.bool:
        return "True" if value else "False"
    if dtype.is_floating_point:
        number = float(value)
        if math.isnan(number):
            return 'float("nan")'
        if math.isinf(number):
            return 'float("inf")' if number > 0 else 'float("-inf")'
        text = repr(number)
    else:
        text = repr(int(value))
    return f"({text})" if text.startswith("-") else text


@dataclass
class IndexPrinter:
    """What `texpr` needs to know about the symbols of an expression, and the device functions it turned out to use."""

    ranges: Ranges
    names: Callable[[sympy.Symbol], str]
    used: set[str] = field(default_factory=set)

    def nonnegative(self, expr: sympy.Expr) -> bool:
        found = bounds(expr, self.ranges)
        return is_nonnegative(found[0] if found is not None else expr)


_SUM, _PRODUCT, _ATOM = 1, 2, 3


def texpr(expr: sympy.Expr, printer: IndexPrinter) -> str:
    """An index expression as Triton text, with the integer semantics of `memplan.ir.index` exactly.

    Raises
    ------
    LoweringError
        For a function that index expressions do not have.
    """
    return _print(expr, printer)[0]


def _print(expr: sympy.Expr, printer: IndexPrinter) -> tuple[str, int]:
    if expr.is_Integer:
        value = int(expr)
        return (str(value), _ATOM) if value >= 0 else (str(value), _SUM)
    if expr.is_Symbol:
        return printer.names(expr), _ATOM
    if expr.is_Add:
        return _print_sum(expr, printer), _SUM
    if expr.is_Mul:
        return _print_product(expr, printer)
    if isinstance(expr, (FloorDiv, Mod)):
        return _print_division(expr, printer)
    if expr.is_Pow and expr.args[1].is_Integer and int(expr.args[1]) > 0:
        base = _bracket(expr.args[0], printer, _ATOM)
        return "*".join([base] * int(expr.args[1])), _PRODUCT
    if isinstance(expr, (sympy.Max, sympy.Min)):
        name = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
        out = texpr(expr.args[0], printer)
        for a in expr.args[1:]:
            out = f"{name}({out}, {texpr(a, printer)})"
        return out, _ATOM
    raise LoweringError(f"no Triton text for the index expression {expr} ({type(expr).__name__})")


def _bracket(expr: sympy.Expr, printer: IndexPrinter, level: int) -> str:
    text, own = _print(expr, printer)
    return text if own >= level else f"({text})"


def _print_sum(expr: sympy.Expr, printer: IndexPrinter) -> str:
    """Constants last, negative terms by subtraction."""
    terms = sorted(expr.args, key=lambda t: (bool(t.is_Integer), t.could_extract_minus_sign()))
    out = ""
    for term in terms:
        negative = term.could_extract_minus_sign()
        text = _bracket(-term if negative else term, printer, _PRODUCT if negative else _SUM)
        if not out:
            out = f"-{text}" if negative else text
        else:
            out += f" - {text}" if negative else f" + {text}"
    return out


def _print_product(expr: sympy.Expr, printer: IndexPrinter) -> tuple[str, int]:
    coefficient, rest = expr.as_coeff_Mul()
    if not coefficient.is_Integer:
        raise LoweringError(f"index expression {expr} is not integral")
    factors = [_bracket(f, printer, _ATOM) for f in sympy.Mul.make_args(rest)]
    if coefficient == -1:
        return "-" + "*".join(factors), _SUM
    if coefficient != 1:
        factors.insert(0, str(int(coefficient)))
    return "*".join(factors), (_PRODUCT if coefficient > 0 else _SUM)


def _print_division(expr: FloorDiv | Mod, printer: IndexPrinter) -> tuple[str, int]:
    base, divisor = expr.args
    is_div = isinstance(expr, FloorDiv)
    if printer.nonnegative(base) and divisor.is_positive:
        left, right = _bracket(base, printer, _ATOM), _bracket(divisor, printer, _ATOM)
        # a product of a quotient must keep its brackets: 3*(a // b) is not 3*a // b
        return f"({left} {'//' if is_div else '%'} {right})", _ATOM
    name = "floor_divide" if is_div else "floor_modulo"
    printer.used.add(name)
    return f"{name}({texpr(base, printer)}, {texpr(divisor, printer)})", _ATOM


def convert(text: str, source: torch.dtype, target: torch.dtype, *, keep: bool = True) -> str:
    """A value of dtype ``source`` as one of ``target``; ``keep`` says that halves are to be held in float32 again."""
    if target == torch.bool:
        return text if source == torch.bool else f"({text} != 0)"
    if target.is_complex or source.is_complex:
        raise LoweringError("Triton kernels cannot hold complex numbers")
    out = text if compute_type(source) == target else f"{text}.to({type_name(target)})"
    if keep and compute_type(target) != target:
        out += f".to({type_name(compute_type(target))})"
    return out
