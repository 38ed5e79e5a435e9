"""Joins the parts of communication: facts of groups for the planner, and agreement and arenas for what it made."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .ir.communication import SYMMETRIC_FORMS, GroupFacts, Thresholds, collective_form
from .ir.config import Config
from .ir.errors import CommunicationError
from .ir.in_flight import Collective
from .ir.plan import InPool, Plan
from .ir.program import Extern, Literal, Operation, Program, Symbolic, View, argument_views
from .runtime.agreement import agree
from .runtime.cache import Cache
from .runtime.communication_times import calibrate
from .runtime.groups import forget_facts, group_facts
from .runtime.symmetric import ArenaUse, resolve


def facts_of(program: Program, config: Config) -> dict[str, GroupFacts]:
    """Facts of the groups in which a program communicates."""
    found: dict[str, GroupFacts] = {}
    if not config.communication.asks_symmetric:
        return found  # nothing hangs on them
    for op in program.operations:
        if isinstance(op, Collective) and op.group not in found:
            ask = config.communication.agree and not config.plan_only
            facts = group_facts(
                op.group, with_index(op.device), ask=ask, cache=_cache(config), seconds=config.communication.timeout
            )
            if facts is not None:
                found[op.group] = facts
    return found


def calibrate_communication(
    group: dist.ProcessGroup | None = None, device: str = "cuda", *, cache_dir: str | None = None
) -> Thresholds:
    """Time all-reduces on this machine, so that programs compiled afterwards take the fastest for each message.

    Call it on all ranks of ``group`` (by default: of the default group) before compiling. The result is kept in the
    cache for groups of this size on this kind of device; all ranks go by rank 0's. Takes seconds.

    Raises
    ------
    CommunicationError
        If the group has no symmetric memory.
    """
    found = dist.group.WORLD if group is None else group
    if found is None:
        raise CommunicationError("there is no process group yet: call init_process_group first")
    made = calibrate(found, with_index(device), Cache(cache_dir) if cache_dir else Cache())
    forget_facts(found)
    return made


def _cache(config: Config) -> Cache:
    return Cache(config.cache_dir) if config.cache_dir else Cache()


def with_index(device: str) -> torch.device:
    """The device; of a GPU without a number the current one."""
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def communication_lines(plan: Plan) -> dict[str, tuple[str, ...]]:
    """What the ranks of each group must have in common, by group: arenas, then communication in the plan's order.

    Names of groups and devices, and numbers that ranks may rightly have of their own, are left out.
    """
    found: dict[str, list[str]] = {}
    for name in plan.order:
        op = plan.program.by_name[name]
        group = group_of(op)
        if group is not None:
            found.setdefault(group, []).append(_line(plan, op))
    for pool in plan.arenas:
        found[pool.group].append(f"an arena of {pool.nbytes} bytes")
    return {group: tuple(lines) for group, lines in found.items()}


def group_of(op: Operation) -> str | None:
    """The group in which an operation communicates, if it does."""
    if isinstance(op, Collective):
        return op.group
    if isinstance(op, Extern) and op.target in SYMMETRIC_FORMS:
        return str(next(a.value for a in reversed(op.args) if isinstance(a, Literal) and isinstance(a.value, str)))
    return None


def _line(plan: Plan, op: Operation) -> str:
    assert isinstance(op, Extern)
    form = collective_form(op.target)
    if form is not None and form.uneven:
        return form.kind
    parts = [op.target]
    for view in argument_views(op.args):
        parts.append(f"{view.numel if isinstance(view.numel, int) else 'some'} of {view.dtype}{_place(plan, view)}")
    group = group_of(op)
    parts += [str(a.value) for a in op.args if isinstance(a, Literal) and a.value != group]
    parts += ["some" for a in op.args if isinstance(a, Symbolic)]
    return ", ".join(parts)


def _place(plan: Plan, view: View) -> str:
    place = plan.placements[plan.storage_of(view.buffer)]
    arenas = {p.name for p in plan.arenas}
    return f" at {place.offset} of the arena" if isinstance(place, InPool) and place.pool in arenas else ""


#: by group what all of its ranks have agreed on before
_settled: weakref.WeakKeyDictionary[dist.ProcessGroup, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Communicating:
    """A program that communicates: its ranks agree before it is called first, and when an arena is missing.

    A program without an arena that communicates as an earlier one did (the same collectives in the same order) goes by
    that one's agreement: where shapes differ from rank to rank, ranks recompile by themselves, and the others do not
    come. With an arena all ranks have to come: one may still have the memory of a program that another has freed.
    """

    plan: Plan
    config: Config
    uses: dict[str, ArenaUse] = field(default_factory=dict)  # by group
    agreed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, plan: Plan, config: Config) -> Communicating | None:
        """None where the plan does not communicate."""
        if not any(group_of(op) is not None for op in plan.program.operations):
            return None
        made = cls(plan, config)
        for pool in plan.arenas:
            assert isinstance(pool.nbytes, int)
            made.uses[pool.group] = ArenaUse(pool.group, str(with_index(pool.device)), pool.nbytes, made.renew)
        return made

    def names(self) -> Mapping[str, Callable[..., object]]:
        """What the wrapper calls to have its arenas."""
        return {f"{pool.name}_memory": self.uses[pool.group] for pool in self.plan.arenas}

    def guarded(self, call: Callable[..., object]) -> Callable[..., object]:
        """The call, after an agreement the first time."""

        uses = tuple(self.uses.values())

        def agreeing(args: list[object]) -> object:
            if not self.agreed:
                with self.lock:
                    if not self.agreed:
                        self.renew()
            out = call(args)
            for use in uses:
                use.arena.done()
            return out

        agreeing._boxed_call = True  # type: ignore[attr-defined]
        return agreeing

    def renew(self) -> None:
        """Agree with the other ranks of each group on what is about to happen, and on the size of its arena.

        Raises
        ------
        CommunicationError
            If a rank has other plans or does not come, or a group does not exist.
        """
        try:
            for name, lines in communication_lines(self.plan).items():
                self.agree_in(name, lines)
        except CommunicationError:
            for use in self.uses.values():
                use.leave()
            raise
        self.agreed = True

    def agree_in(self, name: str, lines: Sequence[str]) -> None:
        """`renew` for one group."""
        group = resolve(name)
        if group is None:
            raise CommunicationError(
                f"{self.plan.program.name} communicates in process group {name!r}, which does not exist (any more): "
                "call init_process_group, and compile again"
            )
        use = self.uses.get(name)
        options = self.config.communication
        if torch.distributed.get_backend(group) == "fake" or (not options.agree and use is None):
            return
        arena = None if use is None else use.arena
        settled = _settled.setdefault(group, set())
        if use is None and tuple(lines) in settled:
            return
        state = [0, 0, 0] if arena is None else [arena.needed, arena.capacity, arena.generation]
        told = agree(group, self.plan.program.name, lines, json.dumps(state), options.timeout)
        settled.add(tuple(lines))
        if arena is None:
            return
        needed, capacity, generations = zip(*map(json.loads, told), strict=True)
        if min(capacity) < max(needed) or len(set(generations)) > 1:
            arena.grow(max(needed), max(generations) + 1)
