"""Moving a buffer's contents into a region of another buffer: every access is rewritten to the new place.

A copy says where each element of the one buffer lies in the other. Where that copy is taken away, all that used the
first buffer uses the region instead: views get the region's strides and offset, index expressions are solved for the
copy's loop variables and put into the region's index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy

from ..ir.in_flight import InFlight
from ..ir.index import FloorDiv, Mod, Ranges, expand, flat_index, ranges_of, simplify, stride_of
from ..ir.index_inversion import invert
from ..ir.loops import Cast, Kernel, Load, Size, Store, StoreMode, value_references
from ..ir.program import (
    Argument,
    Copy,
    Extern,
    KernelOp,
    Operation,
    Tuple,
    UserArgument,
    UserKernel,
    View,
    argument_views,
)


@dataclass(frozen=True)
class CopyForm:
    """``target[write(x)] = source[read(x)]`` for all ``x`` of ``space``: equal dtypes, each element once."""

    name: str
    source: str
    target: str
    space: Ranges
    read: sympy.Expr
    write: sympy.Expr
    itemsize: int

    @property
    def count(self) -> sympy.Expr:
        """Number of elements."""
        out: sympy.Expr = sympy.Integer(1)
        for _, size in self.space:
            out = out * size
        return expand(out)


def copy_form(op: Operation, dtypes: dict[str, object]) -> CopyForm | None:
    """The operation as a plain copy of elements, or None if it is none.

    Parameters
    ----------
    dtypes:
        The dtype of every buffer; a copy that converts is not plain.
    """
    match op:
        case Copy():
            return _between(op.name, op.source, op.target, dtypes)
        case Extern(target="aten.clone.default"):
            source, result = op.args[0], op.results[0]
            if isinstance(source, View) and result is not None and not op.mutates:
                return _between(op.name, source, result, dtypes)
        case KernelOp():
            return _kernel_copy(op, dtypes)
        case _:
            pass
    return None


def _between(name: str, source: View, target: View, dtypes: dict[str, object]) -> CopyForm | None:
    if source.sizes != target.sizes or source.buffer == target.buffer:
        return None
    if not source.dtype == target.dtype == dtypes[source.buffer] == dtypes[target.buffer]:
        return None
    symbols = _dimensions(len(target.sizes))
    space = tuple(zip(symbols, target.sizes, strict=True))
    read = flat_index(symbols, source.strides, source.offset)
    write = flat_index(symbols, target.strides, target.offset)
    if any(n != 1 and not stride for n, stride in zip(source.sizes, source.strides, strict=True)):
        return None
    return CopyForm(name, source.buffer, target.buffer, space, read, write, source.dtype.itemsize)


def _kernel_copy(op: KernelOp, dtypes: dict[str, object]) -> CopyForm | None:
    kernel = op.kernel
    if kernel.row or len(kernel.stores) != 1 or len(kernel.loads) != 1:
        return None
    store, load = kernel.stores[0], kernel.loads[0]
    if not all(isinstance(n, Load) or (isinstance(n, Cast) and n.dtype is load.dtype) for n in kernel.nodes):
        return None
    if store.mode is not StoreMode.SET or store.mask is not None or load.mask is not None:
        return None
    if value_references(store.index) or value_references(load.index) or load.buffer == store.buffer:
        return None
    if not load.dtype == store.dtype == dtypes[load.buffer] == dtypes[store.buffer]:
        return None
    space = ranges_of(kernel.outer)
    wide = {s for s, n in space if n != 1}
    if not wide <= load.index.free_symbols or not wide <= store.index.free_symbols:
        return None
    return CopyForm(op.name, load.buffer, store.buffer, space, load.index, store.index, load.dtype.itemsize)


def _dimensions(count: int) -> list[sympy.Symbol]:
    return [sympy.Symbol(f"d{k}", integer=True, nonnegative=True) for k in range(count)]


@dataclass(frozen=True)
class Relocation:
    """Element ``old(x)`` of buffer ``source`` becomes element ``new(x)`` of buffer ``target``, ``x`` over ``space``.

    Elements have ``itemsize`` bytes in both.
    """

    source: str
    target: str
    space: Ranges
    old: sympy.Expr
    new: sympy.Expr
    itemsize: int

    @property
    def shift(self) -> sympy.Expr | None:
        """The constant distance of new from old places, where there is one."""
        found = expand(self.new - self.old)
        return None if found.free_symbols & {s for s, _ in self.space} else found

    def index(self, index: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
        """Where the element at ``index`` has gone; None where that has no simple expression."""
        shift = self.shift
        if shift is not None:
            return expand(index + shift)
        if value_references(index):
            return None
        same = self._same_dimensions(index, ranges)
        if same is not None:
            return same
        fresh = {s: sympy.Symbol(f"m{k}", integer=True, nonnegative=True) for k, (s, _) in enumerate(self.space)}
        space = tuple((fresh[s], n) for s, n in self.space)
        solved = invert(self.old.xreplace(fresh), space, index, ranges)
        if solved is None:
            return None
        out = simplify(expand(self.new.xreplace(fresh).xreplace(solved)), ranges)
        return None if _divisions(out) > _divisions(index) else out

    def _same_dimensions(self, index: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
        """The new place of an index that runs along dimensions of the space, stride by stride.

        Finding any point of the space with this index is enough: no two points share an element.
        """
        sizes = dict(ranges)
        left = {s: (stride_of(self.old, s), n) for s, n in self.space}
        rest = expand(index - self.old.xreplace({s: sympy.Integer(0) for s in left}))
        solved: dict[sympy.Symbol, sympy.Expr] = {s: sympy.Integer(0) for s in left}
        for term in sympy.Add.make_args(rest):
            stride, symbol = term.as_independent(*sizes)
            if term == 0:
                continue
            if symbol not in sizes:
                return None
            fits = [
                s for s, (c, n) in left.items() if c == stride and (n == sizes[symbol] or _smaller(sizes[symbol], n))
            ]
            if not fits:
                return None
            solved[fits[0]] = symbol
            del left[fits[0]]
        return expand(self.new.xreplace(solved)) if not self.old.has(FloorDiv, Mod) else None

    def view(self, view: View) -> View | None:
        """The view of the region that shows what ``view`` showed."""
        if view.dtype.itemsize != self.itemsize:
            return None
        symbols = _dimensions(len(view.sizes))
        ranges = tuple(zip(symbols, view.sizes, strict=True))
        moved = self.index(flat_index(symbols, view.strides, view.offset), ranges)
        if moved is None or moved.has(FloorDiv, Mod):
            return None
        strides: list[Size] = []
        rest = moved
        for symbol, size, old in zip(symbols, view.sizes, view.strides, strict=True):
            stride = stride_of(moved, symbol) if size != 1 else sympy.sympify(old)
            if stride.free_symbols & set(symbols):
                return None
            strides.append(_size(stride))
            rest = rest - stride_of(moved, symbol) * symbol
        rest = expand(rest)
        if rest.free_symbols & set(symbols):
            return None
        return replace(view, buffer=self.target, strides=tuple(strides), offset=_size(rest))

    def operation(self, op: Operation) -> Operation | None:
        """The operation with every access moved; what it changed of the source it now changes in the target."""
        mutates = tuple(dict.fromkeys(self.target if b == self.source else b for b in op.mutates))
        match op:
            case KernelOp():
                kernel = self.kernel(op.kernel)
                return None if kernel is None else replace(op, kernel=kernel, mutates=mutates)
            case Copy():
                source, target = self._maybe(op.source), self._maybe(op.target)
                if source is None or target is None:
                    return None
                return replace(op, source=source, target=target, mutates=mutates)
            case Extern():
                args = self._arguments(op.args)
                values = self._arguments(tuple(a for _, a in op.kwargs))
                results = tuple(v if v is None else self._maybe(v) for v in op.results)
                lost = any(r is None and v is not None for r, v in zip(results, op.results, strict=True))
                if args is None or values is None or lost:
                    return None
                if isinstance(op, InFlight) and not self._keeps_strides(op):
                    return None  # libraries take contiguous tensors
                kwargs = tuple((k, v) for (k, _), v in zip(op.kwargs, values, strict=True))
                return replace(op, args=args, kwargs=kwargs, results=results, mutates=mutates)
            case UserKernel():
                moved = self._user_arguments(op.arguments)
                return None if moved is None else replace(op, arguments=moved, mutates=mutates)

    def kernel(self, kernel: Kernel) -> Kernel | None:
        """The kernel with its loads and stores moved."""
        ranges = ranges_of((*kernel.outer, *kernel.row))
        nodes = []
        for node in kernel.nodes:
            if isinstance(node, Load) and node.buffer == self.source:
                index = self.index(node.index, ranges)
                if index is None:
                    return None
                node = replace(node, buffer=self.target, index=index)
            nodes.append(node)
        stores: list[Store] = []
        for store in kernel.stores:
            if store.buffer == self.source:
                index = self.index(store.index, ranges)
                if index is None:
                    return None
                store = replace(store, buffer=self.target, index=index)
            stores.append(store)
        return Kernel(kernel.outer, kernel.row, tuple(nodes), tuple(stores))

    def _keeps_strides(self, op: Extern) -> bool:
        views = [*argument_views((*op.args, *(a for _, a in op.kwargs))), *(v for v in op.results if v is not None)]
        moved = [(v, self.view(v)) for v in views if v.buffer == self.source]
        return all(new is not None and new.strides == old.strides for old, new in moved)

    def _maybe(self, view: View) -> View | None:
        return self.view(view) if view.buffer == self.source else view

    def _user_arguments(
        self, arguments: tuple[tuple[str, UserArgument], ...]
    ) -> tuple[tuple[str, UserArgument], ...] | None:
        """None if a stride would change: the kernel was told the old one."""
        out: list[tuple[str, UserArgument]] = []
        for name, value in arguments:
            if isinstance(value, View) and value.buffer == self.source:
                moved = self.view(value)
                if moved is None or moved.strides != value.strides:
                    return None
                out.append((name, moved))
            else:
                out.append((name, value))
        return tuple(out)

    def _arguments(self, args: tuple[Argument, ...]) -> tuple[Argument, ...] | None:
        out: list[Argument] = []
        for a in args:
            moved: Argument | None = a
            if isinstance(a, View):
                moved = self._maybe(a)
            elif isinstance(a, Tuple):
                items = self._arguments(a.items)
                moved = None if items is None else Tuple(items)
            if moved is None:
                return None
            out.append(moved)
        return tuple(out)


def relocation_of_source(copy: CopyForm) -> Relocation:
    """What the copy reads moves to where the copy would write it (a part of a concatenation)."""
    return Relocation(copy.source, copy.target, copy.space, copy.read, copy.write, copy.itemsize)


def relocation_of_target(copy: CopyForm) -> Relocation:
    """What the copy writes stays where it was (a clone that is not made)."""
    return Relocation(copy.target, copy.source, copy.space, copy.write, copy.read, copy.itemsize)


def touched_buffers(op: Operation) -> Iterator[str]:
    """Every buffer that the operation names."""
    yield from dict.fromkeys((*op.reads, *op.writes, *op.mutates, *_result_buffers(op)))


def _result_buffers(op: Operation) -> tuple[str, ...]:
    return tuple(v.buffer for v in op.results if v is not None) if isinstance(op, Extern) else ()


def _smaller(a: Size, b: Size) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a <= b


def _divisions(expr: sympy.Expr) -> int:
    return sum(isinstance(x, (FloorDiv, Mod)) for x in sympy.preorder_traversal(expr))


def _size(expr: sympy.Expr) -> Size:
    return int(expr) if expr.is_Integer else expr
