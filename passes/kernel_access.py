"""Whether a kernel may write one buffer over the bytes of another that it reads: what can be said of the data alone.

Conservative: a kernel is safe only if every iteration reads exactly the element that it writes, or if whole rows are
read before they are written and rows do not meet. An emitter may know more (or less) about its own code and has the
last word where it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import sympy

from ..ir.index import bounds, expand, is_nonnegative, ranges_of, simplify, stride_of
from ..ir.loops import Kernel, Level, Load, Reduce, Store, StoreMode, operands, value_references
from ..ir.program import (
    EXTERNAL_KINDS,
    Buffer,
    Copy,
    Extern,
    KernelOp,
    Operation,
    UserKernel,
    View,
    argument_views,
)

#: ATen operators that walk all operands with one iterator: `out=` on an operand of the same layout is in place.
ELEMENTWISE = frozenset(
    {
        *("abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "square", "reciprocal"),
        *("sin", "cos", "tan", "tanh", "sigmoid", "erf", "erfc", "floor", "ceil", "round", "trunc", "sign", "relu"),
        *("add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "pow", "atan2", "hypot", "remainder"),
        *("clamp", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "where", "silu", "gelu", "leaky_relu"),
        *("hardtanh", "hardswish", "hardsigmoid", "elu", "softplus", "bitwise_and", "bitwise_or", "bitwise_xor"),
    }
)


def spoiled_by_error(kernel: Kernel, device: str, buffers: Mapping[str, Buffer]) -> frozenset[str]:
    """What is the caller's and holds made-up numbers once the kernel has met an index out of range.

    A CPU's kernel goes on with another index and raises at its end; after a GPU's assertion nothing can be read.
    """
    if device != "cpu" or not kernel.checks_indices:
        return frozenset()
    return frozenset(b for b in kernel.written_buffers if buffers[b].kind in EXTERNAL_KINDS and not buffers[b].donated)


def may_take(op: Operation, old: str, new: str) -> str:
    """Why ``op`` may not write ``new`` over ``old``, which it reads for the last time; "" if it may.

    For kernels this is what the data says; the emitter is asked besides.
    """
    if old in op.mutates:
        return "it changes the old value as well"
    match op:
        case KernelOp():
            return kernel_reason(op.kernel, old, new)
        case Copy():
            return "" if same_layout(op.source, op.target) else "the copy changes the layout"
        case Extern():
            return extern_reason(op, old, new)
        case UserKernel():
            return "nobody knows in which order a user's kernel reads and writes"


def extern_reason(op: Extern, old: str, new: str) -> str:
    """Why an ATen call may not write its result over an argument."""
    if op.target in ACCUMULATING:
        return accumulation_reason(op, old, new)
    namespace, _, rest = op.target.partition(".")
    if namespace != "aten" or rest.partition(".")[0] not in ELEMENTWISE:
        return f"{op.target} is not known to work element by element"
    results = [v for v in op.results if v is not None and v.buffer == new]
    keywords = tuple(a for _, a in op.kwargs)
    arguments = [v for v in argument_views((*op.args, *keywords)) if v.buffer == old]
    if not all(same_layout(a, r) for a in arguments for r in results):
        return "it reads another layout than it writes"
    return ""


#: ``beta * first + a @ b``: BLAS reads each element of the first argument where it writes the result
ACCUMULATING = frozenset({"aten.addmm.out", "aten.addmm.dtype_out", "aten.baddbmm.out"})


def accumulation_reason(op: Extern, old: str, new: str) -> str:
    """Why a product that is added to ``old`` may not be added in place."""
    first, *factors = op.args
    if not isinstance(first, View) or first.buffer != old:
        return "it is read as a factor"
    if any(v.buffer == old for v in argument_views(tuple(factors))):
        return "it is read as a factor, too"
    results = [v for v in op.results if v is not None and v.buffer == new]
    return "" if all(same_layout(first, r) for r in results) else "it reads another layout than it writes"


def same_layout(a: View, b: View) -> bool:
    """Equal sizes, strides, offset and item size: the same bytes in the same order."""
    return (
        a.sizes == b.sizes and a.strides == b.strides and a.offset == b.offset and a.dtype.itemsize == b.dtype.itemsize
    )


def kernel_safe(op: KernelOp, old: str, new: str) -> bool:
    """Whether the kernel may write ``new`` over ``old``, by its data alone."""
    return not kernel_reason(op.kernel, old, new)


def kernel_reason(kernel: Kernel, old: str, new: str) -> str:
    """Why a kernel may not write ``new`` over ``old``; "" if it may."""
    number = {name: f"b{k}" for k, name in enumerate(kernel.buffers)}
    return _kernel_reason(kernel.anonymous, number.get(old, ""), number.get(new, ""))


@lru_cache(maxsize=1 << 14)
def _kernel_reason(kernel: Kernel, old: str, new: str) -> str:
    """`kernel_reason` for all kernels that are equal but for their buffers' names."""
    stores = [s for s in kernel.stores if s.buffer == new]
    if len(stores) != 1:
        return f"it stores {len(stores)} times"
    store = stores[0]
    if store.mode is not StoreMode.SET or store.mask is not None or value_references(store.index):
        return "its store is atomic, masked or at a computed index"
    timing = _Timing(kernel)
    ranges = ranges_of((*kernel.outer, *kernel.row))
    target = simplify(store.index, ranges)
    for k, node in enumerate(kernel.nodes):
        if not isinstance(node, Load) or node.buffer != old:
            continue
        if node.dtype.itemsize != store.dtype.itemsize:
            return "element sizes differ"
        if value_references(node.index):
            return "it is read at a computed index"
        source = simplify(node.index, ranges)
        if source == target and timing.read_by_store(k, store) and _distinct(kernel, store, target):
            continue
        if timing.read_before_store(k, store) and _row_alone(kernel, source, target):
            continue
        return "a point reads what another writes" if source != target else "it is read again after it is written"
    return ""


class _Timing:
    """In which pass over the row each value is needed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ready: list[int] = []
        for node in kernel.nodes:
            latest = max((self.ready[k] for k in operands(node)), default=0)
            self.ready.append(latest + isinstance(node, Reduce))

        #: for each pass the point values that it computes whatever stores are moved: for its reductions, and in the
        #: last one for the stores that have to be there
        self.computed: list[frozenset[int]] = []
        stores = [s for s in kernel.stores if kernel.store_level(s) is Level.POINT]
        passes = [*(self.first_pass_of(s) for s in stores), *(self.ready[k] - 1 for k in kernel.reductions)]
        last = max(passes, default=0)
        for number in range(last + 1):
            made = [kernel.nodes[k] for k in kernel.reductions if self.ready[k] == number + 1]
            roots = [o for node in made for o in operands(node)]
            if number == last:
                roots += [k for s in stores if self.first_pass_of(s) == last for k in _values(s)]
            self.computed.append(self.at_points(roots))

    def at_points(self, roots: Sequence[int]) -> frozenset[int]:
        """The values along the row that are computed for these."""
        seen: set[int] = set()
        todo = list(roots)
        while todo:
            k = todo.pop()
            if k not in seen and self.kernel.levels[k] is Level.POINT:
                seen.add(k)
                todo += operands(self.kernel.nodes[k])
        return frozenset(seen)

    def first_pass_of(self, store: Store) -> int:
        """The first pass that has the values of the store."""
        return max(self.ready[k] for k in _values(store))

    def pass_of(self, store: Store) -> int:
        """The pass that makes the store: the last that computes its values anyway (`memplan.ir.loops`)."""
        first = self.first_pass_of(store)
        if not self.kernel.row or self.kernel.store_level(store) is not Level.POINT:
            return first
        needed = self.at_points(_values(store))
        return max((p for p, found in enumerate(self.computed) if p > first and needed <= found), default=first)

    def last_use(self, load: int) -> int:
        """The last pass in which the load, or what is computed from it without a reduction, is used."""
        depends = {load}
        last = 0
        for k in range(load + 1, len(self.kernel.nodes)):
            node = self.kernel.nodes[k]
            if depends.isdisjoint(operands(node)):
                continue
            if isinstance(node, Reduce):
                last = max(last, self.ready[k] - 1)
            else:
                depends.add(k)
        for store in self.kernel.stores:
            if not depends.isdisjoint(_values(store)):
                # a store that is made later reads nothing for it that is not read there anyway
                last = max(last, self.first_pass_of(store))
        return last

    def read_by_store(self, load: int, store: Store) -> bool:
        """Used at the latest in the store's own pass, by the same point."""
        if not self.kernel.row:
            return True
        if self.kernel.levels[load] is not Level.POINT:
            # every thread of a row reads such an element, one of them writes it: only a pass in between parts them
            return self.read_before_store(load, store)
        return self.kernel.store_level(store) is Level.POINT and self.last_use(load) <= self.pass_of(store)

    def read_before_store(self, load: int, store: Store) -> bool:
        return self.last_use(load) < self.pass_of(store)


def _values(store: Store) -> Sequence[int]:
    return (store.value, *value_references(store.index), *(() if store.mask is None else (store.mask,)))


def _distinct(kernel: Kernel, store: Store, index: sympy.Expr) -> bool:
    """Every iteration of the store has its own element."""
    point = kernel.store_level(store) is Level.POINT
    sizes = {r.symbol: r.size for r in (*kernel.outer, *(kernel.row if point else ()))}
    return all(s in index.free_symbols for s, n in sizes.items() if n != 1)


def _row_alone(kernel: Kernel, source: sympy.Expr, target: sympy.Expr) -> bool:
    """Both indices stay within the same stretch of memory, which no other row touches.

    Shown for one outer range of stride at least the row's whole extent (rows of a matrix), and the like of several
    outer ranges laid out row-major.
    """
    if not kernel.row:
        return False
    row = {r.symbol for r in kernel.row}
    ranges = ranges_of(kernel.row)
    highest: list[sympy.Expr] = []
    starts: set[sympy.Expr] = set()
    for index in (source, target):
        terms = sympy.Add.make_args(index)
        outside = sympy.Add(*[t for t in terms if t.free_symbols and not t.free_symbols & row])
        found = bounds(expand(index - outside), ranges)
        if found is None or not is_nonnegative(found[0]):
            return False
        starts.add(outside)
        highest.append(found[1])
    if len(starts) != 1:
        return False
    start = starts.pop()
    extents = [h + 1 for h in highest]
    wide = [r for r in kernel.outer if r.size != 1]
    strides = {r.symbol: stride_of(start, r.symbol) for r in wide}
    if expand(start - sympy.Add(*[s * c for s, c in strides.items()])) != 0:
        return False
    if any(not c.is_Integer or c <= 0 for c in strides.values()):
        return False
    for r in sorted(wide, key=lambda r: int(strides[r.symbol])):
        stride = strides[r.symbol]
        if not all(is_nonnegative(expand(stride - e)) for e in extents):
            return False
        extents = [expand(stride * (r.size - 1) + e) for e in extents]
    return True
