"""A forward and its backward planned together, before either is built.

AOTAutograd hands over the forward first, but the joint graph was cut before that, so the backward is known: what the
forward saves is laid out for how the backward drops it. Where a kernel cannot be built, planning starts again for the
program concerned (`memplan.fallback`): the forward's second plan changes what the backward gets, and the backward's
second plan keeps to what the forward does already.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .compilation import Planned, Prepared, Together, plan_prepared, plan_program, prepare_program
from .ir.config import Config
from .ir.errors import MemplanError
from .ir.program import Program, View
from .ir.verify import verify_program
from .ir.verify_plan import verify_plan
from .lowering.lower import NOTHING_KEPT, Kept
from .passes.whole_step import Laid
from .plan_cache import Beside
from .pooling import StepChoice, choose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedAhead:
    """A forward and a backward as a search has planned them already, with the same options but unverified.

    ``programs``: as captured. ``joins``: (buffer of the forward after its passes, backward input that receives it).
    """

    programs: tuple[Program, Program]
    prepared: tuple[Prepared, Prepared]
    joins: tuple[tuple[str, str], ...]
    choice: StepChoice
    planned: tuple[Planned, ...]

    def of(self, program: Program) -> Prepared | None:
        """What was made of this very program; None if another one was planned."""
        return next((p for q, p in zip(self.programs, self.prepared, strict=True) if _same(q, program)), None)


@dataclass
class StepPlanner:
    """Plans of a forward and its backward. ``received``: (position among the forward's results, backward input)."""

    forward_program: Program
    backward_program: Program
    received: tuple[tuple[int, str], ...]
    config: Config
    #: what a search found for both, or for others like them
    ahead: PlannedAhead | None = None
    prepared: dict[tuple[bool, Kept], Prepared] = field(default_factory=dict)
    #: what the forward was last planned with
    forward_kept: Kept = NOTHING_KEPT
    #: the choice made for both; None so far, or where the forward is planned by itself
    choice: StepChoice | None = None
    apart: bool = False
    #: the last plans of both, and what they were made of
    made: tuple[tuple[Prepared, Prepared], StepChoice, tuple[Planned, ...]] | None = None

    def role(self, program: Program) -> Together:
        """How one of the two is compiled."""
        ahead = program is self.forward_program
        other = self.backward_program if ahead else self.forward_program
        return Together(
            self.forward if ahead else self.backward,
            Beside(other, ahead, joined(self.forward_program, self.received)),
            lambda: ahead or self.forward_kept == NOTHING_KEPT,
        )

    def forward(self, kept: Kept = NOTHING_KEPT) -> Planned:
        """The forward's plan, with what is kept as calls."""
        self.forward_kept = kept
        both = self.both(kept)
        if both is None:
            return plan_program(self.forward_program, self.config, kept)
        assert self.choice is not None
        return self.planned(both, self.choice)[0]

    def both(self, kept: Kept) -> tuple[Prepared, Prepared] | None:
        """The two programs, their pools chosen; None where the backward cannot be planned."""
        try:
            found = (self.prepare(True, kept), self.prepare(False, NOTHING_KEPT))
        except MemplanError as error:  # it is said where the program that it concerns is compiled
            log.debug("the forward and the backward are not planned together: %s", error)
            self.choice, self.apart = None, True
            return None
        known = self.known(found)
        self.choice = (
            known.choice
            if known is not None
            else choose(found, self.joins(found[0]), budget=self.config.budget is not None)
        )
        return found

    def known(self, both: tuple[Prepared, Prepared]) -> PlannedAhead | None:
        """What a search has planned, if it was these two."""
        ahead = self.ahead
        if ahead is None or not _identical(ahead.prepared, both):
            return None
        return ahead if ahead.joins == self.joins(both[0]) else None

    def backward(self, kept: Kept = NOTHING_KEPT) -> Planned:
        """The backward's plan after the forward's."""
        if self.choice is None and not self.apart:
            self.both(self.forward_kept)  # the forward came from the cache
        if self.choice is None:
            return plan_program(self.backward_program, self.config, kept)
        ahead, behind = self.prepare(True, self.forward_kept), self.prepare(False, kept)
        if kept == NOTHING_KEPT:
            return self.planned((ahead, behind), self.choice)[1]
        joins = self.joins(ahead)
        members = {m for slab in self.choice.slabs for m in slab.members}
        behind = replace(behind, laid=_leaving_slabs_alone(behind.laid, members))
        chosen = choose((ahead, behind), joins, self.choice, budget=self.config.budget is not None)
        return plan_prepared((ahead, behind), joins, self.config, chosen)[1]

    def planned(self, both: tuple[Prepared, Prepared], choice: StepChoice) -> tuple[Planned, ...]:
        """The plans of both, made once: the forward's is asked for first, and then the backward's."""
        if (
            self.made is None
            or self.made[1] is not choice
            or any(a is not b for a, b in zip(self.made[0], both, strict=True))
        ):
            known = self.known(both)
            if known is not None and known.choice is choice:
                found = known.planned
                for p in found if self.config.verify else ():
                    verify_plan(p.plan, check_program=False)
            else:
                found = plan_prepared(both, self.joins(both[0]), self.config, choice)
            self.made = (both, choice, found)
        return self.made[2]

    def joins(self, ahead: Prepared) -> tuple[tuple[str, str], ...]:
        """(buffer of the forward after its passes, backward input that receives it)."""
        return joined(ahead.laid.program, self.received)

    def prepare(self, forward: bool, kept: Kept) -> Prepared:
        if (forward, kept) not in self.prepared:
            program = self.forward_program if forward else self.backward_program
            found = self.from_search(program) if kept == NOTHING_KEPT else None
            self.prepared[forward, kept] = found or prepare_program(program, self.config, kept)
        return self.prepared[forward, kept]

    def from_search(self, program: Program) -> Prepared | None:
        """What a search has made of the program, verified now; None where every pass is to be seen in a dump."""
        if self.ahead is None or self.config.dump is not None:
            return None
        found = self.ahead.of(program)
        if found is not None and self.config.verify:
            verify_program(found.laid.program)
        return found


def _identical(some: Sequence[object], others: Sequence[object]) -> bool:
    return all(a is b for a, b in zip(some, others, strict=True))


def _leaving_slabs_alone(laid: Laid, members: set[str]) -> Laid:
    """Without in-place reuse that would return a part of a slab to the user."""
    kept: Mapping[str, str] = laid.in_place
    for s in laid.stores:
        if s.root in members and s.lifetime.stop > len(laid.order):
            kept = {new: old for new, old in kept.items() if new not in s.members}
    return replace(laid, in_place=dict(kept))


def _same(a: Program, b: Program) -> bool:
    """Whether two captured programs are equal, name by name, and hold the same constants and callables."""

    def data(p: Program) -> object:
        return p.name, p.phase, tuple(p.buffers.items()), p.operations, p.inputs, p.outputs, dict(p.hints), p.notes

    def objects(p: Program) -> object:
        return [(name, id(held)) for mapping in (p.constants, p.callables) for name, held in mapping.items()]

    return objects(a) == objects(b) and data(a) == data(b)


def joined(forward: Program, received: Sequence[tuple[int, str]]) -> tuple[tuple[str, str], ...]:
    """(buffer of the forward, backward input) from positions among its results; passes may have changed the buffer."""
    found = []
    for position, name in received:
        out = forward.outputs[position]
        if isinstance(out, View):
            found.append((out.buffer, name))
    return tuple(dict.fromkeys(found))
