"""What both ranks run with symmetric memory: a small tensor-parallel model, and what can go wrong."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import memplan
from memplan.communicating import group_of
from memplan.ir.communication import Thresholds
from memplan.ir.communication_options import CommunicationOptions
from memplan.ir.plan import Plan
from memplan.ir.program import Copy, Extern
from memplan.reports.allocation import residue
from memplan.reports.build import build_report
from memplan.reports.terminal import rendered, summary
from memplan.runtime.arenas import ArenaUse, arena_of, arenas, release_arenas
from memplan.runtime.cache import Cache
from memplan.runtime.communication_times import calibrate
from memplan.runtime.groups import group_facts
from tests.distributed import shared_memory
from tests.distributed.shared_memory import registered_memory, shared_files
from tests.tolerances import assert_near

WORLD = dist.group.WORLD


class Block(nn.Module):
    """Two linear layers, the second of which gives this rank's part of a sum."""

    def __init__(self, width: int, hidden: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group or WORLD
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.relu(self.up(self.norm(x))))
        return x + collectives.all_reduce(h, "sum", self.group)


class Model(nn.Module):
    """Three blocks. (Of `nn.Sequential`, Dynamo keeps compiled functions in a module of its own.)"""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = (Block(16, 24, group) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def model(group: dist.ProcessGroup | None = None) -> nn.Module:
    torch.manual_seed(dist.get_rank())
    return Model(group).eval()


def targets(plan: Plan) -> list[str]:
    return [op.target for op in plan.program.operations if isinstance(op, Extern) and "all_reduce" in op.target]


def runs(folder: str, options: dict[str, object], grad: bool, wrapper: str) -> tuple[list[str], int, int, int]:
    """Against eager, in several calls; targets, arena's bytes, what the sites would take apart, number of copies."""
    with shared_files(folder) as backend:
        net = model(dist.new_group([0, 1]))  # Dynamo may keep programs of other tests: they are in other groups
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
        with memplan.record() as recording:
            chosen = {"poison": True, "communication": options, "wrapper": wrapper}
            compiled = torch.compile(net, backend="memplan", options=chosen)
            with torch.set_grad_enabled(grad):
                want, found = net(x), compiled(x)
                assert_near(found, want, "result")
                shared_memory.tarry[0] = 2e-3
                for _ in range(10):
                    again = compiled(x)
                    assert torch.equal(again, found)
                shared_memory.tarry[0] = 0.0
        if grad:
            found.square().sum().backward()
        plan = recording.graphs[0].plan
        assert len(plan.arenas) == 1, plan.notes
        (arena,) = plan.arenas
        # the first was the trial; forward and backward were built together
        assert backend.sizes[1:] == [max(a.nbytes for g in recording.graphs for a in g.plan.arenas)]
        shown = build_report(recording.plans, joins=[j for g in recording.graphs for j in g.joins])
        assert [a.nbytes for a in shown.graphs[0].arenas] == [arena.nbytes]
        assert not any(any(residue(g)) for g in shown.graphs)
        assert "Communication memory" in rendered(summary(shown))
        sites = [b for b in plan.program.buffers.values() if b.group]
        copies = sum(isinstance(op, Copy) for op in plan.program.operations)
        return targets(plan), int(arena.nbytes), sum(int(b.nbytes) for b in sites), copies


def released(folder: str) -> tuple[int, int, int]:
    """Bytes held while two programs use an arena, when one has gone, and when both have."""
    with shared_files(folder):
        name = dist.new_group([0, 1]).group_name
        first = ArenaUse(name, "cpu", 1000, lambda: arena_of(name, torch.device("cpu")).grow(1000, 1))
        second = ArenaUse(name, "cpu", 500, lambda: None)
        arena = first.arena
        assert first() is second()
        held = [arena.capacity]
        del first
        gc.collect()
        held.append(arena.capacity)
        del second
        gc.collect()
        return held[0], held[1], arena.capacity


def grows(folder: str) -> tuple[list[int], int]:
    """Two programs in one arena, the second larger; then the first again."""
    with shared_files(folder) as backend, torch.no_grad():
        group = dist.new_group([0, 1])
        net = model(group)
        compiled = torch.compile(net, backend="memplan", dynamic=False)
        small, large = torch.ones(4, 16), torch.ones(64, 16)
        for x in (small, large, small, large):
            assert_near(compiled(x), net(x), "result")
        return backend.sizes[1:], sum(a.group == group.group_name for a in arenas())


def other_plans(folder: str) -> str:
    """Ranks with other shapes: what the error says."""
    with shared_files(folder), torch.no_grad():
        net = model()
        compiled = torch.compile(net, backend="memplan", options={"communication": {"timeout": 20}})
        try:
            compiled(torch.ones(4 + dist.get_rank(), 16))
        except memplan.ir.errors.CommunicationError as error:
            return str(error)
        return "nothing"


def one_rank_only(folder: str) -> str:
    """Only rank 0 compiles, in a group of its own making; the other one does not come."""
    net = model(dist.new_group([0, 1]))
    if dist.get_rank() == 1:
        time.sleep(1.5)
        return ""
    begun = time.monotonic()
    try:
        with torch.no_grad():
            torch.compile(net, backend="memplan", options={"communication": {"timeout": 0.5}})(torch.ones(4, 16))
    except memplan.ir.errors.CommunicationError as error:
        assert time.monotonic() - begun < 30
        return str(error)
    return "nothing"


def compiled_alone(folder: str, longer: bool) -> str:
    """Rank 0 compiles again by itself, then rank 1 comes too late, then both are in time: what the first errors say."""
    with shared_files(folder), torch.no_grad():
        group = dist.new_group([0, 1])

        def scaled(x: Tensor, factor: int) -> Tensor:
            return collectives.all_reduce(torch.sin(x * factor), "sum", group).cos()

        options = {"communication": {"all_reduce": "one_shot", "timeout": 20}}
        compiled = torch.compile(scaled, backend="memplan", dynamic=False, options=options)
        x = torch.arange(8.0)
        assert_near(compiled(x, 1), scaled(x, 1), "together")
        late = torch.compile(scaled, backend="memplan", dynamic=False, options={
            "communication": {"all_reduce": "one_shot", "timeout": 0.5 if dist.get_rank() == 0 else 20}
        })  # fmt: skip
        if dist.get_rank() == 1:
            dist.barrier()
        found = "nothing"
        try:
            late(torch.arange(16.0) if longer else x, 2)
        except memplan.ir.errors.CommunicationError as error:
            found = str(error)
        if dist.get_rank() == 0:
            dist.barrier()
        assert_near(compiled(x, 3), scaled(x, 3), "together again")
        return found


def fallback(folder: str) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """One rank has no symmetric memory: all use the library, and say so."""
    with shared_files(folder, "its GPU is too old" if dist.get_rank() == 1 else ""), torch.no_grad():
        net = model()
        x = torch.ones(4, 16)
        with memplan.record() as recording:
            assert_near(torch.compile(net, backend="memplan")(x), net(x), "result")
        plan = recording.graphs[0].plan
        assert not plan.arenas
        return targets(plan), plan.notes


class Gated(nn.Module):
    """A gated MLP behind a norm, as `parallelize_module` takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Narrow(Gated):
    """Without the sum at the end: sequences are in parts there."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def tensor_parallel(folder: str) -> list[tuple[list[str], int]]:
    """A model sharded by DTensor, training; targets and copies of forward and backward."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    results = []
    with shared_files(folder), memplan.record() as recording:
        for compiled in (False, True):
            torch.manual_seed(3)
            net = parallelize_module(Gated(), mesh, plan)
            run = torch.compile(net, backend="memplan", options={"poison": True}) if compiled else net
            x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            out = run(x)
            out.square().sum().backward()
            grads = [p.grad.to_local() for p in net.gate.parameters()]  # type: ignore[union-attr, operator]
            results.append((out.detach(), x.grad, *grads))
        for found, want in zip(results[1], results[0], strict=True):
            assert_near(found, want, "tensor parallel")
    return [
        (targets(p), sum(isinstance(op, Copy) for op in p.program.operations if op.device == "cpu"))
        for p in recording.plans
    ]


def sharded_weights(_: str) -> list[list[str]]:
    """FSDP2, training: the collectives of its hooks are eager's or in the graph; the numbers are the same."""
    results = []
    with memplan.record() as recording:
        for compiled in (False, True):
            torch.manual_seed(3)
            net = Gated()
            if compiled:
                net.compile(backend="memplan", options={"poison": True})
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
            x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
            out = net(x)
            out.square().sum().backward()
            results.append((out.detach(), *(p.grad.full_tensor() for p in net.parameters())))  # type: ignore[union-attr]
        for found, want in zip(results[1], results[0], strict=True):
            assert_near(found, want, "sharded weights")
    return [[op.name for op in p.program.operations] for p in recording.plans]


def dynamic(folder: str) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Sizes that are known only at the call go to the library, and the notes say so."""
    with shared_files(folder), torch.no_grad():
        net = model()
        with memplan.record() as recording:
            compiled = torch.compile(net, backend="memplan", dynamic=True)
            for count in (4, 9, 300):
                x = torch.ones(count, 16)
                assert_near(compiled(x), net(x), "result")
        (plan,) = recording.plans
        return targets(plan), plan.notes


def gathers(x: Tensor) -> Tensor:
    """In the group that has this name when it is called."""
    return collectives.all_gather_tensor(torch.sin(x), 0, "0").cos()  # type: ignore[arg-type]


def starts_again(folder: str) -> tuple[list[int], str]:
    """The world is destroyed and made anew, then anew with one rank; allocations alive, and the last call's error."""
    with shared_files(folder) as backend, torch.no_grad():
        rank, x = dist.get_rank(), torch.ones(4, 16)
        options = {"communication": {"all_gather": "symmetric"}}
        compiled = torch.compile(gathers, backend="memplan", options=options)
        assert_near(compiled(x), gathers(x), "at first")
        alive = [backend.alive]
        dist.destroy_process_group()
        wait_until(lambda: not backend.alive)
        alive.append(backend.alive)
        again(f"{folder}/again", rank, 2)
        assert_near(compiled(x), gathers(x), "in the new world")
        alive.append(backend.alive)
        dist.destroy_process_group()  # and nothing is waited for
        again(f"{folder}/alone{rank}", 0, 1)
        try:
            compiled(x)
        except memplan.ir.errors.CommunicationError as error:
            return alive, str(error)
        return alive, "nothing"


def again(path: str, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)


def wait_until(condition: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not condition() and time.monotonic() - begun < 60:
        time.sleep(0.05)
        gc.collect()


class ShardedLinear(nn.Module):
    """A weight of which every rank has some rows; gathered for the call, its gradient scattered, as FSDP does."""

    def __init__(self, rows: int, columns: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.randn(rows, columns), mesh, [Shard(0)]))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.weight.redistribute(placements=[Replicate()])  # type: ignore[operator]
        return nn.functional.linear(x, whole.to_local(grad_placements=[Partial()]))


def sharded_in_the_graph(folder: str) -> list[str]:
    """Training with weights sharded by DTensor inside of what is compiled: the collectives' targets."""
    results = []
    with shared_files(folder), memplan.record() as recording:
        options = {"poison": True, "communication": {"all_gather": "symmetric", "reduce_scatter": "symmetric"}}
        for compiled in (False, True):
            torch.manual_seed(3)
            mesh = init_device_mesh("cpu", (2,))
            net = nn.Sequential(ShardedLinear(16, 8, mesh), nn.GELU(), ShardedLinear(8, 16, mesh))
            run = torch.compile(net, backend="memplan", options=options) if compiled else net
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
            out = run(x)
            out.square().sum().backward()
            grads = [p.grad.to_local() for p in net.parameters()]  # type: ignore[union-attr, operator]
            results.append((out.detach(), x.grad, *grads))
        for found, want in zip(results[1], results[0], strict=True):
            assert_near(found, want, "sharded weights in the graph")
    return [
        op.target
        for p in recording.plans
        for op in p.program.operations
        if group_of(op) is not None  # type: ignore[union-attr]
    ]


def sequence_parallel(folder: str) -> list[str]:
    """A norm on parts of the sequence before a sharded MLP, training: the collectives' targets."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {
        "norm": SequenceParallel(), "gate": ColwiseParallel(), "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }  # fmt: skip
    results = []
    with shared_files(folder), memplan.record() as recording:
        options = {"poison": True, "communication": {"all_gather": "symmetric", "reduce_scatter": "symmetric"}}
        for compiled in (False, True):
            torch.manual_seed(3)
            net = parallelize_module(Narrow(), mesh, plan)
            run = torch.compile(net, backend="memplan", options=options) if compiled else net
            x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
            out = run(x)
            out.square().sum().backward()
            results.append((out.detach(), x.grad))
        for found, want in zip(results[1], results[0], strict=True):
            assert_near(found, want, "sequence parallel")
    return [
        op.target
        for p in recording.plans
        for op in p.program.operations
        if group_of(op) is not None  # type: ignore[union-attr]
    ]


def group_that_goes(folder: str) -> str:
    """A program whose group is destroyed: what its next call says."""
    with shared_files(folder), torch.no_grad():
        group = dist.new_group([0, 1])
        compiled = torch.compile(model(group), backend="memplan")
        compiled(torch.ones(4, 16))
        release_arenas()
        dist.destroy_process_group(group)
        try:
            compiled(torch.ones(4, 16))
        except memplan.ir.errors.CommunicationError as error:
            return str(error)
        return "nothing"


def calibrated(folder: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Thresholds measured, and those that a program compiled afterwards goes by."""
    with shared_files(folder), registered_memory() as memory:
        group = dist.new_group([0, 1])
        device, cache = torch.device("cpu"), Cache(f"{folder}/cache{dist.get_rank()}")
        made = calibrate(group, device, cache, sizes=(1024, 4096))
        facts = group_facts(group.group_name, device, CommunicationOptions(), ask=True, cache=cache)
        assert facts is not None
        assert memory.made == [2 * 4096]  # collectives were timed in it
        assert not memory.alive
        assert facts.thresholds == made
        return bytes_of(made), bytes_of(facts.thresholds)


def bytes_of(found: Thresholds) -> tuple[int, int]:
    return found.one_shot_bytes, found.two_shot_bytes


def saved(folder: str) -> str:
    """Saving a model that communicates: what the error says."""
    exported = torch.export.export(model(), (torch.ones(4, 16),))
    try:
        memplan.save(exported, f"{folder}/{dist.get_rank()}.memplan")
    except memplan.ir.errors.SavedModelError as error:
        return str(error)
    return "nothing"
