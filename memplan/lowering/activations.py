"""Activation functions, forward and backward."""

from __future__ import annotations

import math

from .builder import Value
from .call_site import CallSite, Operations, lowers
from .pointwise import pointwise, promoted_kernel, simple
from .promotion import Promotion

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715

simple("relu")
simple("sigmoid", promotion=Promotion.TO_FLOAT)


@pointwise("aten.relu6")
def _relu6(site: CallSite, self: Value) -> Value:
    return self.call("maximum", 0).call("minimum", 6)


@pointwise("aten.threshold")
def _threshold(site: CallSite, self: Value) -> Value:
    return (self <= site.scalar("threshold")).where(site.scalar("value"), self)


@pointwise("aten.threshold_backward", "grad_output self")
def _threshold_backward(site: CallSite, grad: Value, self: Value) -> Value:
    return (self <= site.scalar("threshold")).where(0, grad)


# -- gelu ---------------------------------------------------------------------------------------------------------


def normal_cdf(x: Value) -> Value:
    """The distribution function of the standard normal distribution."""
    return ((x * SQRT_HALF).call("erf") + 1) * 0.5


@pointwise("aten.gelu")
def _gelu(site: CallSite, x: Value) -> Value:
    if site.text("approximate") == "tanh":
        inner = (x + x * x * x * GELU_CUBIC) * SQRT_2_OVER_PI
        return x * 0.5 * (inner.call("tanh") + 1)
    return x * normal_cdf(x)


@pointwise("aten.gelu_backward", "grad_output self")
def _gelu_backward(site: CallSite, grad: Value, x: Value) -> Value:
    if site.text("approximate") == "tanh":
        square = x * x
        tanh = ((x + square * x * GELU_CUBIC) * SQRT_2_OVER_PI).call("tanh")
        slope = (square * (3 * GELU_CUBIC) + 1) * SQRT_2_OVER_PI
        return grad * ((tanh + 1) * 0.5 + x * 0.5 * (1 - tanh * tanh) * slope)
    density = (x * x * -0.5).call("exp") * (1 / math.sqrt(2 * math.pi))
    return grad * (normal_cdf(x) + x * density)


# -- sigmoid and its relatives ------------------------------------------------------------------------------------


@pointwise("aten.sigmoid_backward", "grad_output output")
def _sigmoid_backward(site: CallSite, grad: Value, output: Value) -> Value:
    return grad * ((1 - output) * output)


@pointwise("aten.tanh_backward", "grad_output output")
def _tanh_backward(site: CallSite, grad: Value, output: Value) -> Value:
    return grad * (1 - output * output)


@pointwise("aten.silu")
def _silu(site: CallSite, self: Value) -> Value:
    return self / ((-self).call("exp") + 1)


@pointwise("aten.silu_backward", "grad_output self")
def _silu_backward(site: CallSite, grad: Value, self: Value) -> Value:
    sigmoid = self.call("sigmoid")
    return grad * sigmoid * (self * (1 - sigmoid) + 1)


def log_sigmoid(x: Value) -> Value:
    """``min(x, 0) - log1p(exp(-|x|))``: no overflow on either side."""
    return x.call("minimum", 0) - (-x.call("abs")).call("exp").call("log1p")


@pointwise("aten.log_sigmoid")
def _log_sigmoid(site: CallSite, self: Value) -> Value:
    return log_sigmoid(self)


@lowers("aten.log_sigmoid_forward.default")
def _log_sigmoid_forward(site: CallSite) -> Operations | None:
    self, buffer = site.view("self"), site.results[1]
    found = promoted_kernel(site, site.result, [self], Promotion.COMMON, log_sigmoid)
    if found is None or buffer is None or buffer.sizes == (0,):
        return found  # on CUDA the buffer is empty
    more = promoted_kernel(site, buffer, [self], Promotion.COMMON, lambda x: (-x.call("abs")).call("exp"), "buffer")
    return None if more is None else found + more


@pointwise("aten.log_sigmoid_backward", "grad_output self")
def _log_sigmoid_backward(site: CallSite, grad: Value, self: Value) -> Value:
    decay = (-self.call("abs")).call("exp")
    share = decay / (decay + 1)
    return grad * (self < 0).where(1 - share, share)


@pointwise("aten.mish")
def _mish(site: CallSite, self: Value) -> Value:
    return self * self.call("exp").call("log1p").call("tanh")


@pointwise("aten.mish_backward", "grad_output self")
def _mish_backward(site: CallSite, grad: Value, self: Value) -> Value:
    tanh = self.call("exp").call("log1p").call("tanh")
    return grad * (tanh + self * self.call("sigmoid") * (1 - tanh * tanh))


@pointwise("aten.softplus")
def _softplus(site: CallSite, self: Value) -> Value:
    beta, threshold = site.real("beta"), site.real("threshold")
    scaled = self * beta
    return (scaled > threshold).where(self, scaled.call("exp").call("log1p") / beta)


@pointwise("aten.softplus_backward", "grad_output self")
def _softplus_backward(site: CallSite, grad: Value, self: Value) -> Value:
    scaled = self * site.real("beta")
    grown = scaled.call("exp")
    return (scaled > site.real("threshold")).where(grad, grad * grown / (grown + 1))


# -- piecewise ----------------------------------------------------------------------------------------------------


@pointwise("aten.leaky_relu")
def _leaky_relu(site: CallSite, self: Value) -> Value:
    return (self > 0).where(self, self * site.scalar("negative_slope"))


@pointwise("aten.leaky_relu_backward", "grad_output self")
def _leaky_relu_backward(site: CallSite, grad: Value, self: Value) -> Value:
    return (self > 0).where(grad, grad * site.scalar("negative_slope"))


@pointwise("aten.prelu", "self weight")
@pointwise("aten._prelu_kernel", "self weight")
def _prelu(site: CallSite, self: Value, weight: Value) -> Value:
    return (self > 0).where(self, self * weight)


@lowers("aten._prelu_kernel_backward.default")
def _prelu_backward(site: CallSite) -> Operations | None:
    operands = [site.view("grad_output"), site.view("self"), site.view("weight")]
    out: Operations = ()
    if site.results[0] is not None:
        made = promoted_kernel(
            site, site.results[0], operands, Promotion.COMMON, lambda g, x, w: (x > 0).where(g, g * w), "input"
        )
        out += made or ()
    if site.results[1] is not None:
        made = promoted_kernel(
            site, site.results[1], operands, Promotion.COMMON, lambda g, x, w: (x > 0).where(0, g * x), "weight"
        )
        out += made or ()
    return out


@pointwise("aten.elu")
def _elu(site: CallSite, self: Value) -> Value:
    negative = (self * site.real("input_scale")).call("expm1") * (site.real("alpha") * site.real("scale"))
    return (self > 0).where(self * site.real("scale"), negative)


@pointwise("aten.elu_backward", "grad_output self_or_result")
def _elu_backward(site: CallSite, grad: Value, seen: Value) -> Value:
    alpha, scale, input_scale = site.real("alpha"), site.real("scale"), site.real("input_scale")
    if site.flag("is_result"):
        negative = grad * input_scale * (seen + alpha * scale)
    else:
        negative = grad * (input_scale * alpha * scale) * (seen * input_scale).call("exp")
    return (seen <= 0).where(negative, grad * scale)


@pointwise("aten.celu")
def _celu(site: CallSite, self: Value) -> Value:
    alpha = site.real("alpha")
    return (self > 0).where(self, (self / alpha).call("expm1") * alpha)


@pointwise("aten.selu")
def _selu(site: CallSite, self: Value) -> Value:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return (self > 0).where(self * scale, self.call("expm1") * (alpha * scale))


@pointwise("aten.hardtanh")
def _hardtanh(site: CallSite, self: Value) -> Value:
    return self.call("maximum", site.scalar("min_val")).call("minimum", site.scalar("max_val"))


@pointwise("aten.hardtanh_backward", "grad_output self")
def _hardtanh_backward(site: CallSite, grad: Value, self: Value) -> Value:
    outside = (self <= site.scalar("min_val")).either(self >= site.scalar("max_val"))
    return outside.where(0, grad)


def hard_gate(x: Value) -> Value:
    """``min(max(x + 3, 0), 6)``."""
    return (x + 3).call("maximum", 0).call("minimum", 6)


@pointwise("aten.hardsigmoid")
def _hardsigmoid(site: CallSite, self: Value) -> Value:
    return hard_gate(self) / 6


@pointwise("aten.hardsigmoid_backward", "grad_output self")
def _hardsigmoid_backward(site: CallSite, grad: Value, self: Value) -> Value:
    return (self > -3).both(self < 3).where(grad * (1 / 6), 0)


@pointwise("aten.hardswish")
def _hardswish(site: CallSite, self: Value) -> Value:
    return self * hard_gate(self) / 6


@pointwise("aten.hardswish_backward", "grad_output self")
def _hardswish_backward(site: CallSite, grad: Value, self: Value) -> Value:
    return (self <= -3).where(0, (self < 3).where(grad * (self / 3 + 0.5), grad))


@pointwise("aten.hardshrink")
def _hardshrink(site: CallSite, self: Value) -> Value:
    limit = site.scalar("lambd")
    return (self >= -limit).both(self <= limit).where(0, self)


@pointwise("aten.hardshrink_backward", "grad_out self")
def _hardshrink_backward(site: CallSite, grad: Value, self: Value) -> Value:
    limit = site.scalar("lambd")
    return (self >= -limit).both(self <= limit).where(0, grad)


@pointwise("aten.softshrink")
def _softshrink(site: CallSite, self: Value) -> Value:
    limit = site.scalar("lambd")
    # times 0 rather than 0, so that NaN stays NaN
    return (self > limit).where(self - limit, (self < -limit).where(self + limit, self * 0))


@pointwise("aten.softshrink_backward", "grad_output self")
def _softshrink_backward(site: CallSite, grad: Value, self: Value) -> Value:
    limit = site.scalar("lambd")
    return (self >= -limit).both(self <= limit).where(0, grad)
