"""In which pass over the row a store is made: at least as late as the meaning of kernels promises."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_strategies import Case, cases

from memplan.codegen.row_schedule import schedule
from memplan.ir.loops import Kernel, Level, Load, Reduce, Store, operands
from memplan.ir.verify_access import row_passes, store_pass


def with_stores_of(kernel: Kernel, chosen: tuple[int, ...]) -> Kernel:
    """The kernel with these values along the row stored besides, each to a buffer of its own."""
    index, extent = sympy.Integer(0), 1
    for r in (*kernel.row, *kernel.outer):
        index, extent = index + extent * r.symbol, extent * int(r.size)
    points = [k for k, n in enumerate(kernel.nodes) if kernel.levels[k] is Level.POINT and n.dtype.is_floating_point]
    values = sorted({points[c % len(points)] for c in chosen}) if points else []
    return replace(kernel, stores=(*kernel.stores, *(Store(f"more{k}", index, k, torch.float32) for k in values)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)))
def test_stores_are_as_late_as_the_meaning_promises(case: Case, chosen: tuple[int, ...]) -> None:
    """And for a store that is made late nothing is loaded where it would not be anyway."""
    kernel = with_stores_of(case.kernel, chosen)
    if not kernel.reductions:
        return
    plan, passes = schedule(kernel), row_passes(kernel)
    for position, section in plan.section_of_store.items():
        assert section >= store_pass(kernel, kernel.stores[position])
    pinned = [k for k in kernel.reductions if passes[k] > 0]
    for number, section in enumerate(plan.sections):
        own = {o for k in pinned if passes[k] - 1 == number for o in operands(kernel.nodes[k])}
        own |= {kernel.stores[k].value for k in section.stores if k not in plan.moved}
        assert loads(kernel, own) == loads(kernel, section.points | own)


def loads(kernel: Kernel, roots: set[int] | frozenset[int]) -> set[int]:
    """Loads along the row that these values need."""
    found: set[int] = set()
    for k in roots:
        if kernel.levels[k] is Level.POINT and not isinstance(kernel.nodes[k], Reduce):
            found |= {k} if isinstance(kernel.nodes[k], Load) else set()
            found |= loads(kernel, set(operands(kernel.nodes[k])))
    return found
