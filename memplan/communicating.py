"""Joins the parts of communication: facts of groups for the planner, and agreement and arenas for what it made."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
import torch.distributed as dist

from .ir.communication import SYMMETRIC_FORMS, GroupFacts, Thresholds, collective_form
from .ir.config import Config
from .ir.errors import CommunicationError
from .ir.in_flight import Collective
from .ir.plan import InPool, Plan
from .ir.program import Extern, Literal, Operation, Program, Symbolic, View, argument_views
from .runtime.agreement import agree
from .runtime.arenas import ArenaUse
from .runtime.cache import Cache
from .runtime.communication_times import calibrate
from .runtime.groups import forget_facts, group_facts
from .runtime.process_groups import in_common_order, resolve


def facts_of(program: Program, config: Config) -> dict[str, GroupFacts]:
    """Facts of the groups in which a program communicates."""
    options = config.communication
    if not (options.asks_symmetric or options.asks_registered):
        return {}  # nothing hangs on them
    devices = {op.group: op.device for op in program.operations if isinstance(op, Collective)}
    found: dict[str, GroupFacts] = {}
    for group in in_common_order(devices):
        ask = options.agree and not config.plan_only
        facts = group_facts(group, with_index(devices[group]), options, ask=ask, cache=_cache(config))
        if facts is not None:
            found[group] = facts
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
        found[pool.group].append(f"an arena of {pool.nbytes} bytes of {pool.memory.value} memory")
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
    memory = {p.name: p.memory for p in plan.arenas}.get(place.pool) if isinstance(place, InPool) else None
    return "" if memory is None else f" at {place.offset} of the {memory.value} arena"  # type: ignore[union-attr]


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
    uses: dict[str, ArenaUse] = field(default_factory=dict)  # by arena's name
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
            device = str(with_index(pool.device))
            made.uses[pool.name] = ArenaUse(pool.group, device, pool.nbytes, made.renew, pool.memory)
        return made

    def names(self) -> Mapping[str, Callable[..., object]]:
        """What the wrapper calls to have its arenas."""
        return {f"{name}_memory": use for name, use in self.uses.items()}

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
        """Agree with the other ranks of each group on what is about to happen, and on the sizes of its arenas.

        Raises
        ------
        CommunicationError
            If a rank has other plans or does not come, or a group does not exist.
        """
        lines = communication_lines(self.plan)
        try:
            for name in in_common_order(lines):
                self.agree_in(name, lines[name])
        except CommunicationError:
            for use in self.uses.values():
                use.leave()
            raise
        self.agreed = True

    def agree_in(self, name: str, lines: tuple[str, ...]) -> None:
        """`renew` for one group."""
        group = resolve(name)
        if group is None:
            raise CommunicationError(
                f"{self.plan.program.name} communicates in process group {name!r}, which does not exist (any more): "
                "call init_process_group, and compile again"
            )
        arenas = [use.arena for use in self.uses.values() if use.group == name]
        options = self.config.communication
        if dist.get_backend(group) == "fake" or (not options.agree and not arenas):
            return
        settled = _settled.setdefault(group, set())
        if not arenas and lines in settled:
            return
        state = [[arena.needed, arena.capacity, arena.generation] for arena in arenas]
        hint = _of_one_rank(lines, settled)
        told = agree(group, self.plan.program.name, lines, json.dumps(state), options.timeout, hint)
        settled.add(lines)
        for arena, states in zip(arenas, zip(*map(json.loads, told), strict=True), strict=True):
            needed, capacity, generations = zip(*states, strict=True)
            if min(capacity) < max(needed) or len(set(generations)) > 1:
                arena.grow(max(needed), max(generations) + 1)


def _of_one_rank(lines: tuple[str, ...], settled: Collection[tuple[str, ...]]) -> str:
    """What it may mean that no other rank comes to agree on these lines, where it has agreed on others before."""
    if not settled:
        return ""
    if lines in settled:
        return (
            ". If only this rank compiled again (its shapes or what it guards on differ from its peers'), they go on "
            "with the program before, which communicates alike; but arenas are agreed on by all ranks: compile again "
            "on every rank, or leave these collectives to the library in plain memory, where ranks recompile alone"
        )
    pairs = [zip_longest(lines, other, fillvalue="nothing more") for other in settled]
    differences = ([(mine, theirs) for mine, theirs in pair if mine != theirs] for pair in pairs)
    mine, theirs = min(differences, key=lambda found: (len(found), found))[0]
    return (
        ". If only this rank compiled again (its shapes or what it guards on differ from its peers'), it now "
        f"communicates otherwise than they do: it has {mine!r} where the program before had {theirs!r}"
    )
