"""Special functions, and the compositions of them that torch has operators for."""

from __future__ import annotations

import math

from .activations import normal_cdf
from .builder import KernelBuilder, Value
from .call_site import CallSite, Operations, lowers
from .pointwise import pointwise, pointwise_kernel, simple
from .promotion import Promotion

TO_FLOAT = Promotion.TO_FLOAT

simple("erf erfc erfinv lgamma digamma i0", promotion=TO_FLOAT)
simple("special_i0e special_i1 special_i1e special_ndtri special_log_ndtr", promotion=TO_FLOAT)
simple("special_bessel_j0 special_bessel_j1", promotion=TO_FLOAT)


@pointwise("aten.special_ndtr", promotion=TO_FLOAT)
def _ndtr(site: CallSite, self: Value) -> Value:
    scaled = self * math.sqrt(0.5)
    # erfc keeps the digits of the lower tail
    return (scaled < -1).where((-scaled).call("erfc") * 0.5, normal_cdf(self))


@pointwise("aten.special_entr", promotion=TO_FLOAT)
def _entr(site: CallSite, self: Value) -> Value:
    positive = -(self * self.call("log"))
    return self.call("isnan").where(self, (self > 0).where(positive, self.equals(0).where(0, self.constant(-math.inf))))


@pointwise("aten.sinc", promotion=TO_FLOAT)
def _sinc(site: CallSite, self: Value) -> Value:
    product = self * math.pi
    return self.equals(0).where(1, product.call("sin") / product)


def _times_log(one: Value, other: Value, log: str) -> Value:
    """``one * log(other)``, 0 where ``one`` is 0 and ``other`` is a number."""
    product = one.equals(0).where(0, one * other.call(log))
    return other.call("isnan").where(other, product)


@pointwise("aten.xlogy", "self other", TO_FLOAT, overloads="Tensor Scalar_Self Scalar_Other")
def _xlogy(site: CallSite, one: Value, other: Value) -> Value:
    return _times_log(one, other, "log")


@pointwise("aten.special_xlog1py", "self other", TO_FLOAT, overloads="default self_scalar other_scalar")
def _xlog1py(site: CallSite, one: Value, other: Value) -> Value:
    return _times_log(one, other, "log1p")


def _log_sum(one: Value, other: Value, exponential: str, unit: float) -> Value:
    """The logarithm of a sum of exponentials, from the larger operand; two equal infinities stay that."""
    high, low = one.call("maximum", other), one.call("minimum", other)
    grown = (low - high).call(exponential)
    total = high + grown.call("log1p") * unit
    same = high.call("isinf").both(one.equals(other))
    return same.where(one, total)


@pointwise("aten.logaddexp", "self other", TO_FLOAT)
def _logaddexp(site: CallSite, one: Value, other: Value) -> Value:
    return _log_sum(one, other, "exp", 1.0)


@pointwise("aten.logaddexp2", "self other", TO_FLOAT)
def _logaddexp2(site: CallSite, one: Value, other: Value) -> Value:
    return _log_sum(one, other, "exp2", 1 / math.log(2))


@pointwise("aten.logit", promotion=TO_FLOAT)
def _logit(site: CallSite, self: Value) -> Value:
    if site["eps"] is not None:
        eps = site.real("eps")
        self = self.call("maximum", eps).call("minimum", 1 - eps)
    return (self / (1 - self)).call("log")


@lowers("aten.round.decimals")
def _round_decimals(site: CallSite) -> Operations | None:
    source, decimals = site.view("self"), site.integer("decimals")
    if not source.dtype.is_floating_point:
        return None
    scale = 10.0 ** abs(decimals)

    def body(builder: KernelBuilder) -> Value:
        value = builder.compute(builder.load(source, builder.outer_coordinates))
        if decimals >= 0:
            return (value * scale).call("round") / scale
        return (value / scale).call("round") * scale

    return pointwise_kernel(site, site.result, body)


@pointwise("aten.angle", promotion=TO_FLOAT)
def _angle(site: CallSite, self: Value) -> Value:
    return self.call("isnan").where(self, (self < 0).where(self.constant(math.pi), 0))


@pointwise("aten.ldexp", "self other", TO_FLOAT, overloads="Tensor")
def _ldexp(site: CallSite, one: Value, other: Value) -> Value:
    return one * other.call("exp2")
