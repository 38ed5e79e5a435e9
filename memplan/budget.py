"""The fastest training step within a budget of bytes.

What is held to the budget is what must be there for the step to run: on a GPU the bytes that its caching allocator
reserves, by simulation, elsewhere those that are alive.

Menus and a first choice come from a model of the step (`memplan.passes.remat_choice`); what a choice really needs is
what its plans say, so choices are cut, captured and planned as they will run, and the limit given to the model is
moved until the plans' own peak is as near to the budget as it gets.

Monotone: the limits tried are a fixed ladder from the least to the fastest choice, walked by halving, and of the plans
within the budget the one with the highest peak is taken. Two budgets take the same way down to a rung that is within
the larger one and not within the smaller; from there on the larger has a plan with that rung's peak, the smaller none
that high. So a smaller budget never gives a higher peak, whatever the model gets wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx

from .ir.device import DeviceFigures
from .ir.errors import PlanningError
from .ir.joint import JointGraph
from .ir.plan import Plan
from .passes.remat_choice import Choice, Choices
from .passes.remat_menu import kept_nodes, make_menus
from .passes.step_peak import StepPeak, alive_at

log = logging.getLogger(__name__)
#: A forward and its backward.
Modules = tuple[torch.fx.GraphModule, torch.fx.GraphModule]

#: Rungs between the least and the fastest choice.
RUNGS = 64
#: Points of a curve over all budgets, the fastest choice aside.
CURVE = 16
#: Part of the budget that a plan should use for the search to end.
CLOSE = 0.97
_SHOWN = 6


@dataclass(frozen=True)
class Planned:
    """The plans of one way to cut the step; ``joins`` is backward buffer -> forward buffer."""

    plans: Sequence[Plan]
    joins: Mapping[str, str]
    peak: StepPeak


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What the step needs at one budget: planned bytes, and the model's microseconds, those of recomputation apart.

    ``on_host``: bytes of saved tensors that are offloaded.
    """

    nbytes: int
    microseconds: float
    recomputation: float
    on_host: int = 0


@dataclass
class Budget:
    """A search: ``cut`` makes forward and backward, with the nodes kept that a choice over the joint graph names;
    ``plan`` plans them."""

    limit: int
    figures: DeviceFigures
    cut: Callable[[Callable[[JointGraph], Sequence[int]]], Modules]
    plan: Callable[[Modules], Planned]
    _choices: Choices | None = None
    _tried: dict[int, tuple[Modules, Planned]] = field(default_factory=dict)

    def search(self) -> Modules:
        """The cut whose plans need the most bytes within the limit.

        Raises
        ------
        PlanningError
            If no plan is within the limit: the least bytes that one needs, and what stands at its peak.
        """
        if self.peak(RUNGS) <= self.limit:
            return self._tried[RUNGS][0]
        low, high = 0, RUNGS
        while high - low > 1:
            middle = (low + high) // 2
            if self.peak(middle) > self.limit:
                high = middle
                continue
            low = middle
            if self.peak(middle) >= CLOSE * self.limit:
                break
        if low == 0:
            self.peak(0)
        fitting = [(p.peak.needed, n) for n, (_, p) in self._tried.items() if p.peak.needed <= self.limit]
        if not fitting:
            least = min((p for _, p in self._tried.values()), key=lambda p: p.peak.needed)
            raise PlanningError(cannot_be_met(self.limit, least))
        return self._tried[max(fitting)[1]][0]

    def curve(self) -> tuple[CurvePoint, ...]:
        """Peaks and times from the least choice to the fastest."""
        found = []
        for rung in (RUNGS, *range(0, RUNGS, RUNGS // CURVE)):
            nbytes = self.peak(rung)
            assert self._choices is not None
            added = self.choice(rung).microseconds
            found.append(CurvePoint(nbytes, self._choices.menus.segments.graph.microseconds + added, added))
        return tuple(sorted(found, key=lambda p: (p.nbytes, p.microseconds)))

    def peak(self, rung: int) -> int:
        """Bytes that the plans of a rung need."""
        if rung not in self._tried:
            kept: list[int] = []

            def choose(graph: JointGraph) -> Sequence[int]:
                if self._choices is None:
                    self._choices = Choices(make_menus(graph, self.figures))
                kept.extend(kept_nodes(self._choices.menus.segments, list(self.choice(rung).runs)))
                return kept

            modules = self.cut(choose)
            self._tried[rung] = (modules, self.plan(modules))
            log.info("rung %d of %d: %d bytes", rung, RUNGS, self._tried[rung][1].peak.needed)
        return self._tried[rung][1].peak.needed

    def tried(self, rung: int) -> tuple[Modules, Planned]:
        """The cut of a rung, and its plans."""
        self.peak(rung)
        return self._tried[rung]

    def added(self, modules: Modules) -> float:
        """Microseconds that recomputation adds in a cut that was tried."""
        return self.choice(next(n for n, (m, _) in self._tried.items() if m is modules)).microseconds

    def choice(self, rung: int) -> Choice:
        """What the model chooses at a rung."""
        assert self._choices is not None
        most, least = self._choices.fastest, self._choices.least
        if rung == RUNGS:
            return most
        limit = int(least.peak * (most.peak / least.peak) ** (rung / RUNGS))  # every rung higher by the same part
        return self._choices.within(limit) or least


def cannot_be_met(limit: int, least: Planned) -> str:
    """What the error says: the least bytes, and what stands at the peak with the user's lines."""
    peak = least.peak
    plan = least.plans[peak.plan]
    lines = [
        f"the budget of {_size(limit)} cannot be met: the least that a plan of this step needs is {_size(peak.needed)} "
        f"above what was there before it ({peak.needed} bytes)"
    ]
    if peak.reserved > peak.nbytes:
        lines.append(
            f"of which {_size(peak.nbytes)} are alive at once; the rest the device's allocator holds beside them"
        )
    if peak.step < len(plan.order):
        origins = plan.program.by_name[plan.order[peak.step]].origins
        where = next((o.location for o in origins if o.location), "")
        lines.append(f"reached in {plan.program.name} at {plan.order[peak.step]}{' of ' + where if where else ''}")
    lines.append("alive then:")
    rows = alive_at(least.plans, least.joins, peak)
    for nbytes, buffer in rows[:_SHOWN]:
        what = f"{buffer.name} ({buffer.kind.value}) {buffer.origin.location} {buffer.origin.code}"
        lines.append(f"  {_size(nbytes):>10}  {what}".rstrip())
    if len(rows) > _SHOWN:
        lines.append(f"  {_size(sum(n for n, _ in rows[_SHOWN:])):>10}  in {len(rows) - _SHOWN} more")
    lines.append("a smaller batch, or gradients accumulated over parts of it, would need less")
    return "\n".join(lines)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
