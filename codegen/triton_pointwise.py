"""Triton text of the pointwise functions of `memplan.ir.loops.OPERATIONS`.

Values of float32 nodes are computed as eager does (correctly rounded division and square root, libdevice's accurate
functions). Nodes of half types are rounded to 8 or 11 bits in the end, so the hardware's approximations serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from memplan.ir.errors import LoweringError

from .triton_printer import compute_type, literal, type_name

#: Functions whose operands may be plain Python literals, if another operand is a tensor of the same type.
LITERAL_OPERANDS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "maximum",
        "minimum",
        "where",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "shl",
        "shr",
    ]
)

_LIBDEVICE = frozenset(
    [
        "expm1",
        "log2",
        "log10",
        "log1p",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
        "erf",
        "erfc",
        "erfinv",
        "lgamma",
        "atan2",
        "hypot",
        "copysign",
        "nextafter",
    ]
)
_LIBDEVICE_NAMES = {
    "ndtri": "normcdfinv",
    **{name: name for name in _LIBDEVICE},
}
#: device functions around libdevice's: eager's have no limits at infinity
_BESSEL = frozenset(["i0", "i1", "bessel_j0", "bessel_j1"])
_INFIX = {
    "eq": "==",
    "ne": "!=",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
    "shl": "<<",
    "shr": ">>",
}
_ORDER = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_NAN = "propagate_nan=tl.PropagateNan.ALL"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call to print: operand texts, the type its operands are in, and whether approximations serve."""

    op: str
    args: tuple[str, ...]
    operand: torch.dtype
    approximate: bool
    use: Callable[[str], None]

    @property
    def floating(self) -> bool:
        return self.operand.is_floating_point

    @property
    def single(self) -> bool:
        return self.operand == torch.float32

    def device(self, name: str, *extra: str) -> str:
        self.use(name)
        return f"{name}({', '.join((*self.args, *extra))})"


def pointwise(
    op: str, args: tuple[str, ...], operand: torch.dtype, result: torch.dtype, use: Callable[[str], None]
) -> str:
    """Text of one call.

    Parameters
    ----------
    args:
        Texts of the operands: names, or literals where `LITERAL_OPERANDS` allows.
    operand:
        The dtype of the operands (of the values, for ``where``).
    result:
        The node's dtype; a half type asks for no more accuracy than its own.
    use:
        Called with the name of each device function that the text calls.

    Raises
    ------
    LoweringError
        If Triton has no such function on this type.
    """
    o = Operation(op, args, compute_type(operand), operand.is_floating_point and operand.itemsize < 4, use)
    if op in _BESSEL:
        if not o.floating:
            raise LoweringError(f"{op} of {operand} has no Triton form")
        return o.device(op)
    if op in _LIBDEVICE_NAMES:
        if not o.floating:
            raise LoweringError(f"{op} of {operand} has no Triton form")
        return f"libdevice.{_LIBDEVICE_NAMES[op]}({', '.join(args)})"
    if op in _TABLE:
        return _TABLE[op](o)
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _ORDER:
        left, right = args if operand != torch.bool else (_widen(a) for a in args)
        return f"{left} {_ORDER[op]} {right}"
    raise LoweringError(f"{op} has no Triton form")


def _widen(arg: str) -> str:
    """int1 is signed in Triton (true is -1), so booleans are ordered as int8."""
    return arg if arg in ("True", "False") else f"{arg}.to(tl.int8)"


def _arithmetic(sign: str, boolean: str) -> Callable[[Operation], str]:
    def text(o: Operation) -> str:
        return f"{o.args[0]} {boolean if o.operand == torch.bool else sign} {o.args[1]}"

    return text


def _exp(o: Operation) -> str:
    return f"tl.exp({o.args[0]})" if o.approximate else f"libdevice.exp({o.args[0]})"


def _log(o: Operation) -> str:
    return f"tl.log({o.args[0]})" if o.approximate else f"libdevice.log({o.args[0]})"


def _sqrt(o: Operation) -> str:
    if o.approximate:
        return f"tl.sqrt({o.args[0]})"
    return f"tl.sqrt_rn({o.args[0]})" if o.single else f"libdevice.sqrt({o.args[0]})"


def _divide(o: Operation) -> str:
    if o.single and not o.approximate:
        return f"tl.div_rn({o.args[0]}, {o.args[1]})"
    return f"{o.args[0]} / {o.args[1]}"


def _reciprocal(o: Operation) -> str:
    if o.single and not o.approximate:
        return f"tl.div_rn(1.0, {o.args[0]})"
    return f"1.0 / {o.args[0]}"


def _sigmoid(o: Operation) -> str:
    if o.approximate:
        return f"tl.sigmoid({o.args[0]})"
    if o.single:
        return f"tl.div_rn(1.0, 1.0 + libdevice.exp(-{o.args[0]}))"
    return f"1.0 / (1.0 + libdevice.exp(-{o.args[0]}))"


def _relu(o: Operation) -> str:
    return f"tl.maximum({o.args[0]}, 0.0, {_NAN})" if o.floating else f"tl.maximum({o.args[0]}, 0)"


def _rounding(name: str) -> Callable[[Operation], str]:
    return lambda o: f"{name}({o.args[0]})" if o.floating else o.args[0]


def _extremum(name: str, boolean: str, *, nan: bool) -> Callable[[Operation], str]:
    def text(o: Operation) -> str:
        a, b = o.args
        if o.operand == torch.bool:
            return f"{a} {boolean} {b}"
        if nan:
            return f"{name}({a}, {b}, {_NAN})" if o.floating else f"{name}({a}, {b})"
        return o.device(name)

    return text


def _sign(o: Operation) -> str:
    a, kind = o.args[0], type_name(o.operand)
    if o.operand == torch.bool:
        return a
    return f"({a} > 0).to({kind}) - ({a} < 0).to({kind})"


def _sign_bit(o: Operation) -> str:
    if not o.floating:
        return f"{o.args[0]} < 0"
    return f"{o.args[0]}.to(tl.int{o.operand.itemsize * 8}, bitcast=True) < 0"


def _truth(o: Operation) -> tuple[str, ...]:
    return o.args if o.operand == torch.bool else tuple(f"({a} != 0)" for a in o.args)


def _logical(sign: str) -> Callable[[Operation], str]:
    def text(o: Operation) -> str:
        a, b = _truth(o)
        return f"{a} {sign} {b}"

    return text


def _floor_division(o: Operation) -> str:
    if o.floating:
        return o.device("floor_divide_float")
    return o.device("floor_divide") if o.operand.is_signed else f"{o.args[0]} // {o.args[1]}"


def _truncating_division(o: Operation) -> str:
    return f"libdevice.trunc({_divide(o)})" if o.floating else f"{o.args[0]} // {o.args[1]}"


def _modulo(o: Operation) -> str:
    if o.floating:
        return o.device("floor_modulo_float")
    return o.device("floor_modulo") if o.operand.is_signed else f"{o.args[0]} % {o.args[1]}"


def _remainder(o: Operation) -> str:
    return f"libdevice.fmod({o.args[0]}, {o.args[1]})" if o.floating else f"{o.args[0]} % {o.args[1]}"


def _power(o: Operation) -> str:
    if o.floating:
        return f"libdevice.pow({o.args[0]}, {o.args[1]})"
    bits = o.operand.itemsize * 8 - (1 if o.operand.is_signed else 0)
    return o.device("integer_power", str(bits))


def _invert(o: Operation) -> str:
    if o.operand == torch.bool:
        return f"{o.args[0]} == 0"
    return f"~{o.args[0]}" if o.operand.is_signed else f"{o.args[0]} ^ {2 ** (8 * o.operand.itemsize) - 1}"


_TABLE: Mapping[str, Callable[[Operation], str]] = {
    "add": _arithmetic("+", "|"),
    "sub": _arithmetic("-", "^"),
    "mul": _arithmetic("*", "&"),
    "neg": lambda o: f"-{o.args[0]}",
    "abs": lambda o: f"tl.abs({o.args[0]})" if o.operand.is_signed else o.args[0],
    "square": lambda o: f"{o.args[0]} * {o.args[0]}",
    "exp": _exp,
    "exp2": lambda o: f"tl.exp2({o.args[0]})" if o.single else f"libdevice.exp2({o.args[0]})",
    "log": _log,
    "sqrt": _sqrt,
    "rsqrt": lambda o: f"tl.rsqrt({o.args[0]})" if o.single else f"libdevice.rsqrt({o.args[0]})",
    "div": _divide,
    "reciprocal": _reciprocal,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "floor": _rounding("tl.floor"),
    "ceil": _rounding("tl.ceil"),
    "trunc": _rounding("libdevice.trunc"),
    "round": _rounding("libdevice.nearbyint"),
    "sign": _sign,
    "signbit": _sign_bit,
    "logical_not": lambda o: f"{o.args[0]} == 0",
    "bitwise_not": _invert,
    "isnan": lambda o: f"{o.args[0]} != {o.args[0]}",
    "isinf": lambda o: f"tl.abs({o.args[0]}) == {literal(float('inf'), torch.float32)}",
    "floordiv": _floor_division,
    "truncdiv": _truncating_division,
    "mod": _modulo,
    "fmod": _remainder,
    "pow": _power,
    "maximum": _extremum("tl.maximum", "|", nan=True),
    "minimum": _extremum("tl.minimum", "&", nan=True),
    "fmax": _extremum("larger_number", "|", nan=False),
    "fmin": _extremum("smaller_number", "&", nan=False),
    "logical_and": _logical("&"),
    "logical_or": _logical("|"),
    "logical_xor": _logical("^"),
    "where": lambda o: f"tl.where({o.args[0]}, {o.args[1]}, {o.args[2]})",
    "fma": lambda o: f"tl.fma({', '.join(o.args)})" if o.floating else f"{o.args[0]} * {o.args[1]} + {o.args[2]}",
    "digamma": lambda o: o.device("digamma"),
    "log_ndtr": lambda o: o.device("log_ndtr"),
}
