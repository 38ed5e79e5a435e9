"""What all ranks run with memory that is registered with the library."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

import memplan
from memplan.ir.communication import Memory
from memplan.ir.in_flight import Collective
from memplan.ir.plan import InPool, Plan
from memplan.reports.build import build_report
from memplan.reports.terminal import rendered, summary
from memplan.runtime.arenas import ArenaUse, arena_of, arenas
from memplan.runtime.registered import NcclMemory
from tests.distributed import cases
from tests.distributed.shared_memory import RegisteredMemory, registered_memory, shared_files
from tests.distributed.symmetric_cases import Model
from tests.distributed.symmetric_forms import FORMS, results
from tests.tolerances import assert_near

#: no byte of small numbers in float32 or int64
SENTINEL = 0xA5
LIBRARY = dict.fromkeys(("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"), "library")


def run(name: str, wrapper: str) -> tuple[list[str], list[str], list[bool], list[int]]:
    """Against eager, in several calls; targets, notes, whether each call had registered memory, and arenas' bytes."""
    function = FORMS[name]
    with registered_memory() as memory, torch.no_grad():
        want_x, want_w = cases.inputs()
        want = function(want_x, want_w)
        options = {"communication": {**LIBRARY, "registered": "on"}, "pools": "always", "wrapper": wrapper}
        with memplan.record() as recording:
            compiled = torch.compile(function, backend="memplan", fullgraph=True, options=options)
            for k in range(4):
                x, w = cases.inputs()
                for found, right in zip(results(compiled(x, w)), results(want), strict=True):
                    assert_near(found, right, f"{name}, call {k}")
        (graph,) = recording.graphs
        plan = graph.plan
        planned, made = [int(a.nbytes) for a in plan.arenas], memory.made[1:]  # the first was the trial
        assert len(made) == len(planned)
        assert all(a <= b for a, b in zip(planned, made, strict=True))  # programs of other tests may want more
        for own in memory.alive:
            own.fill_(SENTINEL)
        compiled(*cases.inputs())
        used = [in_arena(op, plan, memory) for op in plan.program.operations if isinstance(op, Collective)]
        return targets(plan), [t for _, t in plan.notes], used, made


def in_arena(op: Collective, plan: Plan, memory: RegisteredMemory) -> bool:
    """Whether all that a collective works on lay in registered memory, and was written there in the last call."""
    for name in {*op.reads, *op.writes, *op.mutates}:
        place = plan.placements[plan.storage_of(name)]
        if plan.program.buffers[name].memory is not Memory.REGISTERED or not isinstance(place, InPool):
            return False
        (own,) = memory.alive
        offset, nbytes = int(place.offset), int(plan.program.buffers[name].nbytes)
        if bool((own[offset : offset + nbytes] == SENTINEL).all()):
            return False
    return True


def targets(plan: Plan) -> list[str]:
    return [op.target for op in plan.program.operations if isinstance(op, Collective)]


def training() -> list[tuple[str, int]]:
    """Gradients, compared with eager's, where the library scatters and gathers; phases, and buffers registered."""
    with registered_memory(), memplan.record() as recording:
        options = {"communication": {**LIBRARY, "registered": "on"}, "poison": True, "pools": "always"}
        cases.backward("gather_scatter", options)
    found = []
    for plan in recording.plans:
        registered = [n for n, b in plan.program.buffers.items() if b.memory is Memory.REGISTERED]
        assert all(isinstance(plan.placements[plan.storage_of(n)], InPool) for n in registered)
        found.append((plan.program.phase.value, len(registered)))
    return found


def refused() -> list[str]:
    """One rank's library cannot: notes of what runs in plain memory on all of them."""
    with registered_memory("its NCCL is too old" if dist.get_rank() == 1 else "") as memory, torch.no_grad():
        x, w = cases.inputs()
        with memplan.record() as recording:
            options = {"communication": {**LIBRARY, "registered": "on"}}
            compiled = torch.compile(cases.all_reduce, backend="memplan", options=options)
            assert_near(compiled(x, w), cases.all_reduce(*cases.inputs()), "in plain memory")
        (plan,) = recording.plans
        assert not plan.arenas
        assert not memory.made
        return [text for _, text in plan.notes]


def released() -> list[int]:
    """Allocations registered while two programs use one, when one has gone, when both have; after growing."""
    with registered_memory() as memory:
        name = dist.new_group([0, 1]).group_name

        def grow(nbytes: int) -> None:
            arena_of(name, torch.device("cpu"), Memory.REGISTERED).grow(nbytes, 1)

        first = ArenaUse(name, "cpu", 1000, lambda: grow(1000), Memory.REGISTERED)
        second = ArenaUse(name, "cpu", 500, lambda: None, Memory.REGISTERED)
        assert first() is second()
        found = [len(memory.alive)]
        grow(2000)
        found.append(len(memory.alive))
        del first
        gc.collect()
        found.append(len(memory.alive))
        del second
        gc.collect()
        return [*found, len(memory.alive)]


def beside_symmetric(folder: str) -> tuple[list[str], list[tuple[str, bool]], str]:
    """Long messages by the library, short ones in symmetric memory: two arenas of one group."""
    group = dist.new_group([0, 1])
    with shared_files(folder), registered_memory() as memory, torch.no_grad():
        torch.manual_seed(dist.get_rank())
        net = Model(group).eval()
        most = 4 * 16 * 4
        with memplan.record() as recording:
            chosen = {"one_shot_bytes": most, "two_shot_bytes": most, "registered": "on"}
            compiled = torch.compile(Mixed(net), backend="memplan", options={"communication": chosen, "poison": True})
            short, long = torch.ones(4, 16), torch.ones(8, 16)
            for _ in range(3):
                for found, want in zip(compiled(short, long), Mixed(net)(short, long), strict=True):
                    assert_near(found, want, "mixed")
        (plan,) = recording.plans
        shown = rendered(summary(build_report(recording.plans)))
        kinds = sorted((a.group == group.group_name, a.type.value) for a in arenas() if a.memory is not None)
        assert kinds == [(True, "registered"), (True, "symmetric")]
        assert len(memory.alive) == 1
        return targets(plan), sorted((p.memory.value, p.group == group.group_name) for p in plan.arenas), shown


class Mixed(torch.nn.Module):
    """The same blocks on a short and a long batch."""

    def __init__(self, net: Model) -> None:
        super().__init__()
        self.net = net

    def forward(self, short: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(short), self.net(long)


def obstacles() -> list[str]:
    """Why NCCL's memory is not there: for gloo, for a device without a backend, in a group of one rank."""
    memory, cpu = NcclMemory(), torch.device("cpu")
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    only_cuda = SimpleNamespace(size=lambda: 2, _get_backend=mock.Mock(side_effect=RuntimeError("no backend")))
    return [memory.obstacle(group, cpu) for group in (dist.group.WORLD, only_cuda, alone)]  # type: ignore[arg-type]


def gathered(x: Tensor) -> Tensor:
    return collectives.all_gather_tensor(torch.sin(x), 0, "0").cos()  # type: ignore[arg-type]


def long_gathers() -> list[int]:
    """Arenas of a program whose message is just too short, and of one whose message is long enough."""
    found = []
    for rows in (1023, 1024):
        with registered_memory(), torch.no_grad(), memplan.record() as recording:
            options = {"communication": {"registered": "auto"}}
            x = torch.full((rows, 1024), float(dist.get_rank()))
            compiled = torch.compile(gathered, backend="memplan", dynamic=False, options=options)
            assert_near(compiled(x), gathered(x), "gathered")
        found.append(len(recording.plans[0].arenas))
    return found


def destroyed() -> list[int]:
    """Allocations of two groups, after one was destroyed, and after it was tried again in vain."""
    with registered_memory() as memory:
        groups = [dist.new_group([0, 1]) for _ in range(2)]
        uses = [ArenaUse(g.group_name, "cpu", 100, lambda: None, Memory.REGISTERED) for g in groups]
        for use in uses:
            use.arena.grow(100, 1)
        found = [len(memory.alive)]
        dist.destroy_process_group(groups[0])
        found.append(len(memory.alive))
        try:
            dist.destroy_process_group(groups[0])
        except ValueError:
            found.append(len(memory.alive))
        assert uses[1]() is uses[1].arena.memory.own  # type: ignore[union-attr]
        return found


def unused(options: dict[str, object]) -> list[str]:
    """Nothing is registered, not even on trial; the notes."""
    with registered_memory() as memory, torch.no_grad():
        x, w = cases.inputs()
        with memplan.record() as recording:
            torch.compile(cases.all_reduce, backend="memplan", options={"communication": options})(x, w)
        (plan,) = recording.plans
        assert not memory.made
        assert not any(b.memory is Memory.REGISTERED for b in plan.program.buffers.values())
        return [text for _, text in plan.notes]
