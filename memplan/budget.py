"""The fastest training step within a budget of bytes.

What is held to the budget is what must be there for the step to run: on a GPU the bytes that its caching allocator
reserves, by simulation, elsewhere those that are alive.

Menus and a first choice come from a model of the step (`memplan.passes.remat_choice`); what a choice really needs is
what its plans say, so choices are cut, captured and planned as they will run, and the limit given to the model is
moved until the plans' own peak is as near to the budget as it gets. Where little is allowed, losses are computed in
smaller slices too: what a slice of logits takes is alive when all saved tensors are.

Monotone: the limits tried are a fixed ladder from the least to the fastest choice, walked by halving, and of the plans
within the budget the one with the highest peak is taken. Two budgets take the same way down to a rung that is within
the larger one and not within the smaller; from there on the larger has a plan with that rung's peak, the smaller none
that high. So a smaller budget never gives a higher peak, whatever the model gets wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.fx

from .capture.partition import Cutter
from .ir.device import DeviceFigures
from .ir.errors import PlanningError
from .ir.joint import JointGraph
from .ir.plan import Plan
from .ir.program import Origin
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
#: Slices of logits that a limit should have room for, if they can be made so small: two are alive at once, one of them
#: with a gradient of the weights that is as large as a slice of a few thousand tokens.
SLICES = 16
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
    """A search: ``cut`` makes forward and backward, with the nodes kept that a choice over the joint graph names, and
    losses in slices of a given size; ``plan`` plans them."""

    limit: int
    figures: DeviceFigures
    cut: Cutter
    plan: Callable[[Modules], Planned]
    #: what can be chosen, by the size of the losses' slices
    _choices: dict[int, Choices] = field(default_factory=dict)
    #: the size of the losses' slices of rungs that were cut
    _chunks: dict[int, int] = field(default_factory=dict)
    _cuts: dict[int, Modules] = field(default_factory=dict)
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
            added = self.choice(rung).microseconds
            alone = self._choices[self._chunks[rung]].menus.segments.graph.microseconds
            found.append(CurvePoint(nbytes, alone + added, added))
        return tuple(sorted(found, key=lambda p: (p.nbytes, p.microseconds)))

    def peak(self, rung: int) -> int:
        """Bytes that the plans of a rung need."""
        if rung not in self._tried:
            modules = self._modules(rung)
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
        if rung not in self._chunks:
            self._modules(rung)
        return self._choice(rung) or self._choices[self._chunks[rung]].least

    def _choice(self, rung: int) -> Choice | None:
        """`choice` with slices of the size that the rung has, or is tried with; None if the model finds none."""
        choices = self._choices[self._chunks[rung]]
        if rung in (0, RUNGS):
            return choices.least if rung == 0 else choices.fastest
        return choices.within(self._limit(rung))

    def _limit(self, rung: int) -> int:
        """The model's limit at a rung: every one higher by the same part."""
        sizes = self.cut.loss_chunks
        for end, size in ((RUNGS, sizes[0]), (0, sizes[-1])):
            if size not in self._choices:
                self._modules(end)
        most, least = self._choices[sizes[0]].fastest.peak, self._choices[sizes[-1]].least.peak
        return int(least * (most / least) ** (rung / RUNGS))

    def _modules(self, rung: int) -> Modules:
        """The cut of a rung: with slices as large as its limit has room for, or smaller if that is not enough."""
        if rung not in self._cuts:
            sizes = self.cut.loss_chunks
            if rung == RUNGS:
                sizes = sizes[:1]
            elif rung == 0:
                sizes = sizes[-1:]
            else:
                limit = self._limit(rung)
                sizes = tuple(n for n in sizes if SLICES * n <= limit) or sizes[-1:]
            for size in sizes:
                self._chunks[rung] = size
                self._cuts[rung] = self.cut(partial(self._kept, rung, size), size)
                if self._choice(rung) is not None:
                    break
        return self._cuts[rung]

    def _kept(self, rung: int, size: int, graph: JointGraph) -> Sequence[int]:
        """Nodes to keep at a rung, of a joint graph with losses in slices of a size."""
        if size not in self._choices:
            self._choices[size] = Choices(make_menus(graph, self.figures))
        return kept_nodes(self._choices[size].menus.segments, list(self.choice(rung).runs))


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
        where = next((o.location for o in origins if o.location), "") or next((_module(o) for o in origins), "")
        lines.append(f"reached in {plan.program.name} at {plan.order[peak.step]}{' of ' + where if where else ''}")
    lines.append("alive then:")
    rows = alive_at(least.plans, least.joins, peak)
    for nbytes, buffer in rows[:_SHOWN]:
        where = buffer.origin.location or _module(buffer.origin)
        what = f"{buffer.name} ({buffer.kind.value}) {where} {buffer.origin.code}"
        lines.append(f"  {_size(nbytes):>10}  {what}".rstrip())
    if len(rows) > _SHOWN:
        lines.append(f"  {_size(sum(n for n, _ in rows[_SHOWN:])):>10}  in {len(rows) - _SHOWN} more")
    lines.append("a smaller batch, or gradients accumulated over parts of it, would need less")
    return "\n".join(lines)


def _module(origin: Origin) -> str:
    """The module that it comes from, where no line of the user's is known: layers of torch's own in a row."""
    return f"module {origin.module}" if origin.module else ""


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
