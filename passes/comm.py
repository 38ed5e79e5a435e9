"""Communication memory: which collective runs how, which buffers lie in symmetric memory, and where.

`Communication` runs when kernels and calls are what they will be. A collective whose size, dtype and group allow it
becomes an operation on symmetric memory, which peers read and write directly: nothing is copied in or out, since the
operations that make its argument write into the arena, and those that use the result read from it. Three forms:

* in place (two-shot all-reduce, broadcast): the buffer itself lies in the arena, before and after;
* from the arena into another buffer (one-shot all-reduce, and wherever the result may not stay in the arena since it
  outlives the call): what holds the argument is a buffer of its own, in the arena, up to the collective;
* out of the arena (reduce-scatter, all-gather, all-to-all): the argument lies there and stays as it is, the result is
  a buffer like any other.

A coalesced call becomes one operation for each of its tensors, if all of them can. What cannot (a call allocates the
argument itself, it is the caller's, its size is known only at the call) is left to the library: in memory registered
with it where the options ask for that and all its buffers can lie there, else in plain memory, and the program's notes
say why. `place_in_arenas` packs the buffers of each group and type of memory into one arena.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from ..ir.communication import (
    ARENA_MEMORY,
    BUILT_SIZES,
    MULTICAST_KINDS,
    SYMMETRIC_DTYPES,
    GroupFacts,
    Memory,
    collective_form,
)
from ..ir.communication_options import CommunicationOptions
from ..ir.config import Config
from ..ir.in_flight import Collective
from ..ir.plan import Lifetime, Pool
from ..ir.program import Extern, Literal, Program, View
from .comm_registered import even, register
from .comm_rewriting import ALIGNMENT, Rewriting, singles
from .pack import PackProblem, pack_buffers
from .pack_search import PackSearch
from .schedule import Storage, rounded

_TWO_SHOT_IN_PLACE = "symm_mem.two_shot_all_reduce_.default"
_REDUCE_INTO = {
    "one_shot": "symm_mem.one_shot_all_reduce_out.default",
    "two_shot": "symm_mem.two_shot_all_reduce_out.default",
}
_MULTICAST_IN_PLACE = "symm_mem.multimem_all_reduce_.default"
_MULTICAST_INTO = "symm_mem.multimem_one_shot_all_reduce_out.default"
_MULTICAST_GATHER = "symm_mem.multimem_all_gather_out.default"
_SCATTER = "symm_mem.reduce_scatter_out.default"
_BROADCAST_IN_PLACE, _BROADCAST_INTO = "memplan.peer_broadcast_.default", "memplan.peer_broadcast.out"
_MOVES = {"all_gather": "memplan.peer_all_gather.out", "all_to_all": "memplan.peer_all_to_all.out"}
#: calls of one tensor that have a form on symmetric memory
_CALLS = frozenset(
    f"_c10d_functional.{name}.default"
    for name in (
        "all_reduce_", "broadcast_", "all_to_all_single", "all_gather_into_tensor", "all_gather_into_tensor_out",
        "reduce_scatter_tensor", "reduce_scatter_tensor_out",
    )
)  # fmt: skip
#: What adds up takes messages of a whole number of these bytes.
_GRANULE = 4

#: Makes the operation in place of a collective, or says why there is none.
Decision = str | Callable[[], Extern]


@dataclass(frozen=True, slots=True)
class Communication:
    """The pass. Without facts of a group, its collectives are left as they are."""

    name: ClassVar[str] = "comm"
    requires: ClassVar[tuple[str, ...]] = ()
    groups: Mapping[str, GroupFacts] = field(default_factory=dict)
    options: CommunicationOptions = field(default_factory=CommunicationOptions)
    #: why nothing may be on symmetric memory, "" where it may
    refused: str = ""

    @classmethod
    def configured(cls, config: Config) -> Communication:
        return cls({}, config.communication)

    def run(self, program: Program) -> Program:
        rewriting = Rewriting(program)
        for position, op in enumerate(program.operations):
            if isinstance(op, Collective):
                reason = self.rewrite(rewriting, op, position)
                reason = reason and self.left(rewriting, op, position, reason)
                if reason:
                    rewriting.notes.append((op.name, f"{op.target} runs on unregistered memory: {reason}"))
        return rewriting.result()

    def left(self, rewriting: Rewriting, op: Collective, position: int, reason: str) -> str:
        """See to the memory of what is left to the library for a reason; why it is unregistered, "" if it is not."""
        if not self.options.asks_registered:
            return reason
        why = self.refused or self.in_plain(op) or register(rewriting, op, position, self.groups.get(op.group))
        return f"{reason}; with the library, {why}" if why else ""

    def in_plain(self, op: Collective) -> str:
        """Why the options want the library to work in plain memory, "" if they do not."""
        facts, form, given = self.groups.get(op.group), collective_form(op.target), op.args[0]
        if self.options.registered != "auto" or facts is None or facts.unregistered:
            return ""
        if form is None or not isinstance(given, View) or not isinstance(given.numel, int):
            return "its size is known only at the call, or it is a call of several tensors"
        message = _nbytes(given) * (facts.size if form.kind == "all_gather" else 1)
        faster = facts.thresholds.on_registered(form.kind, message)
        return "" if faster else f"plain memory is taken for {message} bytes on {facts.size} ranks"

    def rewrite(self, rewriting: Rewriting, op: Collective, position: int) -> str:
        """Put operations on symmetric memory in place of the collective, or say why not."""
        parts = singles(op)
        decisions = [self.decide(rewriting, part, position) for part in parts]
        reason = next((d for d in decisions if isinstance(d, str)), "")
        if not reason and len({b for part in parts for b in part.reads}) < len(parts):
            reason = "it is given one buffer twice"
        if not reason:
            made = [d() for d in decisions if not isinstance(d, str)]
            rewriting.replaced(position, made)
            self.say_without_multicast(rewriting, op, made)
        return reason

    def say_without_multicast(self, rewriting: Rewriting, op: Collective, made: Sequence[Extern]) -> None:
        """Note where multicast is asked for, and an operation that could use it does not."""
        form = collective_form(op.target)
        without = [new for new in made if "multimem" not in new.target]
        if self.options.multicast and without and form is not None and form.kind in MULTICAST_KINDS:
            why = self.groups[op.group].no_multicast or "its buffers cannot be as that needs them"
            rewriting.notes.append((op.name, f"{without[0].target} runs without multicast: {why}"))

    def decide(self, rewriting: Rewriting, op: Collective, position: int) -> Decision:
        """What becomes of a call of one tensor."""
        form = collective_form(op.target)
        if form is None or op.target not in _CALLS:
            return "it has no form on symmetric memory"
        if self.refused:
            return self.refused
        if self.options.way(form.kind) == "library":
            return "the options ask for the library"
        facts = self.groups.get(op.group)
        if facts is None or facts.obstacle:
            return "nothing is known of its group" if facts is None else facts.obstacle
        view = op.args[0]
        assert isinstance(view, View)
        nbytes = rewriting.whole_bytes(view)
        if not nbytes:
            return (
                "its size is known only at the call, or it is a part of a buffer" if nbytes is None else "it is empty"
            )
        message = nbytes * facts.size if form.kind == "all_gather" else nbytes
        algorithm = self.options.algorithm(form.kind, facts.thresholds, message)
        if algorithm == "library":
            return f"the library is taken for {message} bytes on {facts.size} ranks"
        reason = rewriting.fixed(view.buffer, position, op.group)
        if reason:
            return reason
        match form.kind:
            case "all_reduce":
                return _all_reduce(rewriting, op, position, view, facts, algorithm)
            case "broadcast":
                return _broadcast(rewriting, op, position, view)
        return _moved(rewriting, op, view, facts)


def _unsummable(op: Collective, view: View, facts: GroupFacts) -> str:
    """Why torch's operations on symmetric memory cannot add this up, "" if they can."""
    reduction, nbytes = op.args[1], _nbytes(view)
    if reduction != Literal("sum"):
        return f"only sums can, not {reduction.value if isinstance(reduction, Literal) else reduction!r}"
    if str(view.dtype) not in SYMMETRIC_DTYPES:
        return f"only float32 and bfloat16 can, not {view.dtype}"
    if nbytes % _GRANULE:
        return f"{nbytes} bytes are no multiple of {_GRANULE}"
    return ""


def _nbytes(view: View) -> int:
    assert isinstance(view.numel, int)
    return view.numel * view.dtype.itemsize


def _all_reduce(
    rewriting: Rewriting, op: Collective, position: int, view: View, facts: GroupFacts, algorithm: str
) -> Decision:
    reason = _unsummable(op, view, facts)
    if reason:
        return reason
    options = (Literal("sum"), Literal(op.group))
    if not facts.no_multicast:
        if algorithm == "two_shot" and rewriting.may_stay(view.buffer):
            return partial(rewriting.in_place, op, _MULTICAST_IN_PLACE, view, options)
        return partial(rewriting.from_arena, op, position, _MULTICAST_INTO, view, options, spoils=False)
    if algorithm == "two_shot" and rewriting.may_stay(view.buffer):
        return partial(rewriting.in_place, op, _TWO_SHOT_IN_PLACE, view, options)
    if algorithm == "two_shot" and facts.size not in BUILT_SIZES:
        return f"its result is returned, and two-shot does not write elsewhere on {facts.size} ranks"
    target, spoils = _REDUCE_INTO[algorithm], algorithm == "two_shot"
    return partial(rewriting.from_arena, op, position, target, view, options, spoils=spoils)


def _broadcast(rewriting: Rewriting, op: Collective, position: int, view: View) -> Decision:
    source = op.args[1]
    if not isinstance(source, Literal):
        return "the rank that it comes from is known only at the call"
    options = (source, Literal(op.group))
    if rewriting.may_stay(view.buffer):
        return partial(rewriting.in_place, op, _BROADCAST_IN_PLACE, view, options)
    return partial(rewriting.from_arena, op, position, _BROADCAST_INTO, view, options, spoils=False)


def _moved(rewriting: Rewriting, op: Collective, view: View, facts: GroupFacts) -> Decision:
    """All-gather, all-to-all, reduce-scatter: from the arena into the result, or through multicast into the arena."""
    form, result = collective_form(op.target), op.results[0]
    assert form is not None
    if result is None or rewriting.whole_bytes(result) is None:
        return "its result is a part of a buffer"
    if form.kind == "all_gather" and not facts.no_multicast and _multicast_takes(rewriting, result, facts.size):
        return partial(rewriting.into_arena, op, _MULTICAST_GATHER, view, result, (Literal(op.group),))
    if not rewriting.may_stay(view.buffer):
        return f"{view.buffer!r} outlives the program, or other collectives use it"
    if form.kind == "reduce_scatter":
        reason = _unsummable(op, view, facts)
        if reason or facts.size not in BUILT_SIZES:
            return reason or f"it is not built for {facts.size} ranks"
        reason = _in_uneven_steps(_nbytes(view), facts.size)
        if reason:
            return reason
        return partial(rewriting.out_of_arena, op, _SCATTER, view, result, (Literal(op.group), Literal(False)))
    if form.kind == "all_to_all" and not even(op, facts.size):
        return "ranks may give and take different numbers of elements"
    return partial(rewriting.out_of_arena, op, _MOVES[form.kind], view, result, (Literal(op.group),))


def _multicast_takes(rewriting: Rewriting, result: View, ranks: int) -> bool:
    """Whether an all-gather through multicast can have this result: in the arena, in parts of whole steps."""
    nbytes = _nbytes(result)
    return rewriting.may_stay(result.buffer) and nbytes % _GRANULE == 0 and not _in_uneven_steps(nbytes, ranks)


def _in_uneven_steps(message: int, ranks: int) -> str:
    """Why torch's kernels cannot part a message among ranks, "" if they can.

    They take 4, 8 or 16 bytes at once, as many as divide the message, and each rank a whole number of times.
    """
    step = next(n for n in (16, 8, 4, 1) if message % n == 0)
    return f"{message} bytes are not {ranks} times a multiple of {step}" if message % (step * ranks) else ""


def place_in_arenas(
    program: Program, steps: int, stores: Sequence[Storage], native: PackSearch | None
) -> tuple[tuple[Pool, ...], dict[str, tuple[str, int]]]:
    """One arena for each device, group and type of memory, and for each storage in one: (arena, offset in bytes).

    Lifetimes in it are those of the plan: every operation on symmetric memory ends with a barrier of all ranks, and a
    library has done with memory when its wait has, so what is dead here is not read there.
    """
    wanted: dict[tuple[str, str, str], list[Storage]] = {}
    for s in stores:
        b = program.buffers[s.root]
        if b.memory in ARENA_MEMORY:
            wanted.setdefault((b.device, b.group, b.memory.value), []).append(s)
    pools: list[Pool] = []
    offsets: dict[str, tuple[str, int]] = {}
    for number, ((device, group, memory), inside) in enumerate(sorted(wanted.items(), key=lambda found: found[0])):
        problem = PackProblem(
            tuple(s.lifetime.start for s in inside),
            tuple(s.lifetime.stop for s in inside),
            tuple(-(-s.nbytes // ALIGNMENT) * ALIGNMENT for s in inside),
            ALIGNMENT,
        )
        packing = pack_buffers(problem, native=native)
        name = f"arena{number}"
        nbytes = rounded(packing.arena, device)
        pools.append(Pool(name, nbytes, device, Lifetime(0, steps + 1), Memory(memory), group))
        offsets.update((s.root, (name, at)) for s, at in zip(inside, packing.offsets, strict=True))
    return tuple(pools), offsets
