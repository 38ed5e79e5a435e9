"""What a point of a kernel costs."""

from __future__ import annotations

from memplan.ir.loops import Call, Kernel, Random, StoreMode

#: pointwise functions that take several times as long as an addition
EXPENSIVE = frozenset(
    [
        "exp",
        "exp2",
        "expm1",
        "log",
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
        "digamma",
        "sigmoid",
        "pow",
        "atan2",
        "hypot",
        "fmod",
        "floordiv",
        "mod",
        "i0",
        "i0e",
        "i1",
        "i1e",
        "ndtri",
        "log_ndtr",
        "bessel_j0",
        "bessel_j1",
    ]
)

#: those, and operations that a vector unit takes many cycles for
DEAR = EXPENSIVE | {"sqrt", "rsqrt", "div", "reciprocal", "truncdiv"}


def point_cost(kernel: Kernel) -> int:
    """What a point costs, in units of a simple operation on memory."""
    cost = 1
    for node in kernel.nodes:
        if isinstance(node, Random) or (isinstance(node, Call) and node.op in EXPENSIVE):
            cost += 4
        elif isinstance(node, Call) and node.dtype.is_floating_point and node.dtype.itemsize == 8:
            cost += 1
    return cost + sum(2 for s in kernel.stores if s.mode is not StoreMode.SET)
