"""A schedule as C++ loops.

`Printer` walks the schedule once. Every value is defined at the outermost loop that its operands allow; what a pass
over the row needs again is computed again there, except values that stand in arrays (`Printer.stored`): results of
reductions in column form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import sympy
import torch

from memplan.ir.loops import Call, Level, Load, Range, Reduce, Size, Store, StoreMode, operands

from .cpp_loops import dependencies, store_operands
from .cpp_schedule import MOST_CHUNKS, OWNED_ELEMENTS, PARALLEL_WORK, Form, Pass, Schedule, Threads
from .cpp_tiles import print_tiled
from .cpp_values import State, Texts, compute_type, reduction_state
from .printers import cexpr


class Printer:
    """Prints the body of one kernel's function; with ``checks`` it returns a message, or null."""

    def __init__(self, schedule: Schedule, texts: Texts, *, checks: bool = False) -> None:
        self.nothing = " nullptr" if checks else ""
        self.schedule = schedule
        self.kernel = schedule.kernel
        self.texts = texts
        self.lines: list[str] = []
        self.depth = 1
        self.dependencies = self._dependencies()
        self.defined: set[int] = set()
        self.stored: dict[int, str] = {}
        self.keeping: set[int] = set()
        self.row_symbols = frozenset(r.symbol for r in self.kernel.row)
        self.simd = schedule.apart or not any(s.mode is not StoreMode.SET for s in self.kernel.stores)

    def _dependencies(self) -> tuple[frozenset[sympy.Symbol], ...]:
        """As `dependencies`; in column form a reduction's result always differs along the tile."""
        if self.schedule.form is not Form.COLUMN:
            return dependencies(self.kernel)
        tile = self.schedule.vector.symbol
        found: list[frozenset[sympy.Symbol]] = list(dependencies(self.kernel))
        for k, node in enumerate(self.kernel.nodes):
            if isinstance(node, Reduce) or any(tile in found[o] for o in operands(node)):
                found[k] |= {tile}
        return tuple(found)

    # ---- lines ---------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def braces(self, head: str) -> Iterator[None]:
        self.line(f"{head} {{" if head else "{")
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    @contextmanager
    def loop(self, symbol: str, low: str, high: str, step: str = "") -> Iterator[None]:
        advance = f"{symbol} += {step}" if step else f"++{symbol}"
        with self.braces(f"for (int64_t {symbol} = {low}; {symbol} < {high}; {advance})"):
            yield

    def vectorise(self) -> None:
        if self.simd:
            self.line("#pragma omp simd")

    def parallel(self, collapse: int) -> None:
        condition = ""
        total = self._points()
        if isinstance(total, sympy.Expr) and not total.is_Integer:
            condition = f" if ({cexpr(total)} >= {PARALLEL_WORK // self.schedule.point_cost}L)"
        spread = f" collapse({collapse})" if collapse > 1 else ""
        self.line(f"#pragma omp parallel for schedule(static){spread}{condition}")

    def _points(self) -> Size:
        total: Size = 1
        for r in (*self.kernel.outer, *self.kernel.row):
            total = total * r.size
        return total

    # ---- values --------------------------------------------------------------------------------------------------

    def define(self, k: int) -> None:
        """The line that defines node ``k`` in the current scope."""
        node = self.kernel.nodes[k]
        text = self.stored[k] if k in self.stored else self.texts.value(k)
        self.line(f"const {compute_type(node.dtype)} v{k} = {text};")
        if k in self.keeping:
            self.line(f"t{k}[{self.row_position(k)}] = v{k};")

    def needed(self, roots: Iterable[int]) -> list[int]:
        """Nodes to define for ``roots``: all they use that no enclosing scope has, in order."""
        seen: set[int] = set()
        stack = [k for k in roots if k not in self.defined]
        while stack:
            k = stack.pop()
            if k in seen:
                continue
            seen.add(k)
            if k not in self.stored and not isinstance(self.kernel.nodes[k], Reduce):
                stack.extend(o for o in operands(self.kernel.nodes[k]) if o not in self.defined)
        return sorted(k for k in seen if not isinstance(self.kernel.nodes[k], Reduce) or k in self.stored)

    def level(self, k: int, symbols: Sequence[sympy.Symbol]) -> int:
        """How many of the nested loops over ``symbols`` node ``k`` has to be inside of."""
        depends = self.dependencies[k]
        return max((i + 1 for i, s in enumerate(symbols) if s in depends), default=0)

    def store(self, store: Store) -> None:
        atomic = self.schedule.threads not in (Threads.NONE, Threads.OWNERS)
        self.line(self.texts.store(store, atomic=atomic))

    # ---- forms ---------------------------------------------------------------------------------------------------

    def print(self) -> list[str]:
        """The lines of the function's body."""
        for r in (*self.kernel.outer, *self.kernel.row):
            if not isinstance(r.size, int) and r in self.kernel.outer:
                self.line(f"if ({cexpr(r.size)} <= 0) return{self.nothing};")
        self.constants()
        if self.schedule.form is Form.POINTWISE:
            self.pointwise()
        elif self.schedule.form is Form.ROW:
            self.row()
        else:
            from .cpp_column import print_columns

            print_columns(self)
        return self.lines

    def roots(self) -> list[int]:
        found = [k for s in self.kernel.stores for k in store_operands(s)]
        for k in self.kernel.reductions:
            found.extend(operands(self.kernel.nodes[k]))
        return found

    def constants(self) -> None:
        """Values that no range reaches stand before all loops."""
        for k in self.needed(self.roots()):
            if not self.dependencies[k] and not self.schedule.stage[k]:
                self.define(k)
                self.defined.add(k)

    def pointwise(self) -> None:
        outer = self.kernel.outer
        order = [r.symbol for r in outer]
        self.columns()
        needed = self.needed(self.roots())
        if self.schedule.tiles is not None:
            print_tiled(self)
            return
        if not outer:
            self.body(needed, self.kernel.stores)
            return
        s = self.schedule
        if s.threads is Threads.OWNERS:
            self.owners(needed, order)
            return
        cut = s.block > 0
        blocked = min(s.collapse, len(outer) - 1)
        with self.nest(outer[:-1], needed, order, blocked if not cut else len(outer) - 1, s.collapse):
            inner = outer[-1]
            name, high = inner.symbol.name, cexpr(inner.size)
            if cut:
                with self.loop(f"{name}_", "0", high, str(s.block)):
                    self.hoisted(needed, order, len(outer) - 1)
                    end = f"{name}_ + {s.block}"
                    self.line(f"const int64_t {name}_end = {end} < {high} ? {end} : {high};")
                    self.innermost(name, f"{name}_", f"{name}_end", needed, order)
            else:
                self.innermost(name, "0", high, needed, order)

    def columns(self) -> None:
        """Values of the vectorised range alone, into arrays that all loops read."""
        wanted = self.schedule.columns
        if not wanted:
            return
        symbol, size = self.schedule.vector.symbol.name, cexpr(self.schedule.vector.size)
        for k in wanted:
            self.line(f"alignas(64) {compute_type(self.texts.dtype(k))} t{k}[{size}];")
        self.vectorise()
        with self.loop(symbol, "0", size):
            for k in self.needed(wanted):
                self.define(k)
            for k in wanted:
                self.line(f"t{k}[{symbol}] = v{k};")
        self.stored.update({k: f"t{k}[{symbol}]" for k in wanted})

    def owners(self, needed: list[int], order: list[sympy.Symbol]) -> None:
        """A parallel loop over parts of the innermost range; each part walks over all the outer ranges in order."""
        outer = self.kernel.outer
        name, size = outer[-1].symbol.name, cexpr(outer[-1].size)
        self.line(f"const int64_t {name}_part = mp::owned_length({size}, {OWNED_ELEMENTS}L);")
        self.parallel(1)
        with self.loop(f"{name}_", "0", size, f"{name}_part"):
            self.line(f"const int64_t {name}_end = {name}_ + {name}_part < {size} ? {name}_ + {name}_part : {size};")
            with self.nest(outer[:-1], needed, order, 0, 0):
                self.innermost(name, f"{name}_", f"{name}_end", needed, order)

    def innermost(self, name: str, low: str, high: str, needed: list[int], order: list[sympy.Symbol]) -> None:
        inner = [k for k in needed if self.level(k, order) == len(order)]
        switches = self.switches(inner)
        if switches:
            # g++ neither unswitches a loop on several conditions nor vectorises a selection by one that stays the
            # same; where all hold (away from a border), the compiler sees that they do
            with self.braces(f"if ({' & '.join(f'v{k}' for k in switches)})"):
                self.line(f"constexpr bool {', '.join(f'v{k} = true' for k in switches)};")
                self.vector_loop(name, low, high, inner)
            with self.braces("else"):
                self.vector_loop(name, low, high, inner)
            return
        self.vector_loop(name, low, high, inner)

    def vector_loop(self, name: str, low: str, high: str, inner: list[int]) -> None:
        self.vectorise()
        with self.loop(name, low, high):
            self.body(inner, self.kernel.stores)

    def switches(self, inner: list[int]) -> list[int]:
        """Conditions that stay the same in the vectorised loop and that masks and selections in it depend on."""
        found: set[int] = set()
        for k in inner:
            node = self.kernel.nodes[k]
            used = operands(node) if isinstance(node, (Load, Call)) else ()
            found.update(o for o in used if self.kernel.nodes[o].dtype is torch.bool)
        found.update(s.mask for s in self.kernel.stores if s.mask is not None)
        return sorted(k for k in found - set(inner) if self.dependencies[k] and k not in self.stored)

    def hoisted(self, needed: list[int], order: list[sympy.Symbol], most: int) -> None:
        for k in needed:
            if self.level(k, order) <= most and k not in self.defined:
                self.define(k)

    def body(self, needed: Iterable[int], stores: Iterable[Store]) -> None:
        for k in needed:
            self.define(k)
        for s in stores:
            self.store(s)

    @contextmanager
    def nest(
        self,
        ranges: Sequence[Range],
        needed: list[int],
        order: list[sympy.Symbol],
        perfect: int,
        collapse: int,
    ) -> Iterator[None]:
        """Loops over ``ranges``; values go to the outermost loop possible, but not between the ``perfect`` first."""
        opened = []
        if self.schedule.threads is Threads.OUTER and collapse:
            self.parallel(collapse)
        cut = collapse > len(ranges)
        for i, r in enumerate(ranges):
            context = self.loop(r.symbol.name, "0", cexpr(r.size))
            context.__enter__()
            opened.append(context)
            if i + 1 >= perfect and not (cut and i + 1 <= len(ranges)):
                for k in needed:
                    level = self.level(k, order)
                    if level == i + 1 or (i + 1 == perfect and 0 < level < perfect):
                        self.define(k)
        yield
        for context in reversed(opened):
            context.__exit__(None, None, None)

    # ---- rows ----------------------------------------------------------------------------------------------------

    def row(self) -> None:
        outer = self.kernel.outer
        order = [r.symbol for r in outer]
        before = [k for k in self.needed(self.roots()) if self._outer_value(k) and not self.schedule.stage[k]]
        with self.nest(outer, before, order, self.schedule.collapse, self.schedule.collapse):
            self.defined.update(before)
            for k in self.schedule.kept:
                length = math.prod(int(r.size) for r in self.kernel.row if r.symbol in self.dependencies[k])
                self.line(f"alignas(64) {compute_type(self.texts.dtype(k))} t{k}[{length}];")
            for number, step in enumerate(self.schedule.passes):
                self.keeping = set(self.needed(self.pass_roots(step))) & set(self.schedule.kept) - self.stored.keys()
                if step.reductions:
                    self.reducing_pass(step)
                else:
                    self.storing_pass(step)
                self.stored.update({k: f"t{k}[{self.row_position(k)}]" for k in self.keeping})
                self.keeping = set()
                self.outer_values(number + 1)
            for store in self.kernel.stores:
                if self.kernel.store_level(store) is Level.OUTER:
                    self.store(store)

    def row_position(self, k: int) -> str:
        """The flat position of a point in the row, over the ranges that node ``k`` depends on."""
        position = sympy.Integer(0)
        for r in self.kernel.row:
            if r.symbol in self.dependencies[k]:
                position = position * r.size + r.symbol
        return cexpr(sympy.expand(position))

    def _outer_value(self, k: int) -> bool:
        return not self.dependencies[k] & self.row_symbols

    def outer_values(self, stage: int) -> None:
        for k in self.needed(self.roots()):
            if self._outer_value(k) and self.schedule.stage[k] == stage:
                self.define(k)
                self.defined.add(k)

    def pass_roots(self, step: Pass) -> list[int]:
        roots = [k for s in step.stores for k in store_operands(s)]
        return roots + [o for k in step.reductions for o in operands(self.kernel.nodes[k])]

    def storing_pass(self, step: Pass) -> None:
        row = self.kernel.row
        order = [r.symbol for r in row]
        needed = self.needed(self.pass_roots(step))
        if self.schedule.threads is Threads.ROW:
            self.parallel(1)
        if len(row) == 1 and self.schedule.threads is Threads.ROW:
            with self.chunks():
                self.vectorise()
                with self.loop(row[0].symbol.name, "low", "high"):
                    self.body(needed, step.stores)
            return
        with self.row_loops(row[:-1], needed, order, None):
            self.vectorise()
            with self.loop(row[-1].symbol.name, "0", cexpr(row[-1].size)):
                self.body([k for k in needed if self.level(k, order) == len(order)], step.stores)

    @contextmanager
    def chunks(self) -> Iterator[None]:
        """The loop over chunks of the first row range, with ``low`` and ``high`` in it."""
        size = cexpr(self.kernel.row[0].size)
        length = self.chunk_length()
        with self.loop("chunk", "0", f"({size} + {length} - 1) / {length}"):
            self.line(f"const int64_t low = chunk * {length};")
            self.line(f"const int64_t high = low + {length} < {size} ? low + {length} : {size};")
            yield

    def chunk_length(self) -> str:
        size = self.kernel.row[0].size
        if isinstance(size, int):
            return str(self.schedule.chunk)
        multiple = self.schedule.lanes if len(self.kernel.row) == 1 else 1
        return f"mp::chunk_length({cexpr(size)}, {self.schedule.chunk}L, {multiple}L)"

    @contextmanager
    def row_loops(
        self, ranges: Sequence[Range], needed: list[int], order: list[sympy.Symbol], first: tuple[str, str] | None
    ) -> Iterator[None]:
        """Loops over row ranges; the first one from ``first[0]`` to ``first[1]`` if given."""
        opened = []
        for i, r in enumerate(ranges):
            low, high = first if first and i == 0 else ("0", cexpr(r.size))
            context = self.loop(r.symbol.name, low, high)
            context.__enter__()
            opened.append(context)
            for k in needed:
                if self.level(k, order) == i + 1:
                    self.define(k)
        yield
        for context in reversed(opened):
            context.__exit__(None, None, None)

    def reducing_pass(self, step: Pass) -> None:
        states = {k: self.state(k) for k in step.reductions}
        if not self.schedule.chunk:
            self.lanes(step, states, None)
            for k, state in states.items():
                self.results(k, state, [f"a{k}{p.suffix}[0]" for p in state.parts])
            return
        spread = self.schedule.threads is Threads.ROW
        for k, state in states.items():
            for p in state.parts:
                self.line(f"{p.type} c{k}{p.suffix} = {p.neutral};")
                if spread:
                    self.line(f"{p.type} p{k}{p.suffix}[{MOST_CHUNKS}];")
        if spread:
            self.parallel(1)
        with self.chunks():
            self.lanes(step, states, ("low", "high"))
            for k, state in states.items():
                parts = [f"a{k}{p.suffix}[0]" for p in state.parts]
                if spread:
                    for p, text in zip(state.parts, parts, strict=True):
                        self.line(f"p{k}{p.suffix}[chunk] = {text};")
                else:
                    self.combine(k, state, parts)
        if spread:
            size, length = cexpr(self.kernel.row[0].size), self.chunk_length()
            with self.loop("chunk", "0", f"({size} + {length} - 1) / {length}"):
                for k, state in states.items():
                    self.combine(k, state, [f"p{k}{p.suffix}[chunk]" for p in state.parts])
        for k, state in states.items():
            self.results(k, state, [f"c{k}{p.suffix}" for p in state.parts])

    def combine(self, k: int, state: State, parts: list[str], at: str = "") -> None:
        """Add a chunk's partial state to the whole row's, in the order of the chunks."""
        self.statements(state.combine(tuple(f"c{k}{p.suffix}{at}" for p in state.parts), tuple(parts)))

    def results(self, k: int, state: State, names: list[str]) -> None:
        """Name the values of reduction ``k`` once its state is complete."""
        if len(state.results) == 1:
            node = self.kernel.nodes[k]
            self.line(f"const {compute_type(node.dtype)} v{k} = {names[state.results[0]]};")
        else:
            for item in state.results:
                self.line(f"const {state.parts[item].type} v{k}_{item} = {names[item]};")
        self.defined.add(k)

    def state(self, k: int) -> State:
        node = self.kernel.nodes[k]
        assert isinstance(node, Reduce)
        return reduction_state(self.texts, node)

    def statements(self, lines: tuple[str, ...]) -> None:
        """Statements of a state's update; several are kept apart, as they declare a name."""
        if len(lines) == 1:
            self.line(lines[0])
        else:
            self.line("{ " + " ".join(lines) + " }")

    def lanes(self, step: Pass, states: dict[int, State], bounds: tuple[str, str] | None) -> None:
        """Walk the row (or a chunk of it) with ``lanes`` accumulators, and fold them into the first."""
        count = self.schedule.lanes
        for k, state in states.items():
            for p in state.parts:
                self.line(f"{p.type} a{k}{p.suffix}[{count}];")
                self.line(f"for (int64_t l = 0; l < {count}; ++l) a{k}{p.suffix}[l] = {p.neutral};")
        row = self.kernel.row
        order = [r.symbol for r in row]
        needed = self.needed(self.pass_roots(step))
        with self.row_loops(row[:-1], needed, order, bounds):
            low, high = bounds if bounds and len(row) == 1 else ("0", cexpr(row[-1].size))
            inner = [k for k in needed if self.level(k, order) == len(order)]
            self.lane_loops(row[-1], low, high, inner, step, states)
        self.fold(states)

    def lane_loops(self, r: Range, low: str, high: str, inner: list[int], step: Pass, states: dict[int, State]) -> None:
        count, name = self.schedule.lanes, r.symbol.name

        def lane(limit: str) -> None:
            self.vectorise()
            with self.loop("l", "0", limit):
                self.line(f"const int64_t {name} = {name}_ + l;")
                self.body(inner, step.stores)
                for k, state in states.items():
                    own = tuple(f"a{k}{p.suffix}[l]" for p in state.parts)
                    self.statements(state.update(own, tuple(f"v{o}" for o in operands(self.kernel.nodes[k]))))

        even = isinstance(r.size, int) and r.size % count == 0
        if even:
            with self.loop(f"{name}_", low, high, str(count)):
                lane(str(count))
            return
        with self.braces(""):
            self.line(f"int64_t {name}_ = {low};")
            with self.braces(f"for (; {name}_ + {count} <= {high}; {name}_ += {count})"):
                lane(str(count))
            lane(f"{high} - {name}_")

    def fold(self, states: dict[int, State]) -> None:
        width = self.schedule.lanes // 2
        while width:
            for k, state in states.items():
                own = tuple(f"a{k}{p.suffix}[l]" for p in state.parts)
                other = tuple(f"a{k}{p.suffix}[l + {width}]" for p in state.parts)
                lines = state.combine(own, other)
                text = lines[0] if len(lines) == 1 else "{ " + " ".join(lines) + " }"
                self.line(f"for (int64_t l = 0; l < {width}; ++l) {text}")
            width //= 2
