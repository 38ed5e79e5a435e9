"""Reductions: sums, products, extrema, tests, arguments of extrema, moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch

from ..ir.loops import ReduceOp, Size
from ..ir.program import View
from .builder import KernelBuilder, Value, opmath
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .pointwise import is_empty
from .row_space import RowSpace, choose_split, reduce_in_two, row_space


@dataclass(frozen=True, slots=True)
class RowReduction:
    """``after(reduce(op, before(x)))``; points beyond the row's end count as ``neutral``."""

    op: ReduceOp
    neutral: bool | int | float
    before: Callable[[Value], Value] = lambda value: value
    after: Callable[[Value], Value] = lambda value: value


def numel_value(builder: KernelBuilder, count: Size, dtype: torch.dtype) -> Value:
    """A number of elements as a floating value."""
    if isinstance(count, int):
        return builder.constant(count, dtype)
    return builder.index(count).cast(dtype)


def reduced_numel(view: View, reduced: frozenset[int]) -> Size:
    out: Size = 1
    for d in reduced:
        out = out * view.sizes[d]
    return out


def reduction_kernel(site: CallSite, source: View, dims: Sequence[int], reduction: RowReduction) -> Operations | None:
    """One result of a reduction with one operand."""
    result, reduced = site.result, frozenset(dims) & frozenset(range(len(source.sizes)))
    if source.dtype not in SUPPORTED or result.dtype not in SUPPORTED:
        return None
    if is_empty(result):
        return ()

    def reduce(space: RowSpace) -> Value:
        value = reduction.before(space.load(source))
        if space.inside is not None:
            value = space.inside.where(value, value.constant(reduction.neutral))
        return space.builder.reduce(reduction.op, value)

    split = choose_split(site, source, reduced)
    if split is not None:
        return reduce_in_two(
            site,
            source,
            reduced,
            split,
            lambda space: (reduce(space),),
            lambda builder, partial: [(result, reduction.after(builder.reduce(reduction.op, partial[0])))],
        )
    space = row_space(source.sizes, reduced)
    value = reduction.after(reduce(space))
    space.builder.store(result, space.result_coordinates(result, len(source.sizes), reduced), value)
    return (site.kernel(space.builder),)


def _dims(site: CallSite, name: str = "dim") -> tuple[int, ...]:
    return site.dims(name, len(site.view("self").sizes))


def accumulated_in(dtype: torch.dtype) -> Callable[[Value], Value]:
    """Elements are converted to ``dtype`` first, then accumulated in what it computes in."""

    def before(value: Value) -> Value:
        if dtype is torch.bool:
            return value.cast(torch.bool)
        return value.cast(opmath(dtype))

    return before


@lowers("aten.sum.default", "aten.sum.dim_IntList", "prims.sum.default")
def _sum(site: CallSite) -> Operations | None:
    name = "self" if "self" in site else "inp"
    source = site.view(name)
    dims = site.dims("dim" if name == "self" else "dims", len(source.sizes))
    reduction = RowReduction("sum", 0, accumulated_in(site.result.dtype))
    return reduction_kernel(site, source, dims, reduction)


@lowers("aten.mean.default", "aten.mean.dim")
def _mean(site: CallSite) -> Operations | None:
    source, dims = site.view("self"), _dims(site)
    count = reduced_numel(source, frozenset(dims) if source.sizes else frozenset())

    def divided(value: Value) -> Value:
        return value / numel_value(value.builder, count, value.dtype)

    return reduction_kernel(site, source, dims, RowReduction("sum", 0, accumulated_in(site.result.dtype), divided))


@lowers("aten.prod.default", "aten.prod.dim_int")
def _prod(site: CallSite) -> Operations | None:
    return reduction_kernel(
        site, site.view("self"), _dims(site), RowReduction("prod", 1, accumulated_in(site.result.dtype))
    )


@lowers("aten.nansum.default")
def _nansum(site: CallSite) -> Operations | None:
    convert = accumulated_in(site.result.dtype)

    def before(value: Value) -> Value:
        value = convert(value)
        return value.call("isnan").where(0, value) if value.dtype.is_floating_point else value

    return reduction_kernel(site, site.view("self"), _dims(site), RowReduction("sum", 0, before))


def extremum(op: ReduceOp, dtype: torch.dtype) -> RowReduction:
    """Maximum or minimum; of booleans it is any or all."""
    largest = op == "max"
    if dtype is torch.bool:
        return RowReduction("any" if largest else "all", not largest)
    if dtype.is_floating_point:
        return RowReduction(op, -math.inf if largest else math.inf)
    limits = torch.iinfo(dtype)
    return RowReduction(op, limits.min if largest else limits.max)


@lowers("aten.amax.default", "aten.max.default", "prims.amax.default")
def _amax(site: CallSite) -> Operations | None:
    return _extremum(site, "max")


@lowers("aten.amin.default", "aten.min.default", "prims.amin.default")
def _amin(site: CallSite) -> Operations | None:
    return _extremum(site, "min")


def _extremum(site: CallSite, op: ReduceOp) -> Operations | None:
    name = "self" if "self" in site else "inp"
    source = site.view(name)
    dims = site.dims("dim" if name == "self" else "dims", len(source.sizes))
    if any(source.sizes[d] == 0 for d in dims if source.sizes):
        return None  # eager says what is wrong
    return reduction_kernel(site, source, dims, extremum(op, source.dtype))


def _truth(value: Value) -> Value:
    return value if value.dtype is torch.bool else value.differs(0)


@lowers("aten.any.default", "aten.any.dim", "aten.any.dims")
def _any(site: CallSite) -> Operations | None:
    return reduction_kernel(site, site.view("self"), _dims(site), RowReduction("any", False, _truth))


@lowers("aten.all.default", "aten.all.dim", "aten.all.dims")
def _all(site: CallSite) -> Operations | None:
    return reduction_kernel(site, site.view("self"), _dims(site), RowReduction("all", True, _truth))


# -- arguments of extrema -----------------------------------------------------------------------------------------


def row_position(space: RowSpace, sizes: Sequence[Size], dims: Sequence[int]) -> Value:
    """The row-major position of the current point among the reduced dimensions."""
    position, stride = sympy.Integer(0), sympy.Integer(1)
    for d in reversed(dims):
        position += space.point[d] * stride
        stride *= sizes[d]
    return space.builder.index(position)


def argument_kernel(
    site: CallSite, dims: Sequence[int], op: ReduceOp, values: View | None, indices: View | None
) -> Operations | None:
    """The extremum and its first position along the row; either may be unused."""
    source, arg = site.view("self"), "argmax" if op == "max" else "argmin"
    reduced = frozenset(dims) & frozenset(range(len(source.sizes)))
    if source.dtype not in SUPPORTED or any(source.sizes[d] == 0 for d in reduced):
        return None
    results = [v for v in (values, indices) if v is not None]
    if any(is_empty(v) for v in results):
        return ()
    best = extremum(op, source.dtype)

    def comparable(value: Value) -> Value:
        return value.cast(torch.int32) if value.dtype is torch.bool else value

    def first(space: RowSpace) -> tuple[Value, ...]:
        value = space.load(source)
        position = row_position(space, source.sizes, dims if source.sizes else ())
        index = space.builder.reduce(arg, comparable(value), position)  # type: ignore[arg-type]
        return space.builder.reduce(best.op, value), index

    def second(builder: KernelBuilder, partial: tuple[Value, ...]) -> list[tuple[View, Value]]:
        value, index = partial
        out: list[tuple[View, Value]] = []
        if values is not None:
            out.append((values, builder.reduce(best.op, value)))
        if indices is not None:
            out.append((indices, builder.reduce(arg, comparable(value), index)))  # type: ignore[arg-type]
        return out

    split = choose_split(site, source, reduced, exact_only=True, after_fusion=False)
    if split is not None:
        return reduce_in_two(site, source, reduced, split, first, second)
    space = row_space(source.sizes, reduced)
    value, index = first(space)
    for view, what in ((values, value), (indices, index)):
        if view is not None:
            space.builder.store(view, space.result_coordinates(view, len(source.sizes), reduced), what)
    return (site.kernel(space.builder),)


@lowers("aten.argmax.default", "aten.argmin.default")
def _argument(site: CallSite) -> Operations | None:
    op: ReduceOp = "max" if "argmax" in site.op.target else "min"
    return argument_kernel(site, _dims(site), op, None, site.result)


@lowers("aten.max.dim", "aten.min.dim")
def _extremum_with_indices(site: CallSite) -> Operations | None:
    op: ReduceOp = "max" if ".max." in site.op.target else "min"
    return argument_kernel(site, _dims(site), op, site.results[0], site.results[1])


@lowers("aten.aminmax.default")
def _aminmax(site: CallSite) -> Operations | None:
    source = site.view("self")
    dims = frozenset(_dims(site)) if source.sizes else frozenset()
    if source.dtype not in SUPPORTED or any(s == 0 for s in source.sizes):
        return None
    space = row_space(source.sizes, dims)
    value = space.load(source)
    for view, op in zip(site.results, ("min", "max"), strict=True):
        if view is not None:
            reduced = space.builder.reduce(extremum(op, source.dtype).op, value)  # type: ignore[arg-type]
            space.builder.store(view, space.result_coordinates(view, len(source.sizes), dims), reduced)
    return (site.kernel(space.builder),)


# -- moments ------------------------------------------------------------------------------------------------------


def moments_kernel(
    site: CallSite,
    source: View,
    dims: Sequence[int],
    correction: float,
    variance: View | None,
    mean: View | None,
    root: bool,
) -> Operations | None:
    """Variance (or its root) and mean by Welford's recurrence; two kernels combine where the row is split."""
    reduced = frozenset(dims) & frozenset(range(len(source.sizes)))
    if source.dtype not in SUPPORTED:
        return None
    results = [v for v in (variance, mean) if v is not None]
    if any(is_empty(v) for v in results):
        return ()
    count = reduced_numel(source, reduced)

    def finish(moments: tuple[Value, Value, Value]) -> list[tuple[View, Value]]:
        average, m2, _ = moments
        out: list[tuple[View, Value]] = []
        if variance is not None:
            free = (numel_value(m2.builder, count, m2.dtype) - correction).call("maximum", 0)
            if isinstance(count, int):
                free = m2.constant(max(count - correction, 0.0))
            value = m2 / free
            out.append((variance, value.call("sqrt") if root else value))
        if mean is not None:
            out.append((mean, average))
        return out

    split = choose_split(site, source, reduced, exact_only=True)
    if split is not None:
        part = reduced_numel(source, reduced - {split.dim}) * split.length

        def second(builder: KernelBuilder, partial: tuple[Value, ...]) -> list[tuple[View, Value]]:
            weight = numel_value(builder, part, partial[0].dtype)
            return finish(builder.welford("welford_combine", partial[0], partial[1], weight))

        return reduce_in_two(
            site, source, reduced, split, lambda space: space.builder.welford("welford", space.load(source))[:2], second
        )
    space = row_space(source.sizes, reduced)
    for view, value in finish(space.builder.welford("welford", space.load(source))):
        space.builder.store(view, space.result_coordinates(view, len(source.sizes), reduced), value)
    return (site.kernel(space.builder),)


def _correction(site: CallSite) -> float:
    if "correction" in site:
        return 1.0 if site["correction"] is None else site.real("correction")
    return 1.0 if site.flag("unbiased") else 0.0


@lowers(
    "aten.var.default", "aten.var.dim", "aten.var.correction",
    "aten.std.default", "aten.std.dim", "aten.std.correction",
)  # fmt: skip
def _var(site: CallSite) -> Operations | None:
    root = ".std." in site.op.target
    return moments_kernel(site, site.view("self"), _dims(site), _correction(site), site.result, None, root)


@lowers("prims.var.default")
def _prims_var(site: CallSite) -> Operations | None:
    source = site.view("inp")
    dims = site.dims("dims", len(source.sizes))
    return moments_kernel(site, source, dims, _correction(site), site.result, None, False)


@lowers(
    "aten.var_mean.default", "aten.var_mean.dim", "aten.var_mean.correction",
    "aten.std_mean.default", "aten.std_mean.dim", "aten.std_mean.correction",
)  # fmt: skip
def _var_mean(site: CallSite) -> Operations | None:
    root = ".std_mean." in site.op.target
    variance, mean = site.results
    return moments_kernel(site, site.view("self"), _dims(site), _correction(site), variance, mean, root)
