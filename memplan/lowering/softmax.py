"""Softmax and log-softmax, forward and backward, each one kernel over a row."""

from __future__ import annotations

from ..ir.program import View
from .builder import Value
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .pointwise import is_empty
from .row_space import RowSpace, row_space


def _space(site: CallSite, source: View) -> tuple[RowSpace, frozenset[int]]:
    reduced = frozenset({site.dim("dim", len(source.sizes))}) if source.sizes else frozenset()
    return row_space(source.sizes, reduced), reduced


@lowers("aten._softmax.default", "aten._log_softmax.default", "aten._safe_softmax.default")
def _softmax(site: CallSite) -> Operations | None:
    source, result = site.view("self"), site.result
    if source.dtype not in SUPPORTED:
        return None
    if is_empty(result):
        return ()
    space, _ = _space(site, source)
    value = space.load(source).cast(space.load(source).dtype)
    if not value.dtype.is_floating_point:
        value = value.cast(result.dtype)
    shifted = value - space.builder.reduce("max", value)
    grown = shifted.call("exp")
    total = space.builder.reduce("sum", grown)
    if "_log_softmax" in site.op.target:
        out = shifted - total.call("log")
    else:
        out = grown / total
        if "_safe_softmax" in site.op.target:
            masked = space.builder.reduce("all", value.equals(float("-inf")))
            out = masked.where(0, out)
    space.builder.store(result, space.point, out)
    return (site.kernel(space.builder),)


@lowers("aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default")
def _softmax_backward(site: CallSite) -> Operations | None:
    gradient, output, result = site.view("grad_output"), site.view("output"), site.result
    if gradient.dtype not in SUPPORTED or result.dtype not in SUPPORTED:
        return None
    if is_empty(result):
        return ()
    space, _ = _space(site, output)
    grad, seen = space.load(gradient), space.load(output)
    out: Value
    if "_log_softmax" in site.op.target:
        out = grad - seen.call("exp") * space.builder.reduce("sum", grad)
    else:
        product = grad * seen
        out = product - seen * space.builder.reduce("sum", product)
    space.builder.store(result, space.point, out)
    return (site.kernel(space.builder),)
