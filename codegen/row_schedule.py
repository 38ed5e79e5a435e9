"""Sections of a kernel: which pass over the row computes which reduction and makes which store.

Section ``p`` holds the reductions whose operands need ``p`` earlier reductions in a chain. A point value that several
sections need is computed again in each, if the row does not fit into a block and it is not kept. A store at the points
happens in the last section that has all it needs anyway (what may be relied on says `memplan.ir.loops`), so that as
much as possible of what the kernel reads may be written over.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.ir.loops import Call, Kernel, Level, Load, Node, Random, Reduce, Store, operands

from .cpp_loops import store_operands
from .point_costs import EXPENSIVE


@dataclass(frozen=True)
class Section:
    """One pass over the row: reductions made, stores done at its points, and the point nodes that both need."""

    reductions: tuple[int, ...]
    stores: tuple[int, ...]
    points: frozenset[int]


@dataclass(frozen=True)
class Schedule:
    """``sections`` in order; ``last`` are the stores once a row, after all of them."""

    sections: tuple[Section, ...]
    last: tuple[int, ...]
    section_of_store: dict[int, int]
    #: stores that could have been made in an earlier section
    moved: frozenset[int]

    def sections_of_node(self, node: int) -> tuple[int, ...]:
        return tuple(k for k, s in enumerate(self.sections) if node in s.points)


def kept_values(kernel: Kernel, plan: Schedule) -> int:
    """Largest number of point values that a block holding the whole row keeps from one section for later ones."""
    most = 0
    for k in range(1, len(plan.sections)):
        before = frozenset().union(*(s.points for s in plan.sections[:k]))
        later = plan.sections[k:]
        used = {a for s in later for n in s.points - before for a in operands(kernel.nodes[n])}
        used |= {a for s in later for n in s.reductions for a in operands(kernel.nodes[n])}
        used |= {a for s in later for n in s.stores for a in store_operands(kernel.stores[n])}
        most = max(most, len(used & before))
    return most


def depths(kernel: Kernel) -> tuple[int, ...]:
    """For each node, the longest chain of reductions that it needs."""
    out: list[int] = []
    for node in kernel.nodes:
        deepest = max((out[a] for a in operands(node)), default=0)
        out.append(deepest + 1 if isinstance(node, Reduce) else deepest)
    return tuple(out)


def closure(kernel: Kernel, roots: tuple[int, ...]) -> frozenset[int]:
    """Point nodes that the roots need, up to the results of reductions."""
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        k = pending.pop()
        if k in seen or kernel.levels[k] is not Level.POINT:
            continue
        seen.add(k)
        pending.extend(operands(kernel.nodes[k]))
    return frozenset(seen)


def schedule(kernel: Kernel) -> Schedule:
    """Every reduction in the first section it can be in, every store at points in the last one that costs nothing.

    Costs nothing: all loads that it needs are made in that section anyway, and nothing expensive is computed again.
    """
    depth = depths(kernel)
    count = max((depth[k] for k in kernel.reductions), default=0)
    reductions = [[k for k in kernel.reductions if depth[k] == p + 1] for p in range(count)]
    points = [closure(kernel, tuple(a for k in group for a in operands(kernel.nodes[k]))) for group in reductions]
    placed: list[list[int]] = [[] for _ in range(count)]
    section_of: dict[int, int] = {}
    row_stores = [k for k, s in enumerate(kernel.stores) if not kernel.row or kernel.store_level(s) is Level.POINT]
    # those that may happen in few sections first: what they load, others find there
    order = sorted(row_stores, key=lambda k: -_earliest(kernel, depth, kernel.stores[k]))
    for k in order:
        store = kernel.stores[k]
        needed = closure(kernel, store_operands(store))
        dear = {n for n in needed if _dear(kernel.nodes[n])}
        earliest = _earliest(kernel, depth, store)
        # everything is read before it is written
        readers = [p for p in range(len(points)) if _reads(kernel, points[p], store.buffer)]
        earliest = max([earliest, *readers])
        free = [p for p in range(earliest, len(points)) if dear <= points[p]]
        section = free[-1] if free else earliest
        if section == len(points):
            points.append(frozenset())
            placed.append([])
            reductions.append([])
        points[section] |= needed
        placed[section].append(k)
        section_of[k] = section
    sections = tuple(Section(tuple(r), tuple(sorted(s)), p) for r, s, p in zip(reductions, placed, points, strict=True))
    last = tuple(k for k in range(len(kernel.stores)) if k not in section_of)
    moved = frozenset(k for k, p in section_of.items() if p > _earliest(kernel, depth, kernel.stores[k]))
    return Schedule(sections, last, section_of, moved)


def _dear(node: Node) -> bool:
    """Whether to compute the node once more would cost more than arithmetic."""
    return isinstance(node, (Load, Random)) or (isinstance(node, Call) and node.op in EXPENSIVE)


def _earliest(kernel: Kernel, depth: tuple[int, ...], store: Store) -> int:
    return max(depth[k] for k in store_operands(store))


def _reads(kernel: Kernel, points: frozenset[int], buffer: str) -> bool:
    return any(isinstance(n := kernel.nodes[k], Load) and n.buffer == buffer for k in points)
