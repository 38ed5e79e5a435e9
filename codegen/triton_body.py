"""The body of a Triton kernel: index arithmetic, loads, pointwise lines, and stores; `triton_reduce` prints reductions.

A value varies along some of the tile's axes (its ``dims``) and has extent one along the others, so that what is the
same for a row is computed once a row. Values outside of loops over the row are kept; inside a loop they are made anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from memplan.ir.index import expand, ranges_of, stride_of
from memplan.ir.loops import (
    CHECKED_INDEX,
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Level,
    Load,
    Random,
    Reduce,
    Store,
    StoreMode,
    operands,
    value_references,
)
from memplan.ir.totals import rows_together

from . import triton_totals
from .row_schedule import Schedule, Section
from .triton_configs import LaunchConfig, divisible
from .triton_loops import Loops
from .triton_pointwise import LITERAL_OPERANDS, pointwise
from .triton_printer import IndexPrinter, compute_type, convert, literal, texpr, type_name
from .triton_reduce import Reduction, finish, start, step, whole

Dims = frozenset[int]
_NO_DIMS: Dims = frozenset()


@dataclass(frozen=True, slots=True)
class Value:
    """Text of a computed node, and the tile axes along which it varies."""

    text: str
    dims: Dims


@dataclass(frozen=True, slots=True)
class Emitted:
    """Text of the function's body, and the device functions that it calls."""

    text: str
    functions: tuple[str, ...]


def emit_body(
    loops: Loops, plan: Schedule, *, configs: tuple[LaunchConfig, ...], persistent: bool, wide: bool
) -> Emitted:
    """Print the body for any of the given configurations.

    ``persistent``: the row is one block; else it is looped over. ``wide``: count in 64 bits.
    """
    body = Body(loops, plan, configs, persistent, wide)
    body.prologue()
    for section in plan.sections:
        body.section(section)
    body.last_stores()
    triton_totals.close_rows(body)
    return Emitted("\n".join(body.lines) + "\n", tuple(sorted(body.functions)))


class Body:
    def __init__(
        self, loops: Loops, plan: Schedule, configs: tuple[LaunchConfig, ...], persistent: bool, wide: bool
    ) -> None:
        self.loops = loops
        self.kernel = loops.kernel
        self.plan = plan
        self.configs = configs
        self.persistent = persistent
        self.wide = wide
        self.lines: list[str] = []
        self.indent = "    "
        self.kept: dict[int, Value] = {}
        self.local: dict[int, Value] | None = None
        self.items: dict[int, tuple[Value, ...]] = {}
        self.masks: dict[int, str] = {}
        #: rows that an instance goes over, one block after the other, where it sums their columns; else 0
        self.together = rows_together(self.kernel)
        self.functions: set[str] = set()
        ranges = ranges_of((*self.kernel.outer, *self.kernel.row))
        self.printer = IndexPrinter(ranges, self.symbol, self.functions)
        self.section_number = -1
        self.pointers: dict[str, torch.dtype] = {}
        seen = [*((n.buffer, n.dtype) for n in self.kernel.loads), *((s.buffer, s.dtype) for s in self.kernel.stores)]
        for buffer, dtype in seen:
            self.pointers[buffer] = min(dtype, self.pointers.get(buffer, dtype), key=str)

    # -- lines and shapes ----------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append(self.indent + text)

    def shape(self, dims: Dims) -> str:
        names = [f"{axis.name.upper()}BLOCK" for axis in self.loops.axes]
        return "[" + ", ".join(n if k in dims else "1" for k, n in enumerate(names)) + "]"

    @property
    def all_dims(self) -> Dims:
        return frozenset(range(len(self.loops.axes)))

    @property
    def outer_dims(self) -> Dims:
        return frozenset({0}) if self.loops.reduces else self.all_dims

    def mask(self, dims: Dims, *more: str) -> str:
        """Conjunction of the range masks of these axes and of what is given; empty if there is nothing to mask."""
        return " & ".join([*more, *(self.masks[k] for k in sorted(dims) if k in self.masks)])

    # -- indices -------------------------------------------------------------------------------------------------

    def symbol(self, s: sympy.Symbol) -> str:
        found = value_references(s)
        if not found:
            return str(s.name)
        value = self.value(found[0])
        if self.kernel.nodes[found[0]].dtype == torch.int64:
            return value.text
        return f"{value.text}.to(tl.int64)"

    def index_dims(self, expr: sympy.Expr) -> Dims:
        axis_of = self.loops.axis_of
        dims = {axis_of[s] for s in expr.free_symbols if s in axis_of}
        for k in value_references(expr):
            dims |= self.value(k).dims
        return frozenset(dims)

    def flattened(self, expr: sympy.Expr) -> sympy.Expr:
        """Where the expression walks an axis in order, by the axis's own flat index: no division is left in it."""
        for axis in self.loops.axes:
            if len(axis.ranges) < 2 or not all(r.symbol in expr.free_symbols for r in axis.ranges):
                continue
            step = stride_of(expr, axis.ranges[-1].symbol)
            flat: sympy.Expr = sympy.Integer(0)
            stride: sympy.Expr = sympy.Integer(1)
            for r in reversed(axis.ranges):
                flat, stride = flat + stride * r.symbol, stride * r.size
            rest = expand(expr - step * flat)
            if step != 0 and not rest.free_symbols & {r.symbol for r in axis.ranges}:
                expr = rest + step * sympy.Symbol(f"{axis.name}index", integer=True, nonnegative=True)
        return expr

    def prologue(self) -> None:
        axes = self.loops.axes
        if len(axes) == 2 and not self.loops.reduces:
            self.line(f"xblocks = {self._cdiv(axes[1].numel, 'XBLOCK')}")
            self.line("program = tl.program_id(0)")
            self.axis(0, "(program // xblocks)", "[:, None]")
            self.axis(1, "(program % xblocks)", "[None, :]")
            return
        wide = ".to(tl.int64)" if self.wide else ""
        if self.together:
            triton_totals.open_rows(self, wide)
            return
        self.axis(0, "tl.program_id(0)", "[:, None]" if self.loops.reduces else "")
        if self.loops.reduces:
            if self.persistent:
                self.line(f"rindex = tl.arange(0, RBLOCK)[None, :]{wide}")
                self.decompose(1)
            else:
                self.line(f"rbase = tl.arange(0, RBLOCK)[None, :]{wide}")

    def _cdiv(self, numel: int | sympy.Expr, block: str) -> str:
        return f"({self.size(numel)} + {block} - 1) // {block}"

    def size(self, numel: int | sympy.Expr) -> str:
        if isinstance(numel, int):
            return str(numel)
        text = texpr(numel, self.printer)
        return text if numel.is_Atom else f"({text})"

    def axis(self, k: int, program: str, bracket: str) -> None:
        axis = self.loops.axes[k]
        block = f"{axis.name.upper()}BLOCK"
        if not axis.ranges and divisible(axis.numel, block, self.configs):
            return
        program = f"{program}.to(tl.int64)" if self.wide else program
        lanes = f"{program} * {block} + tl.arange(0, {block})"
        self.line(f"{axis.name}index = " + (f"({lanes}){bracket}" if bracket else lanes))
        self.decompose(k)

    def decompose(self, k: int) -> None:
        """The mask of an axis and the symbols of its dimensions, from its flat index."""
        axis = self.loops.axes[k]
        index = f"{axis.name}index"
        if not divisible(axis.numel, f"{axis.name.upper()}BLOCK", self.configs):
            self.line(f"{axis.name}mask = {index} < {self.size(axis.numel)}")
            self.masks[k] = f"{axis.name}mask"
        inner: int | sympy.Expr = 1
        for position in range(len(axis.ranges) - 1, -1, -1):
            r = axis.ranges[position]
            text = index if inner == 1 else f"{index} // {self.size(inner)}"
            if position > 0:
                text = f"({text}) % {self.size(r.size)}" if inner != 1 else f"{text} % {self.size(r.size)}"
            self.line(f"{r.symbol.name} = {text}")
            inner = inner * r.size

    # -- values --------------------------------------------------------------------------------------------------

    def value(self, k: int) -> Value:
        if self.local is not None and k in self.local:
            return self.local[k]
        return self.kept[k]

    def need(self, k: int) -> None:
        """Emit node ``k`` and what it needs, if that is not done yet in this scope."""
        pending = [k]
        while pending:
            top = pending[-1]
            missing = [a for a in operands(self.kernel.nodes[top]) if not self.has(a)]
            if missing and not self.has(top):
                pending.extend(reversed(missing))
                continue
            pending.pop()
            if not self.has(top):
                scope = self.kept
                if self.local is not None and self.kernel.levels[top] is Level.POINT:
                    scope = self.local
                scope[top] = self.emit(top)

    def has(self, k: int) -> bool:
        return k in self.kept or (self.local is not None and k in self.local)

    def define(self, k: int, text: str, dims: Dims) -> Value:
        self.line(f"tmp{k} = {text}")
        return Value(f"tmp{k}", dims)

    def emit(self, k: int) -> Value:
        node = self.kernel.nodes[k]
        match node:
            case Load():
                return self.load(k, node)
            case Index():
                dims = self.index_dims(node.expr)
                text, name = texpr(node.expr, self.printer), type_name(compute_type(node.dtype))
                if node.expr.is_Integer:
                    return self.define(k, f"tl.full([], {text}, {name})", _NO_DIMS)
                return self.define(k, f"({text}).to({name})", dims)
            case Constant():
                kind = compute_type(node.dtype)
                return Value(f"tl.full([], {literal(node.value, kind)}, {type_name(kind)})", _NO_DIMS)
            case Call():
                return self.call(k, node)
            case Cast():
                value = self.value(node.arg)
                source = self.kernel.nodes[node.arg].dtype
                if compute_type(source) == node.dtype:
                    return value
                return self.define(k, convert(value.text, source, node.dtype), value.dims)
            case Item():
                return self.items[node.arg][node.item]
            case Random():
                return self.random(k, node)
            case Reduce():
                raise AssertionError(f"reduction {k} is used before its section")

    def load(self, k: int, node: Load) -> Value:
        dims = self.index_dims(node.index)
        condition: tuple[str, ...] = ()
        if node.mask is not None:
            value = self.value(node.mask)
            dims |= value.dims
            condition = (value.text,)
        arguments = [self.pointer(node.buffer, node.dtype, node.index, dims)]
        mask = self.mask(dims, *condition)
        if mask:
            arguments.append(mask)
        if node.mask is not None:
            arguments.append(f"other={literal(node.other, node.dtype)}")
        policy = self.policy(k, dims)
        if policy:
            arguments.append(f'eviction_policy="{policy}"')
        text = f"tl.load({', '.join(arguments)})"
        if compute_type(node.dtype) != node.dtype:
            text += f".to({type_name(compute_type(node.dtype))})"
        return self.define(k, text, dims)

    def policy(self, k: int, dims: Dims) -> str:
        """Keep in the cache what later passes over the row, or all rows, read again."""
        if not self.loops.reduces or self.kernel.levels[k] is not Level.POINT:
            return ""
        if 0 not in dims and self.loops.axes[0].ranges:
            return "evict_last"
        later = [s for s in self.plan.sections_of_node(k) if s > self.section_number]
        return "evict_last" if later and not self.persistent else ""

    def pointer(self, buffer: str, dtype: torch.dtype, index: sympy.Expr, dims: Dims) -> str:
        base = buffer
        if self.pointers[buffer] != dtype:
            base = f"{buffer}.to(tl.pointer_type({type_name(dtype)}))"
        own = self.index_dims(index)
        text = texpr(self.flattened(index), self.printer)
        if own != dims:
            text = f"{text} + tl.zeros({self.shape(dims)}, tl.int32)"
        return base if text == "0" else f"{base} + ({text})"

    def call(self, k: int, node: Call) -> Value:
        own = node.args[1] if node.op == "where" else node.args[0]
        operand = self.kernel.nodes[own].dtype
        values = [self.value(a) for a in node.args]
        texts = [v.text for v in values]
        if node.op == CHECKED_INDEX:
            return self.checked_index(*values)
        if node.op in LITERAL_OPERANDS:
            self.inline(node, operand, texts)
        text = pointwise(node.op, tuple(texts), operand, node.dtype, self.functions.add)
        return self.define(k, text, frozenset().union(*(v.dims for v in values)))

    def checked_index(self, position: Value, size: Value) -> Value:
        """The position; outside of the ranges' masks it is what a masked load gave, and nothing is to be said of it."""
        inside = f"(0 <= {position.text}) & ({position.text} < {size.text})"
        mask = self.mask(position.dims | size.dims)
        condition = f"({inside}) | ~({mask})" if mask else inside
        self.line(f'tl.device_assert({condition}, "memplan: an index is out of range")')
        return position

    def inline(self, node: Call, operand: torch.dtype, texts: list[str]) -> None:
        """Replace constant operands by literals, where a tensor operand gives them their type."""
        kind = compute_type(operand)
        if kind in (torch.float64, torch.bool):
            return
        first = 1 if node.op == "where" else 0
        nodes = [(i, self.kernel.nodes[node.args[i]]) for i in range(first, len(node.args))]
        if all(isinstance(n, Constant) for _, n in nodes):
            return
        for i, n in nodes:
            if isinstance(n, Constant):
                texts[i] = literal(n.value, kind)

    def random(self, k: int, node: Random) -> Value:
        seed, offset = self.value(node.seed), self.value(node.offset)
        name = {"rand": "random_uniform", "randn": "random_normal", "randint64": "random_int64"}[node.kind]
        self.functions.add(name)
        text = f"{name}({seed.text}, {offset.text})"
        if node.dtype not in (torch.float32, torch.int64) and compute_type(node.dtype) != torch.float32:
            text += f".to({type_name(compute_type(node.dtype))})"
        return self.define(k, text, seed.dims | offset.dims)

    # -- sections and stores -------------------------------------------------------------------------------------

    def section(self, section: Section) -> None:
        self.section_number += 1
        self.hoist(section)
        reductions = [self.reduction(k) for k in section.reductions]
        if not self.loops.reduces or self.persistent:
            self.local = None
            for r in reductions:
                self.reduce(r, loop=False)
            self.stores(section.stores)
            return
        for r in reductions:
            for text in start(r, self.shape(self.all_dims)):
                self.line(text)
        if self.plan.moved.intersection(section.stores):
            # what it writes over, other warps may still read in the section before: nothing else parts the two
            self.line("tl.debug_barrier()")
        row = self.loops.axes[1]
        self.line(f"for roffset in range(0, {self.size(row.numel)}, RBLOCK):")
        outside, self.indent, self.local = self.indent, self.indent + "    ", {}
        self.line("rindex = roffset + rbase")
        self.decompose(1)
        for r in reductions:
            self.reduce(r, loop=True)
        self.stores(section.stores)
        self.indent, self.local = outside, None
        for r in reductions:
            self.finished(r, finish(r, self.size(row.numel), self.shape(self.all_dims), self.functions.add))

    def hoist(self, section: Section) -> None:
        """What is the same for a whole row is computed before the loop over it."""
        roots = {a for k in section.points for a in operands(self.kernel.nodes[k])}
        roots |= {a for k in section.reductions for a in operands(self.kernel.nodes[k])}
        for k in section.stores:
            roots |= set(_store_roots(self.kernel.stores[k]))
        for k in sorted(roots):
            if self.kernel.levels[k] is not Level.POINT:
                self.need(k)

    def reduction(self, k: int) -> Reduction:
        node = self.kernel.nodes[k]
        assert isinstance(node, Reduce)
        return Reduction(k, node, tuple(self.kernel.nodes[a].dtype for a in node.args))

    def reduce(self, r: Reduction, *, loop: bool) -> None:
        texts = []
        for a in r.node.args:
            self.need(a)
            texts.append(self.tile(a))
        mask = self.masks.get(1, "")
        if loop:
            for text in step(r, texts, mask, self.functions.add):
                self.line(text)
        else:
            count = self.size(self.loops.axes[1].numel)
            self.finished(r, whole(r, texts, mask, count, self.functions.add))

    def tile(self, k: int) -> str:
        value = self.value(k)
        if value.dims == self.all_dims:
            return value.text
        return f"tl.broadcast_to({value.text}, {self.shape(self.all_dims)})"

    def finished(self, r: Reduction, result: tuple[list[str], tuple[str, ...]]) -> None:
        lines, names = result
        for text in lines:
            self.line(text)
        values = tuple(Value(n, frozenset({0})) for n in names)
        self.kept[r.position] = values[0]
        self.items[r.position] = values

    def stores(self, chosen: tuple[int, ...]) -> None:
        for k in chosen:
            for a in _store_roots(self.kernel.stores[k]):
                self.need(a)
        for k in chosen:
            store = self.kernel.stores[k]
            if store.mode is StoreMode.TOTAL:
                triton_totals.add(self, k, store)
            else:
                self.store(store)

    def last_stores(self) -> None:
        """Stores once a row. Other warps may still have to read what is overwritten in place."""
        chosen = self.plan.last
        for k in chosen:
            for a in _store_roots(self.kernel.stores[k]):
                self.need(a)
        if any(self.kernel.stores[k].buffer in self.kernel.read_buffers for k in chosen):
            self.line("tl.debug_barrier()")
        for k in chosen:
            self.store(self.kernel.stores[k])

    def store(self, store: Store) -> None:
        value = self.value(store.value)
        dims = self.index_dims(store.index) | value.dims
        condition: tuple[str, ...] = ()
        if store.mask is not None:
            mask_value = self.value(store.mask)
            dims |= mask_value.dims
            condition = (mask_value.text,)
        if store.mode is not StoreMode.SET:
            dims |= self.outer_dims
        source = self.kernel.nodes[store.value].dtype
        text = value.text
        if compute_type(source) != store.dtype:
            text = convert(text, source, store.dtype, keep=False)
        arguments = [self.pointer(store.buffer, store.dtype, store.index, dims), text]
        mask = self.mask(dims, *condition)
        if mask:
            arguments.append(mask)
        if store.mode is StoreMode.SET:
            self.line(f"tl.store({', '.join(arguments)})")
            return
        if value.dims != dims:
            arguments[1] = f"tl.broadcast_to({text}, {self.shape(dims)})"
        arguments.append('sem="relaxed"')
        self.line(f"tl.atomic_{store.mode.value}({', '.join(arguments)})")


def _store_roots(store: Store) -> tuple[int, ...]:
    mask = () if store.mask is None else (store.mask,)
    return (*value_references(store.index), store.value, *mask)
