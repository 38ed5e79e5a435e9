"""Collectives of the library that work in registered memory: all of their buffers lie in an arena, or none does."""

from __future__ import annotations

from dataclasses import replace

from ..ir.communication import GroupFacts, Memory
from ..ir.in_flight import Collective
from ..ir.program import Contract, Extern, Literal, Tuple, View
from .comm_rewriting import Rewriting, flat

_ALL_TO_ALL, _INTO = "_c10d_functional.all_to_all_single.default", "memplan.library_all_to_all.out"


def register(rewriting: Rewriting, op: Collective, position: int, facts: GroupFacts | None) -> str:
    """Lay what the collective works on into registered memory, or say why that cannot be.

    The call stays the library's, and what is in flight until its wait stays so. An all-to-all, which allocates its
    result itself, becomes one into a given buffer.
    """
    if facts is None or facts.unregistered:
        return "nothing is known of its group" if facts is None else facts.unregistered
    changed = _into_given(rewriting, op, facts.size) if op.target == _ALL_TO_ALL else op
    if changed.contract in (Contract.FRESH, Contract.DYNAMIC):
        return "it allocates its result itself"
    names = tuple(dict.fromkeys((*op.reads, *op.writes, *op.mutates)))
    reason = next(filter(None, (_obstacle(rewriting, name, op, position) for name in names)), "")
    if not reason:
        rewriting.operations[position] = (changed,)
        for name in names:
            rewriting.hold(name, op.group, Memory.REGISTERED)
        rewriting.changes += 1
    return reason


def _obstacle(rewriting: Rewriting, name: str, op: Collective, position: int) -> str:
    """Why one of its buffers cannot lie in registered memory, "" if it can."""
    buffer = rewriting.buffers[name]
    if rewriting.leaves(name):
        return f"{name!r} is the caller's, or outlives the program"
    if not isinstance(buffer.nbytes, int):
        return f"the size of {name!r} is known only at the call"
    if buffer.nbytes == 0:
        return f"{name!r} is empty"
    if buffer.memory is not Memory.PLAIN and (buffer.memory, buffer.group) != (Memory.REGISTERED, op.group):
        return f"{name!r} is in the {buffer.memory.value} memory of group {buffer.group!r} already"
    for at in (p for p in rewriting.uses[name] if p != position):
        for other in rewriting.operations[at]:
            if isinstance(other, Collective) and other.group != op.group:
                return f"{other.name!r} uses {name!r} in another group"
            fresh = isinstance(other, Extern) and other.contract in (Contract.FRESH, Contract.DYNAMIC)
            if fresh and name in other.writes:
                return f"{getattr(other, 'target', other.name)} ({other.name!r}) allocates {name!r} itself"
    return ""


def _into_given(rewriting: Rewriting, op: Collective, ranks: int) -> Collective:
    """The all-to-all with its result's buffer given to it, if it is an even one of whole buffers."""
    given, result = op.args[0], op.results[0]
    whole = isinstance(given, View) and result is not None and even(op, ranks)
    if not whole or rewriting.whole_bytes(given) is None or rewriting.whole_bytes(result) is None:  # type: ignore[arg-type]
        return op
    args = (flat(given), Literal(op.group))  # type: ignore[arg-type]
    return replace(op, target=_INTO, args=args, kwargs=(), results=(flat(result),), contract=Contract.OUT)  # type: ignore[arg-type]


def even(op: Collective, ranks: int) -> bool:
    """Whether an all-to-all gives every rank as much, and takes as much from it."""
    for given in op.args[1:3]:
        if not isinstance(given, Tuple) or len(given.items) not in (0, ranks) or len(set(given.items)) > 1:
            return False
        if not all(isinstance(i, Literal) for i in given.items):
            return False
    return True
