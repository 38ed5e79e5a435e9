"""Arithmetic, comparisons, logic, rounding and casts."""

from __future__ import annotations

import math

import torch

from ..ir.program import View
from .builder import KernelBuilder, Value
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .pointwise import element, pointwise, pointwise_kernel, promoted_kernel, simple
from .promotion import Promotion, common_dtype

COMMON, TO_FLOAT = Promotion.COMMON, Promotion.TO_FLOAT
TENSOR_OR_SCALAR = "Tensor Scalar"

# -- sums and products --------------------------------------------------------------------------------------------


def add(one: Value, other: Value) -> Value:
    return one.either(other) if one.dtype is torch.bool else one + other


def multiply(one: Value, other: Value) -> Value:
    return one.both(other) if one.dtype is torch.bool else one * other


def scaled(site: CallSite, value: Value, name: str = "alpha") -> Value:
    """``value`` times the factor that parameter ``name`` gives (1 where it is not given)."""
    alpha = site[name]
    if alpha is None or alpha == 1 or (isinstance(alpha, bool) and value.dtype is torch.bool and alpha):
        return value
    return multiply(value, element(value.builder, site.operand(name), value.dtype))


@pointwise("aten.add", "self other", overloads=TENSOR_OR_SCALAR)
def _add(site: CallSite, one: Value, other: Value) -> Value:
    return add(one, scaled(site, other))


@pointwise("aten.sub", "self other", overloads=TENSOR_OR_SCALAR)
def _sub(site: CallSite, one: Value, other: Value) -> Value:
    return one - scaled(site, other)


@pointwise("aten.rsub", "self other", overloads=TENSOR_OR_SCALAR)
def _rsub(site: CallSite, one: Value, other: Value) -> Value:
    return other - scaled(site, one)


@pointwise("aten.mul", "self other", overloads=TENSOR_OR_SCALAR)
def _mul(site: CallSite, one: Value, other: Value) -> Value:
    return multiply(one, other)


@pointwise("aten.div", "self other", TO_FLOAT, overloads=TENSOR_OR_SCALAR)
def _div(site: CallSite, one: Value, other: Value) -> Value:
    return one / other


@lowers("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _div_mode(site: CallSite) -> Operations | None:
    mode = site["rounding_mode"]
    op = {None: "div", "floor": "floordiv", "trunc": "truncdiv"}[mode]  # type: ignore[index]
    promotion = TO_FLOAT if mode is None else COMMON
    operands = [site.operand("self"), site.operand("other")]
    if common_dtype(operands) is torch.bool and mode is not None:
        return None
    return promoted_kernel(site, site.result, operands, promotion, lambda a, b: a.call(op, b))


simple("floor_divide", "floordiv", arity=2, overloads="default Scalar")
simple("remainder", "mod", arity=2, overloads="Tensor Scalar Scalar_Tensor")
simple("fmod", "fmod", arity=2, overloads=TENSOR_OR_SCALAR)
simple("maximum minimum fmax fmin hypot", arity=2)
simple("nextafter", arity=2)
simple("atan2", "atan2", TO_FLOAT, arity=2)
simple("copysign", "copysign", TO_FLOAT, arity=2, overloads=TENSOR_OR_SCALAR)


@pointwise("aten.pow", "self exponent", overloads="Tensor_Tensor Tensor_Scalar Scalar")
def _pow(site: CallSite, base: Value, exponent: Value) -> Value:
    return power(base, exponent)


def power(base: Value, exponent: Value) -> Value:
    """``base ** exponent``; small literal exponents become products, as in eager."""
    if base.dtype is torch.bool:
        return base.either(exponent.logical_not())
    known = base.builder.literal(exponent)
    if base.dtype.is_floating_point:
        match known:
            case 0.5:
                return base.call("sqrt")
            case -0.5:
                return base.call("rsqrt")
            case -1.0:
                return base.call("reciprocal")
            case -2.0:
                return (base * base).call("reciprocal")
    match known:
        case 0:
            return base.constant(1)
        case 1:
            return base
        case 2:
            return base * base
        case 3:
            return base * base * base
    return base.call("pow", exponent)


@pointwise("aten.addcmul", "self tensor1 tensor2")
def _addcmul(site: CallSite, self: Value, one: Value, two: Value) -> Value:
    return self + scaled(site, one, "value") * two


@pointwise("aten.addcdiv", "self tensor1 tensor2")
def _addcdiv(site: CallSite, self: Value, one: Value, two: Value) -> Value:
    return self + scaled(site, one / two, "value")


@pointwise("aten.lerp", "self end weight", overloads="Tensor")
def _lerp_tensor(site: CallSite, self: Value, end: Value, weight: Value) -> Value:
    return interpolated(self, end, weight)


@pointwise("aten.lerp", "self end", overloads="Scalar")
def _lerp_scalar(site: CallSite, self: Value, end: Value) -> Value:
    return interpolated(self, end, element(self.builder, site.operand("weight"), self.dtype))


def interpolated(start: Value, end: Value, weight: Value) -> Value:
    """From ``start`` to ``end``, measured from the nearer of the two, as eager does it."""
    near = weight.call("abs") < 0.5
    return near.where(start + weight * (end - start), end - (end - start) * (weight.constant(1) - weight))


# -- unary --------------------------------------------------------------------------------------------------------

simple("neg")
simple("square")
simple("sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p", promotion=TO_FLOAT)
simple("sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh", promotion=TO_FLOAT)


@pointwise("aten.abs")
def _abs(site: CallSite, self: Value) -> Value:
    return self if self.dtype in (torch.bool, torch.uint8) else self.call("abs")


@pointwise("aten.sign")
@pointwise("aten.sgn")
def _sign(site: CallSite, self: Value) -> Value:
    return self if self.dtype is torch.bool else self.call("sign")


def _register_rounding() -> None:
    for name in ("floor", "ceil", "trunc", "round"):

        def formula(site: CallSite, self: Value, name: str = name) -> Value:
            return self.call(name) if self.dtype.is_floating_point else self

        pointwise(f"aten.{name}")(formula)


_register_rounding()


@pointwise("aten.frac")
def _frac(site: CallSite, self: Value) -> Value:
    return self - self.call("trunc")


@pointwise("aten.positive")
def _positive(site: CallSite, self: Value) -> Value:
    return self


@pointwise("aten.deg2rad", promotion=TO_FLOAT)
def _deg2rad(site: CallSite, self: Value) -> Value:
    return self * (math.pi / 180)


@pointwise("aten.rad2deg", promotion=TO_FLOAT)
def _rad2deg(site: CallSite, self: Value) -> Value:
    return self * (180 / math.pi)


# -- comparisons and logic ----------------------------------------------------------------------------------------

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    simple(_name, _name, arity=2, overloads=TENSOR_OR_SCALAR)


def _register_logic() -> None:
    for name in ("logical_and", "logical_or", "logical_xor", "logical_not"):
        names = "self" if name == "logical_not" else "self other"

        def formula(site: CallSite, *values: Value, name: str = name) -> Value:
            truth = [v if v.dtype is torch.bool else v.differs(0) for v in values]
            return truth[0].call(name, *truth[1:])

        pointwise(f"aten.{name}", names)(formula)
    booleans = {"bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_xor": "logical_xor"}
    for name, logical in booleans.items():

        def bitwise(site: CallSite, one: Value, other: Value, name: str = name, logical: str = logical) -> Value:
            return one.call(logical if one.dtype is torch.bool else name, other)

        pointwise(f"aten.{name}", "self other", overloads="Tensor Scalar Scalar_Tensor")(bitwise)


_register_logic()


@pointwise("aten.bitwise_not")
def _bitwise_not(site: CallSite, self: Value) -> Value:
    return self.logical_not() if self.dtype is torch.bool else self.call("bitwise_not")


def shift(value: Value, amount: Value, op: str) -> Value:
    """A shift by an amount outside of the type's bits gives 0 (or the sign, to the right), as in eager."""
    bits = value.dtype.itemsize * 8
    outside = (amount < 0).either(amount >= bits) if value.dtype.is_signed else amount >= bits
    if op == "shl":
        return outside.where(0, value.call("shl", outside.where(0, amount)))
    most = bits - 1 if value.dtype.is_signed else None
    if most is None:
        return outside.where(0, value.call("shr", outside.where(0, amount)))
    return value.call("shr", outside.where(most, amount))


def _register_shifts() -> None:
    for name, op in (("bitwise_left_shift", "shl"), ("bitwise_right_shift", "shr")):

        def formula(site: CallSite, one: Value, other: Value, op: str = op) -> Value:
            return shift(one, other, op)

        pointwise(f"aten.{name}", "self other", overloads="Tensor Tensor_Scalar Scalar_Tensor")(formula)
    for name, op in (("__lshift__", "shl"), ("__rshift__", "shr")):

        def dunder(site: CallSite, one: Value, other: Value, op: str = op) -> Value:
            return shift(one, other, op)

        pointwise(f"aten.{name}", "self other", overloads=TENSOR_OR_SCALAR)(dunder)


_register_shifts()


def floating_test(test: str) -> None:
    """Register a test that only floating values can pass."""

    def formula(site: CallSite, self: Value) -> Value:
        if not self.dtype.is_floating_point:
            return self.builder.constant(False, torch.bool)
        return self.call(test)

    pointwise(f"aten.{test}")(formula)


floating_test("isnan")
floating_test("isinf")


@pointwise("aten.isposinf")
def _isposinf(site: CallSite, self: Value) -> Value:
    if not self.dtype.is_floating_point:
        return self.builder.constant(False, torch.bool)
    return self.equals(math.inf)


@pointwise("aten.isneginf")
def _isneginf(site: CallSite, self: Value) -> Value:
    if not self.dtype.is_floating_point:
        return self.builder.constant(False, torch.bool)
    return self.equals(-math.inf)


@pointwise("aten.isfinite")
def _isfinite(site: CallSite, self: Value) -> Value:
    if not self.dtype.is_floating_point:
        return self.builder.constant(True, torch.bool)
    return self.call("isinf").either(self.call("isnan")).logical_not()


@pointwise("aten.signbit")
def _signbit(site: CallSite, self: Value) -> Value:
    if self.dtype.is_floating_point:
        return self.call("signbit")
    return self.builder.constant(False, torch.bool) if self.dtype is torch.bool else self < 0


@pointwise("aten.nan_to_num")
def _nan_to_num(site: CallSite, self: Value) -> Value:
    if not self.dtype.is_floating_point:
        return self
    limits = torch.finfo(site.view("self").dtype)
    nan = 0.0 if site["nan"] is None else site.real("nan")
    high = limits.max if site["posinf"] is None else site.real("posinf")
    low = limits.min if site["neginf"] is None else site.real("neginf")
    finite = self.equals(math.inf).where(high, self.equals(-math.inf).where(low, self))
    return self.call("isnan").where(nan, finite)


@pointwise("aten.heaviside", "self values")
def _heaviside(site: CallSite, self: Value, values: Value) -> Value:
    zero = self.equals(0)
    if self.dtype is torch.bool:
        return zero.where(values, self)
    return zero.where(values, (self > 0).cast(self.dtype))


# -- choice -------------------------------------------------------------------------------------------------------


@lowers("aten.where.self", "aten.where.Scalar", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def _where(site: CallSite) -> Operations | None:
    operands = [site.operand("self"), site.operand("other")]
    dtype = common_dtype(operands)
    if dtype not in SUPPORTED:
        return None

    def body(builder: KernelBuilder) -> Value:
        condition = element(builder, site.view("condition"), torch.bool)
        return condition.where(moved(builder, operands[0], dtype), moved(builder, operands[1], dtype))

    return pointwise_kernel(site, site.result, body)


def moved(builder: KernelBuilder, operand: object, dtype: torch.dtype) -> Value:
    """An operand that is only passed on: half types need no float32 for that."""
    if isinstance(operand, View):
        return builder.load_broadcast(operand, builder.outer_coordinates).cast(dtype)
    return element(builder, operand, dtype).cast(dtype)


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(site: CallSite) -> Operations | None:
    self = site.view("self")

    def body(builder: KernelBuilder) -> Value:
        mask = element(builder, site.view("mask"), torch.bool)
        return mask.where(moved(builder, site.operand("value"), self.dtype), moved(builder, self, self.dtype))

    return pointwise_kernel(site, site.result, body)


def clamped(value: Value, low: Value | None, high: Value | None) -> Value:
    """At least ``low``, then at most ``high``; NaN stays NaN."""
    if low is not None:
        value = value.either(low) if value.dtype is torch.bool else value.call("maximum", low)
    if high is not None:
        value = value.both(high) if value.dtype is torch.bool else value.call("minimum", high)
    return value


@lowers("aten.clamp.default", "aten.clamp.Tensor")
def _clamp(site: CallSite) -> Operations | None:
    names = [name for name in ("min", "max") if site[name] is not None]

    def formula(value: Value, *limits: Value) -> Value:
        bounds = dict(zip(names, limits, strict=True))
        return clamped(value, bounds.get("min"), bounds.get("max"))

    operands = [site.operand("self"), *(site.operand(n) for n in names)]
    return promoted_kernel(site, site.result, operands, COMMON, formula)


@pointwise("aten.clamp_min", "self min", overloads="default Tensor")
def _clamp_min(site: CallSite, self: Value, low: Value) -> Value:
    return clamped(self, low, None)


@pointwise("aten.clamp_max", "self max", overloads="default Tensor")
def _clamp_max(site: CallSite, self: Value, high: Value) -> Value:
    return clamped(self, None, high)


# -- casts and copies ---------------------------------------------------------------------------------------------


def converted_kernel(site: CallSite, source: View, result: View, suffix: str = "") -> Operations:
    """A kernel that copies ``source`` (broadcast) into ``result``, converting the type."""

    def body(builder: KernelBuilder) -> Value:
        value = builder.load_broadcast(source, builder.outer_coordinates)
        return value.cast(result.dtype) if result.dtype is torch.bool or value.dtype is torch.bool else value

    return pointwise_kernel(site, result, body, suffix)


@lowers(
    "aten._to_copy.default", "aten.clone.default", "aten.alias_copy.default", "aten.lift_fresh_copy.default",
    "aten.expand_copy.default", "aten.contiguous.default",
)  # fmt: skip
def _copied(site: CallSite) -> Operations | None:
    source = site.view("self")
    if len(source.sizes) > len(site.result.sizes):
        return None
    return converted_kernel(site, source, site.result)


@lowers("prims.convert_element_type.default", "prims.clone.default")
def _convert_element_type(site: CallSite) -> Operations | None:
    return converted_kernel(site, site.view("a" if "a" in site else "self"), site.result)


@lowers("aten.copy.default")
def _copy(site: CallSite) -> Operations | None:
    return converted_kernel(site, site.view("src"), site.result)
