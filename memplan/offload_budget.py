"""A budget that may take saved tensors to the host: how much to compute again, and how much to offload beside it.

For some cuts of the step, from the one that computes least again to the one that keeps least, a model says which saved
tensors on the host bring the peak within the budget and how long the step waits for their copies
(`memplan.passes.offload_choice`). The cut that adds least time is planned with its copies; what the plans say counts.
Recomputation alone is taken where that adds no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.fx

from .budget import RUNGS, Budget, CurvePoint, Modules, Planned, cannot_be_met, rung_of
from .calibration import copy_figures
from .capture.partition import OFFLOADED
from .ir.config import Config
from .ir.errors import OptionError, PlanningError
from .ir.program import Program
from .passes import offload_choice
from .passes.offload import can_offload, communicates
from .passes.offload_choice import OffloadModel

log = logging.getLogger(__name__)

#: Rungs of the budget's ladder that are tried with offload, beside the fastest choice's.
TRIED = 6
#: Part of the budget that a plan should use for the search to end.
CLOSE = 0.97
#: Plans of one cut with more or less on the host.
ATTEMPTS = 4
#: How far over the budget the least of a model may be for its plans to be tried all the same.
FAR = 1.2
#: Part of the budget by which the model's limit is lowered beyond what plans were over it.
STEP = 0.002


@dataclass(frozen=True, slots=True)
class Taken:
    """A cut with offload whose plans are within the budget; microseconds that it adds to the step."""

    modules: Modules
    names: tuple[str, ...]
    planned: Planned
    microseconds: float


@dataclass
class OffloadBudget:
    """A search. ``model`` models a planned cut, ``plan`` plans it with some of what it saves on the host."""

    budget: Budget
    model: Callable[[Modules, Planned], OffloadModel]
    plan: Callable[[Modules, Sequence[str]], Planned]
    least: Planned | None = None

    def search(self) -> tuple[Modules, Planned]:
        """The cut that adds least time; its forward says what goes to the host.

        Raises
        ------
        PlanningError
            If nothing is within the budget: the least bytes, and what stands at its peak.
        """
        budget = self.budget
        if budget.peak(RUNGS) <= budget.limit:
            return budget.tried(RUNGS)
        taken = self.offloading()
        below = rung_of(budget.choice(RUNGS).peak) - 1
        if taken is not None and taken.microseconds <= budget.choice(below).microseconds:
            return chosen(taken)
        try:
            alone = budget.search()
        except PlanningError as error:
            if taken is not None:
                return chosen(taken)
            if self.least is not None:
                raise PlanningError(cannot_be_met(budget.limit, self.least)) from error
            raise
        if taken is not None and taken.microseconds < budget.added(alone[0]):
            return chosen(taken)
        return alone

    def curve(self) -> tuple[CurvePoint, ...]:
        """`Budget.curve`, and the tried cuts with half of what helps on the host, and with all of it."""
        found = list(self.budget.curve())
        alone = found[0].microseconds - found[0].recomputation
        for rung in self.budget.spread(TRIED):
            modules, without = self.budget.tried(rung)
            model, again = self.model(modules, without), self.budget.choice(rung).microseconds
            most = len(model.least().names)
            for count in sorted({most // 2, most} - {0}):
                taken = model.taking(count)
                nbytes = self.plan(modules, taken.names).peak.needed
                on_host = sum(c.nbytes for c in model.candidates[:count])
                found.append(CurvePoint(nbytes, alone + again + taken.microseconds, again, on_host))
        return tuple(sorted(found, key=lambda p: (p.nbytes, p.microseconds)))

    def offloading(self) -> Taken | None:
        """The cut with offload that adds least time."""
        best: Taken | None = None
        for rung in self.budget.spread(TRIED):
            nbytes = self.budget.peak(rung)
            again = self.budget.choice(rung).microseconds
            if nbytes <= self.budget.limit or (best is not None and again >= best.microseconds):
                break  # recomputation is enough from here on down, or costs more by itself
            found = self.planned(rung, again)
            if found is not None and (best is None or found.microseconds < best.microseconds):
                best = found
        return best

    def planned(self, rung: int, again: float) -> Taken | None:
        """A rung's cut with so much on the host that its plans are within the budget."""
        modules, without = self.budget.tried(rung)
        model = self.model(modules, without)
        limit, bias = self.budget.limit, 0
        best: Taken | None = None
        tried: set[int] = set()
        for _ in range(ATTEMPTS):
            found = model.within(limit - bias) or model.least()
            if not found.names or len(found.names) in tried or found.peak + bias > FAR * limit:
                break
            tried.add(len(found.names))
            planned = self.plan(modules, found.names)
            nbytes = planned.peak.needed
            log.info("rung %d with %d offloaded: %d bytes", rung, len(found.names), nbytes)
            if self.least is None or nbytes < self.least.peak.needed:
                self.least = planned
            if nbytes <= limit and (best is None or len(found.names) < len(best.names)):
                best = Taken(modules, found.names, planned, again + found.microseconds)
            if CLOSE * limit <= nbytes <= limit:
                break
            # pools make what the plans need differ from the model
            bias = nbytes - found.peak + (int(STEP * limit) if nbytes > limit else 0)
        return best


def chosen(taken: Taken) -> tuple[Modules, Planned]:
    """The cut, whose forward says what goes to the host, and its plans."""
    log.info("%d saved tensors are offloaded, for %.0f us", len(taken.names), taken.microseconds)
    taken.modules[0].meta[OFFLOADED] = taken.names
    return taken.modules, taken.planned


def model_of(
    program: Program, forward_outputs: int, modules: Modules, planned: Planned, config: Config
) -> OffloadModel:
    """What taking saved tensors of a planned cut to the host would do; ``program`` is its forward as captured."""
    outputs = modules[0].graph.output_node().args[0]
    allowed = (
        n.name
        for k, n in enumerate(outputs)  # type: ignore[arg-type]
        if isinstance(n, torch.fx.Node) and k >= forward_outputs and can_offload(program, k)
    )
    talks = any(communicates(p.program) for p in planned.plans)
    device = offload_device(program)
    return OffloadModel.of(
        planned.plans,
        planned.joins,
        planned.peak.series,
        frozenset() if talks else frozenset(allowed),
        copy_figures(device, config),
        device,
        offload_choice.LEAST,
    )


def offload_device(program: Program) -> str:
    """The device that offload takes memory off: the first that is not the host."""
    return next((b.device for b in program.buffers.values() if b.device != "cpu"), "cpu")


def check_offload(device: str) -> None:
    """Refuse offload where there is no other memory than the host's.

    Raises
    ------
    OptionError
        On a CPU.
    """
    if not device.startswith("cuda"):
        raise OptionError(f"option 'offload' takes tensors from a GPU to its host; this step runs on {device}")
