"""Which bytes accesses touch: whether two of them overlap, and whether a kernel may write where it reads.

Used by the verifiers alone; passes decide by code of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy

from .index import Ranges, expand, flat_index, ranges_of, simplify
from .loops import Kernel, Level, Load, Reduce, Size, Store, StoreMode, operands, outer_symbol, value_references
from .program import Extern, View, argument_views
from .verify_kernel import evaluate_index, interval

_POINTWISE = (
    "abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil"
    " clamp clamp_max clamp_min copysign cos cosh digamma div elu erf erfc erfinv exp exp2 expm1 fill floor"
    " floor_divide fmax fmin fmod frac gelu hardsigmoid hardswish hardtanh hypot leaky_relu lerp lgamma log log10 log1p"
    " log2 logit masked_fill maximum minimum mish mul nan_to_num neg pow reciprocal relu remainder round rsqrt sgn"
    " sigmoid sign silu sin sinc sinh softplus sqrt square sub tan tanh threshold trunc where xlogy zero"
)
#: ATen calls that read and write element by element (one iterator over all operands): output over input is safe.
POINTWISE_EXTERNS = frozenset(_POINTWISE.split())
_ENUMERATED_ELEMENTS = 4096


@dataclass(frozen=True)
class Region:
    """Bytes that an access touches: ``index`` (in elements of ``width`` bytes) over ``sizes``."""

    index: sympy.Expr
    sizes: Mapping[sympy.Symbol, int]
    width: int
    hints: Mapping[sympy.Symbol, int]

    @cached_property
    def terms(self) -> list[tuple[int, int, int]] | None:
        """Found once, though the region is compared with every other part of a buffer."""
        return _terms(self)


def view_region(view: View, hints: Mapping[sympy.Symbol, int]) -> Region:
    symbols = [outer_symbol(k) for k in range(len(view.sizes))]
    sizes = {s: evaluate_index(n, hints) for s, n in zip(symbols, view.sizes, strict=True)}
    return Region(flat_index(symbols, view.strides, view.offset), sizes, view.dtype.itemsize, hints)


def store_region(kernel: Kernel, store: Store, hints: Mapping[sympy.Symbol, int]) -> Region | None:
    """None where the index is computed from data, or the store masked."""
    if value_references(store.index) or store.mask is not None:
        return None
    sizes = {r.symbol: evaluate_index(r.size, hints) for r in (*kernel.outer, *kernel.row)}
    return Region(store.index, sizes, store.dtype.itemsize, hints)


def regions_disjoint(a: Region, b: Region) -> bool | None:
    """True or False where it is certain; None where neither is shown.

    Two strided regions are disjoint if their byte intervals are, or their intervals modulo some stride are (slices of
    an inner dimension of one result).
    """
    if not all(a.sizes.values()) or not all(b.sizes.values()):
        return True
    first, second = a.terms, b.terms
    if first is None or second is None:
        return None
    moduli = sorted({abs(c) for c, _, _ in (*first, *second) if abs(c) > 1})
    for modulus in (0, *moduli):
        p, q = _residues(first, modulus, a.width), _residues(second, modulus, b.width)
        if p is not None and q is not None and (p[1] < q[0] or q[1] < p[0]):
            return True
    touched = [_enumerate(r) for r in (a, b)]
    if touched[0] is None or touched[1] is None:
        return None
    return not touched[0] & touched[1]


def _terms(region: Region) -> list[tuple[int, int, int]] | None:
    """(a divisor of the term's value, least, greatest) per additive term, in bytes."""
    out, hints = [], region.hints
    for term in sympy.Add.make_args(expand(sympy.sympify(region.index))):
        found = interval(term, region.sizes, hints)
        if found is None:
            return None
        outside = [f for f in sympy.Mul.make_args(term) if not f.free_symbols & set(region.sizes)]
        divisor = evaluate_index(sympy.Mul(*outside), hints) if outside else 1
        out.append((divisor * region.width, found[0] * region.width, found[1] * region.width))
    return out


def _residues(terms: Sequence[tuple[int, int, int]], modulus: int, width: int) -> tuple[int, int] | None:
    """Inclusive interval of touched bytes modulo ``modulus`` (0: no modulus), or None where it wraps."""
    kept = [t for t in terms if not modulus or t[0] % modulus]
    low, high = sum(t[1] for t in kept), sum(t[2] for t in kept) + width - 1
    if modulus:
        shift = low // modulus * modulus
        low, high = low - shift, high - shift
        if high >= modulus:
            return None
    return low, high


def _enumerate(region: Region) -> set[int] | None:
    points = 1
    for n in region.sizes.values():
        points *= n
    if points > _ENUMERATED_ELEMENTS:
        return None
    found: set[int] = set()
    for values in itertools.product(*[range(n) for n in region.sizes.values()]):
        point = {**region.hints, **dict(zip(region.sizes, values, strict=True))}
        start = evaluate_index(region.index, point) * region.width
        found.update(range(start, start + region.width))
    return found


def in_place_hazard(kernel: Kernel, old: str, new: str) -> str:
    """Why writing ``new`` over the bytes of ``old`` inside this kernel may change what it still reads; "" if it cannot.

    Safe where each element is read by the very point that writes it, and by no later pass over the row; or where a
    row is read in earlier passes than the one that writes it, and no other row touches its bytes.
    """
    ranges = ranges_of((*kernel.outer, *kernel.row))
    passes = row_passes(kernel)
    stores = [s for s in kernel.stores if s.buffer == new]
    for store in stores:
        if store.mode is not StoreMode.SET:
            return f"the store to {new!r} is atomic ({store.mode.value})"
        if value_references(store.index):
            return f"the store to {new!r} goes to a computed index"
    for position, load in enumerate(kernel.nodes):
        if not isinstance(load, Load) or load.buffer != old:
            continue
        if value_references(load.index):
            return f"v{position} reads {old!r} at a computed index"
        for store in stores:
            found = _pair_hazard(kernel, position, load, store, ranges, passes)
            if found:
                return found
    return ""


def _pair_hazard(kernel: Kernel, position: int, load: Load, store: Store, ranges: Ranges, passes: Sequence[int]) -> str:
    if load.dtype.itemsize != store.dtype.itemsize:
        return (
            f"elements of {load.buffer!r} have {load.dtype.itemsize} bytes, those of {store.buffer!r} "
            f"{store.dtype.itemsize}: a point overwrites what another still reads"
        )
    point = kernel.store_level(store) is Level.POINT
    written = store_pass(kernel, store)
    sinks = list(_sinks(kernel, position, passes))
    late = [p for p, along_row in sinks if p > written or (p == written and along_row and not point)]
    if late:
        return (
            f"v{position} reads {load.buffer!r} in pass {max(late)} over the row, when pass {written} has written "
            f"{store.buffer!r}"
        )
    if simplify(expand(load.index - store.index), ranges) == 0:
        wide = {r.symbol for r in (*kernel.outer, *(kernel.row if point else ())) if r.size != 1}
        missing = wide - store.index.free_symbols
        if missing:
            return f"points along {min(missing, key=str)} read and write one element of {load.buffer!r}"
        return ""
    early = all(p < written for p, _ in sinks)
    if early and _rows_apart(kernel, load.index, store.index, ranges):
        return ""
    return f"v{position} reads {load.buffer!r} at {load.index} while {store.buffer!r} is written at {store.index}"


def _store_values(store: Store) -> list[int]:
    return [store.value, *value_references(store.index), *([] if store.mask is None else [store.mask])]


def row_passes(kernel: Kernel) -> tuple[int, ...]:
    """For each node the pass over the row that computes it: one more than the reductions it waits for."""
    found: list[int] = []
    for node in kernel.nodes:
        before = max((found[k] for k in operands(node)), default=0)
        found.append(before + 1 if isinstance(node, Reduce) else before)
    return tuple(found)


def store_pass(kernel: Kernel, store: Store) -> int:
    """The pass over the row that makes the store (`memplan.ir.loops`)."""
    passes = row_passes(kernel)

    def ready(s: Store) -> int:
        return max(passes[k] for k in _store_values(s))

    if not kernel.row or kernel.store_level(store) is not Level.POINT:
        return ready(store)
    stores = [s for s in kernel.stores if kernel.store_level(s) is Level.POINT]
    last = max([*(ready(s) for s in stores), *(passes[k] - 1 for k in kernel.reductions)])
    needed = _point_values(kernel, _store_values(store))
    for number in range(last, ready(store), -1):
        roots = [o for k in kernel.reductions if passes[k] - 1 == number for o in operands(kernel.nodes[k])]
        if number == last:
            roots += [k for s in stores if ready(s) == last for k in _store_values(s)]
        if needed <= _point_values(kernel, roots):
            return number
    return ready(store)


def _point_values(kernel: Kernel, roots: Sequence[int]) -> set[int]:
    """The nodes at point level that a pass computes for these."""
    found: set[int] = set()
    for k in range(max(roots, default=-1), -1, -1):
        if kernel.levels[k] is Level.POINT and (k in roots or k in found):
            found.add(k)
            found.update(o for o in operands(kernel.nodes[k]) if kernel.levels[o] is Level.POINT)
    return found


def _sinks(kernel: Kernel, position: int, passes: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """(pass, whether at point level) of every reduction and store that reads ``nodes[position]`` along the row."""
    reached = {position}
    for k in range(position + 1, len(kernel.nodes)):
        node = kernel.nodes[k]
        if not reached.intersection(operands(node)):
            continue
        if isinstance(node, Reduce):
            yield passes[k] - 1, True
        else:
            reached.add(k)
    for store in kernel.stores:
        values = _store_values(store)
        if reached.intersection(values):
            yield max(passes[k] for k in values), kernel.store_level(store) is Level.POINT


def _rows_apart(kernel: Kernel, load: sympy.Expr, store: sympy.Expr, ranges: Ranges) -> bool:
    """Whether what a row reads and what another row writes never meet: equal row starts, further apart than rows."""
    row = {r.symbol for r in kernel.row}
    sizes: dict[sympy.Symbol, int] = {}
    for r in (*kernel.outer, *kernel.row):
        if not isinstance(r.size, (int, sympy.Integer)):
            return False
        sizes[r.symbol] = int(r.size)
    starts, spans = [], []
    for expr in (load, store):
        terms = sympy.Add.make_args(expand(simplify(expr, ranges)))
        inside = [t for t in terms if not t.free_symbols - row]
        if any(t.free_symbols & row for t in terms if t not in inside):
            return False
        starts.append(sympy.Add(*[t for t in terms if t not in inside]))
        found = interval(sympy.Add(*inside), sizes, {})
        if found is None:
            return False
        spans.append(found)
    if expand(starts[0] - starts[1]) != 0:
        return False
    extent = max(s[1] for s in spans) - min(s[0] for s in spans) + 1
    strides = []
    for r in kernel.outer:
        stride = starts[0].coeff(r.symbol, 1)
        if sizes[r.symbol] == 1:
            continue
        if not stride.is_Integer or stride == 0:
            return False
        strides.append((abs(int(stride)), sizes[r.symbol]))
    for stride, size in sorted(strides):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def extern_hazard(op: Extern, old: str, new: str) -> str:
    """Why this ATen call may not write ``new`` over the bytes of ``old``; "" if it may."""
    parts = op.target.split(".")
    if op.target in ("aten.addmm.out", "aten.addmm.dtype_out", "aten.baddbmm.out"):
        # c + a @ b: an element of c is read where the result's element is written, factors are read everywhere
        factors = list(argument_views(tuple(op.args[1:])))
        if any(v.buffer == old for v in factors):
            return f"{op.target} reads {old!r} as a factor"
    elif len(parts) < 2 or parts[0] != "aten" or parts[1].rstrip("_") not in POINTWISE_EXTERNS:
        return f"{op.target} is not known to work element by element"
    written = [v for v in op.results if v is not None and v.buffer == new]
    keyword = tuple(a for _, a in op.kwargs)
    for view in argument_views((*op.args, *keyword)):
        if view.buffer != old:
            continue
        for result in written:
            if not same_elements(view, result):
                return f"{op.target} reads {old!r} and writes {new!r} with another layout"
    return ""


def same_elements(a: View, b: View) -> bool:
    """Whether two views name the same bytes in the same order, whatever their buffers are called."""

    def layout(v: View) -> tuple[Size, ...]:
        return (*v.sizes, *v.strides, v.offset, v.dtype.itemsize)

    return len(a.sizes) == len(b.sizes) and layout(a) == layout(b)
