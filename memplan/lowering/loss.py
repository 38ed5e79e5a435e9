"""The parts of cross entropy after log-softmax, and other losses that are one kernel."""

from __future__ import annotations

import torch

from ..ir.loops import Size
from ..ir.program import View
from .builder import KernelBuilder, Value
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .indexing import in_range
from .pointwise import is_empty, pointwise_kernel

NONE, MEAN, SUM = 0, 1, 2


def _class_dim(view: View) -> int:
    """Classes are dimension 1, or 0 of a single sample."""
    return 0 if len(view.sizes) == 1 else 1


def _weight_of(builder: KernelBuilder, weight: View | None, target: Value, valid: Value, dtype: torch.dtype) -> Value:
    """The target's class weight, 0 where it is to be ignored."""
    if weight is None:
        return valid.cast(dtype)
    return builder.load(weight, (target.symbol(),), valid, 0).cast(dtype)


def _target(builder: KernelBuilder, target: View, where: tuple[object, ...], ignore: int) -> tuple[Value, Value]:
    """(class, whether it counts)."""
    found = builder.load(target, where).cast(torch.int64)
    return found, found.differs(ignore)


def _checked_class(site: CallSite, wanted: Value, valid: Value, classes: Size) -> Value:
    """The class as a position, 0 where it does not count: only targets that count must be classes."""
    return in_range(site, valid.where(wanted, 0), classes)


@lowers("aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default")
def _nll_loss_forward(site: CallSite) -> Operations | None:
    log_probabilities, target, weight = site.view("self"), site.view("target"), site.optional_view("weight")
    reduction, ignore = site.integer("reduction"), site.integer("ignore_index")
    loss, total = site.results
    if log_probabilities.dtype not in SUPPORTED or is_empty(log_probabilities):
        return None
    dim = _class_dim(log_probabilities)
    outer, row = (target.sizes, ()) if reduction == NONE else ((), target.sizes)
    builder = KernelBuilder(outer, row)
    where = builder.outer_coordinates if reduction == NONE else builder.row_coordinates
    target_class, valid = _target(builder, target, where, ignore)
    wanted = _checked_class(site, target_class, valid, log_probabilities.sizes[dim])
    point = (*where[:dim], wanted.symbol(), *where[dim:])
    value = builder.compute(builder.load(log_probabilities, point, valid, 0))
    scale = _weight_of(builder, weight, wanted, valid, value.dtype)
    negative = -(value * scale)
    if reduction == NONE:
        builder.store(site.result, where, negative)
        out: Operations = (site.kernel(builder),)
        if total is not None:
            zero = KernelBuilder(total.sizes)
            zero.store(total, zero.outer_coordinates, zero.constant(0, total.dtype))
            out = (*out, site.kernel(zero, "total"))
        return out
    summed, weights = builder.reduce("sum", negative), builder.reduce("sum", scale)
    if loss is not None:
        builder.store(loss, (), summed / weights if reduction == MEAN else summed)
    if total is not None:
        builder.store(total, (), weights)
    return (site.kernel(builder),)


@lowers("aten.nll_loss_backward.default", "aten.nll_loss2d_backward.default")
def _nll_loss_backward(site: CallSite) -> Operations | None:
    grad, self, target = site.view("grad_output"), site.view("self"), site.view("target")
    weight, total = site.optional_view("weight"), site.view("total_weight")
    reduction, ignore, result = site.integer("reduction"), site.integer("ignore_index"), site.result
    if self.dtype not in SUPPORTED:
        return None
    dim = _class_dim(self)

    def body(builder: KernelBuilder) -> Value:
        where = builder.outer_coordinates
        others = (*where[:dim], *where[dim + 1 :])
        wanted, valid = _target(builder, target, others, ignore)
        arriving = builder.compute(builder.load(grad, () if reduction != NONE else others))
        place = wanted if weight is None else _checked_class(site, wanted, valid, self.sizes[dim])
        scale = _weight_of(builder, weight, place, valid, arriving.dtype)
        if reduction == MEAN:
            arriving = arriving / builder.compute(builder.load(total, ())).cast(arriving.dtype)
        here = builder.index(where[dim]).equals(wanted).both(valid)
        return here.where(-(arriving * scale), 0)

    return pointwise_kernel(site, result, body)
