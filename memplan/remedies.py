"""What would have made a step fit, found out when memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from .budget import Budget, Modules, Planned
from .calibration import figures_for
from .capture.partition import Partitioned
from .ir.config import Config
from .ir.plan import Plan
from .ir.program import Program
from .out_of_memory import Remedy
from .passes.step_peak import step_peak

#: Part of the bytes that there were which is left free: what allocators lose between blocks.
_SPARE = 0.05


class Planning(Protocol):
    """A compiled region: a forward and its backward (see `memplan.region.Region`)."""

    config: Config
    partitioned: Partitioned
    forward_plan: Callable[[], Plan] | None
    backward_plan: Callable[[], Plan] | None

    def trial(self, forward_outputs: int, parameters: frozenset[int], modules: Modules) -> Planned: ...
    def joins(self, backward: Program) -> tuple[tuple[str, str], ...]: ...


def recomputing(region: Planning, had: int) -> Remedy | None:
    """A budget of nearly the bytes that there were; None where nothing can be recomputed.

    One plan is made, the one that keeps least: a budget is met by that one, or by a faster one that needs more.
    """
    recut = region.partitioned.recut
    if recut is None or region.forward_plan is None or region.backward_plan is None:
        return None
    plans = (region.forward_plan(), region.backward_plan())
    before = step_peak(plans, {later: earlier for earlier, later in region.joins(plans[1].program)}).needed
    device = next((b.device for b in plans[0].program.buffers.values() if b.device != "cpu"), "cpu")
    figures = figures_for(device, region.config)
    search = Budget(had, figures, recut.cut, partial(region.trial, recut.forward_outputs, recut.parameters))
    least = search.peak(0)
    budget = max(least, int(had * (1 - _SPARE)))
    title = f'options={{"budget": {budget}}}, which recomputes more'
    return Remedy(title, "the whole step", least, before, search.choice(0).microseconds)


def switched_on(plan: Plan, config: Config, again: Callable[[Config], Plan]) -> list[Remedy]:
    """What the user switched off and may switch on again; ``again`` plans the same program with other options."""
    before = max(plan.timeline, default=0)
    return [
        Remedy(title, plan.program.name, max(again(c).timeline, default=0), before) for title, c in alternatives(config)
    ]


def alternatives(config: Config) -> list[tuple[str, Config]]:
    """(what to do, options) for all that is switched off."""
    found = []
    for name in config.disable:
        found.append((f"leaving {name!r} out of disable", replace(config, disable=tuple(set(config.disable) - {name}))))
    if config.pools != "auto":
        found.append(('pools="auto"', replace(config, pools="auto")))
    return [(title, replace(c, verify=False, dump=None)) for title, c in found]
