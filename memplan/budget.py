"""The fastest training step within a budget of bytes.

What is held to the budget is what must be there for the step to run: on a GPU the bytes that its caching allocator
reserves, by simulation, elsewhere those that are alive.

Menus and a first choice come from a model of the step (`memplan.passes.remat_choice`); what a choice really needs is
what its plans say, so choices are cut, captured and planned as they will run, and the limit given to the model is
moved until the plans' own peak is as near to the budget as it gets. Where little is allowed, losses are computed in
smaller slices too: what a slice of logits takes is alive when all saved tensors are.

The limits tried are those of a ladder of whole powers (`STEP`). The model is off by nearly the same in plans that are
nearly the same, so the second rung that is tried is mostly the right one, and in a deep model the first.

Monotone: budgets that differ by less than a *level* (`LEVEL`) are one. A plan that uses its level, that is, which needs
more than the level below allows, needs more than any of a smaller budget; where none is found that does, the one found
for the level below is taken if it needs more. So a smaller budget never gives a higher peak, whatever the model gets
wrong, but for the fastest plan, which is tried only where the model is not off by more than a fifth (`SURE`).
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.fx

from .capture.partition import Cutter
from .ir.device import DeviceFigures
from .ir.errors import PlanningError
from .ir.plan import Plan
from .ir.program import Origin
from .passes.remat_choice import Choice, Choices
from .passes.remat_menu import kept_nodes, make_menus
from .passes.step_peak import StepPeak, alive_at

if TYPE_CHECKING:
    from .step_planning import PlannedAhead

log = logging.getLogger(__name__)
#: A forward and its backward.
Modules = tuple[torch.fx.GraphModule, torch.fx.GraphModule]

#: Ratio of the limits of two rungs; the highest rung, of the fastest choice, has none, and rung 0 has the least choice.
STEP = 1.005
RUNGS = 8192
LIMITS = tuple(int(STEP**rung) for rung in range(RUNGS))
#: Points of a curve over all budgets, the fastest choice aside.
CURVE = 16
#: Ratio of two levels of budgets: a plan is looked for that needs at least its level's part of it.
LEVEL = 1.015
#: Part of the budget that plans are expected to need beyond what the model says.
EXPECTED = 0.01
#: Rungs that one search tries at most, and after how many it stops going by the model.
PROBES, GUESSES = 10, 5
#: Part of the model's peak that the fastest choice's plans need at least: they are made if a budget has that much.
SURE = 0.8
#: Slices of logits that a limit should have room for, if they can be made so small: two are alive at once, one of them
#: with a gradient of the weights that is as large as a slice of a few thousand tokens.
SLICES = 16
_SHOWN = 6


@dataclass(frozen=True)
class Planned:
    """The plans of one way to cut the step; ``joins`` is backward buffer -> forward buffer.

    ``ahead``: what the step can be compiled from without being planned again, if this way is taken.
    """

    plans: Sequence[Plan]
    joins: Mapping[str, str]
    peak: StepPeak
    ahead: PlannedAhead | None = None


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
    #: of rungs that were looked at: the size of the losses' slices, what the model chooses, and the nodes kept by it
    _chunks: dict[int, int] = field(default_factory=dict)
    _chosen: dict[int, Choice] = field(default_factory=dict)
    _kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _tried: dict[int, tuple[Modules, Planned]] = field(default_factory=dict)

    def search(self) -> tuple[Modules, Planned]:
        """The fastest cut if its plans are within the limit, else one whose plans need as much of it as was found.

        Raises
        ------
        PlanningError
            If no plan is within the limit: the least bytes that one needs, and what stands at its peak.
        """
        if SURE * self._fastest_peak() <= self.limit and self.peak(RUNGS) <= self.limit:
            return self._tried[RUNGS]
        rung = self._best(_level(self.limit))
        if rung is None:
            if self.peak(0) > self.limit:
                least = min((p for _, p in self._tried.values()), key=lambda p: p.peak.needed)
                raise PlanningError(cannot_be_met(self.limit, least))
            rung = 0
        return self._tried[rung]

    def _best(self, level: int) -> int | None:
        """A rung within a level of the budget; its plans need no fewer bytes than those of any level below."""
        best = self._probed(_bytes(level))
        while best is not None and self.peak(best) < _bytes(level - 1):
            # nothing that uses this level was found: what a budget of the one below takes may be more
            level -= 1
            other = self._probed(_bytes(level))
            if other is None:
                break
            best = max(best, other, key=self.peak)
        return best

    def _probed(self, limit: int) -> int | None:
        """A rung whose plans need ``limit`` bytes or a little less; if none was found, the nearest below.

        Where the model's limits would lead is tried, corrected by how far it was off in the plans before, and then the
        middle of what is left.
        """
        low, high = -1, RUNGS
        off = int(EXPECTED * limit)
        fitting: list[int] = []
        for attempt in range(PROBES):
            if high - low <= 1:
                break
            guess = rung_of(limit - off) if attempt < GUESSES else (low + high) // 2
            rung = min(max(guess, low + 1), high - 1)
            needed = self.peak(rung)
            off = needed - LIMITS[rung]
            if needed > limit:
                high = rung
                continue
            low = rung
            fitting.append(rung)
            if needed * LEVEL >= limit:
                break
        return max(fitting, key=self.peak, default=None)

    def curve(self) -> tuple[CurvePoint, ...]:
        """Peaks and times from the least choice to the fastest."""
        found = []
        for rung in self.spread(CURVE):
            nbytes = self.peak(rung)
            added = self.choice(rung).microseconds
            alone = self._choices[self._chunks[rung]].menus.segments.graph.microseconds
            found.append(CurvePoint(nbytes, alone + added, added))
        return tuple(sorted(found, key=lambda p: (p.nbytes, p.microseconds)))

    def spread(self, count: int) -> tuple[int, ...]:
        """The fastest choice's rung, and others at equal ratios down to the least choice's: ``count`` beside it."""
        sizes = self.cut.loss_chunks
        least = rung_of(self.choices(sizes[-1]).least.peak)
        most = max(least + 1, rung_of(self.choices(sizes[0]).fastest.peak))
        between = (least + (most - least) * k // count for k in range(count - 1, 0, -1))
        return tuple(dict.fromkeys((RUNGS, *between, 0)))

    def peak(self, rung: int) -> int:
        """Bytes that the plans of a rung need."""
        return self.tried(rung)[1].peak.needed

    def tried(self, rung: int) -> tuple[Modules, Planned]:
        """The cut of a rung, and its plans: one and the same for rungs at which the model chooses the same."""
        if rung not in self._tried:
            self.choice(rung)
            size, kept = self._chunks[rung], self._kept[rung]
            alike = (n for n in self._tried if (self._chunks[n], self._kept[n]) == (size, kept))
            same = next(alike, None)
            if same is None:
                modules = self.cut(lambda graph: kept, size)
                self._tried[rung] = (modules, self.plan(modules))
                log.info("rung %d of %d: %d bytes", rung, RUNGS, self._tried[rung][1].peak.needed)
            else:
                self._tried[rung] = self._tried[same]
        return self._tried[rung]

    def added(self, modules: Modules) -> float:
        """Microseconds that recomputation adds in a cut that was tried."""
        return self.choice(next(n for n, (m, _) in self._tried.items() if m is modules)).microseconds

    def choice(self, rung: int) -> Choice:
        """What the model chooses at a rung: with slices as large as its limit has room for, or smaller if need be."""
        if rung not in self._chosen:
            sizes = self.cut.loss_chunks
            if rung == RUNGS:
                size, found = sizes[0], self.choices(sizes[0]).fastest
            elif rung == 0:
                size, found = sizes[-1], self.choices(sizes[-1]).least
            else:
                size, found = self._within(LIMITS[rung])
            self._chunks[rung], self._chosen[rung] = size, found
            self._kept[rung] = kept_nodes(self.choices(size).menus.segments, list(found.runs))
        return self._chosen[rung]

    def _within(self, limit: int) -> tuple[int, Choice]:
        for size in self._sizes(limit):
            found = self.choices(size).within(limit)
            if found is not None:
                return size, found
        size = self.cut.loss_chunks[-1]
        return size, self.choices(size).least

    def _sizes(self, limit: int) -> tuple[int, ...]:
        """Sizes of the losses' slices that a limit may have room for."""
        sizes = self.cut.loss_chunks
        return tuple(n for n in sizes if SLICES * n <= limit) or sizes[-1:]

    def _fastest_peak(self) -> int:
        """The model's peak of the fastest choice, or a little less: slices may be smaller than that one's."""
        return self.choices(self._sizes(self.limit)[0]).fastest.peak

    def choices(self, size: int) -> Choices:
        """What can be chosen with losses in slices of a size."""
        if size not in self._choices:
            self._choices[size] = Choices(make_menus(self.cut.read(size), self.figures))
        return self._choices[size]


def rung_of(limit: int) -> int:
    """The highest rung with a limit within this one."""
    return max(0, bisect.bisect_right(LIMITS, limit) - 1)


def _bytes(level: int) -> int:
    """The budget that those of a level are taken for: the least of them."""
    return math.ceil(LEVEL**level)


def _level(limit: int) -> int:
    """The level of a budget."""
    level = max(0, int(math.log(limit, LEVEL)) - 1)
    while _bytes(level + 1) <= limit:
        level += 1
    return level


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
