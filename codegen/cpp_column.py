"""Column form: tiles of neighbouring outer points accumulate side by side while the loops run over the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.ir.loops import Item, Level, Load, operands

from .cpp_loops import store_operands
from .cpp_schedule import MOST_CHUNKS, Pass, Threads
from .cpp_values import State, compute_type
from .printers import cexpr

if TYPE_CHECKING:
    from .cpp_nest import Printer


def print_columns(p: Printer) -> None:
    """The whole nest of a kernel in column form."""
    _Columns(p).print()


class _Columns:
    def __init__(self, p: Printer) -> None:
        self.p = p
        self.tile = p.schedule.vector
        self.name = self.tile.symbol.name
        self.width = p.schedule.lanes
        size = self.tile.size
        self.even = isinstance(size, int) and size % self.width == 0
        self.count = str(self.width) if self.even else "count"

    def print(self) -> None:
        p = self.p
        outer = p.kernel.outer
        order = [r.symbol for r in outer]
        scope = [k for k in p.needed(p.roots()) if self._scope_value(k)]
        loops = len(outer) - 1
        cut = p.schedule.collapse > loops
        with (
            p.nest(outer[:-1], scope, order, p.schedule.collapse, p.schedule.collapse),
            p.loop(f"{self.name}_", "0", cexpr(self.tile.size), str(self.width)),
        ):
            if cut:
                for k in scope:
                    p.define(k)
            p.defined.update(scope)
            if not self.even:
                rest = f"{cexpr(self.tile.size)} - {self.name}_"
                p.line(f"const int64_t count = {rest} < {self.width} ? {rest} : {self.width};")
            for number, step in enumerate(p.schedule.passes):
                self.walk(step)
                self.keep(number + 1)
            self.finish()

    def _scope_value(self, k: int) -> bool:
        depends = self.p.dependencies[k]
        return bool(depends) and self.tile.symbol not in depends and not depends & self.p.row_symbols

    def walk(self, step: Pass) -> None:
        """One pass over the row."""
        p = self.p
        states = {k: p.state(k) for k in step.reductions}
        if not p.schedule.chunk:
            self.accumulate(step, states, None)
            for k, state in states.items():
                self.name_results(k, state, "a")
            return
        spread = p.schedule.threads is Threads.ROW
        for k, state in states.items():
            for part in state.parts:
                if spread:
                    p.line(f"{part.type} p{k}{part.suffix}[{MOST_CHUNKS}][{self.width}];")
                p.line(f"{part.type} c{k}{part.suffix}[{self.width}];")
                p.line(f"for (int64_t l = 0; l < {self.width}; ++l) c{k}{part.suffix}[l] = {part.neutral};")
        if spread:
            p.parallel(1)
        with p.chunks():
            self.accumulate(step, states, ("low", "high"))
            if spread:
                for k, state in states.items():
                    for part in state.parts:
                        name = f"{k}{part.suffix}"
                        p.line(f"for (int64_t l = 0; l < {self.width}; ++l) p{name}[chunk][l] = a{name}[l];")
            else:
                self.combine(states, "a", "")
        if states and spread:
            size, length = cexpr(p.kernel.row[0].size), p.chunk_length()
            with p.loop("chunk", "0", f"({size} + {length} - 1) / {length}"):
                self.combine(states, "p", "[chunk]")
        for k, state in states.items():
            self.name_results(k, state, "c")

    def combine(self, states: dict[int, State], prefix: str, at: str) -> None:
        """Add a chunk's partial states to the whole rows', in the order of the chunks."""
        p = self.p
        if states:
            p.line("#pragma omp simd")
            with p.loop("l", "0", str(self.width)):
                for k, state in states.items():
                    p.combine(k, state, [f"{prefix}{k}{part.suffix}{at}[l]" for part in state.parts], "[l]")

    def accumulate(self, step: Pass, states: dict[int, State], bounds: tuple[str, str] | None) -> None:
        p = self.p
        for k, state in states.items():
            for part in state.parts:
                p.line(f"{part.type} a{k}{part.suffix}[{self.width}];")
                p.line(f"for (int64_t l = 0; l < {self.width}; ++l) a{k}{part.suffix}[l] = {part.neutral};")
        order = [r.symbol for r in p.kernel.row]
        needed = p.needed(p.pass_roots(step))
        inner = [k for k in needed if self.tile.symbol in p.dependencies[k]]
        others = [k for k in needed if self.tile.symbol not in p.dependencies[k]]
        with p.row_loops(p.kernel.row, others, order, bounds):
            p.vectorise()
            with p.loop("l", "0", self.count):
                p.line(f"const int64_t {self.name} = {self.name}_ + l;")
                p.body(inner, step.stores)
                for k, state in states.items():
                    own = tuple(f"a{k}{part.suffix}[l]" for part in state.parts)
                    p.statements(state.update(own, tuple(f"v{o}" for o in operands(p.kernel.nodes[k]))))

    def name_results(self, k: int, state: State, prefix: str) -> None:
        """Let readers find the result of reduction ``k`` in its array."""
        p = self.p
        names = [f"{prefix}{k}{part.suffix}[l]" for part in state.parts]
        if len(state.results) == 1:
            p.stored[k] = names[state.results[0]]
            return
        for position, node in enumerate(p.kernel.nodes):
            if isinstance(node, Item) and node.arg == k:
                p.stored[position] = names[node.item]

    def keep(self, stage: int) -> None:
        """Values of the tile that later passes need go to arrays, so that they are not computed for every row point."""
        p = self.p
        if stage >= len(p.schedule.passes):
            return
        wanted = []
        for k in p.needed([r for step in p.schedule.passes[stage:] for r in p.pass_roots(step)]):
            plain = isinstance(p.kernel.nodes[k], (Load, Item)) and p.schedule.stage[k] == 0
            outer = not p.dependencies[k] & p.row_symbols and self.tile.symbol in p.dependencies[k]
            if outer and not plain and k not in p.stored and p.schedule.stage[k] <= stage:
                wanted.append(k)
        if not wanted:
            return
        for k in wanted:
            p.line(f"{compute_type(p.kernel.nodes[k].dtype)} t{k}[{self.width}];")
        p.line("#pragma omp simd")
        with p.loop("l", "0", self.count):
            p.line(f"const int64_t {self.name} = {self.name}_ + l;")
            for k in p.needed(wanted):
                p.define(k)
            for k in wanted:
                p.line(f"t{k}[l] = v{k};")
        for k in wanted:
            p.stored[k] = f"t{k}[l]"

    def finish(self) -> None:
        """Stores that happen once an outer point."""
        p = self.p
        stores = [s for s in p.kernel.stores if p.kernel.store_level(s) is Level.OUTER]
        if not stores:
            return
        p.vectorise()
        with p.loop("l", "0", self.count):
            p.line(f"const int64_t {self.name} = {self.name}_ + l;")
            p.body(p.needed([k for s in stores for k in store_operands(s)]), stores)
