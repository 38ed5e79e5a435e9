"""What all ranks run: every kind of collective, out of symmetric memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

import memplan
from memplan.ir.in_flight import Collective, Wait
from memplan.ir.program import Copy, Extern
from tests.distributed import cases, shared_memory
from tests.distributed.shared_memory import shared_files
from tests.tolerances import assert_near

ALL_SYMMETRIC: dict[str, object] = {
    "all_reduce": "one_shot", "reduce_scatter": "symmetric", "all_gather": "symmetric", "broadcast": "symmetric",
    "all_to_all": "symmetric",
}  # fmt: skip


def broadcast_inside(x: Tensor, w: Tensor) -> Tensor:
    return collectives.broadcast(torch.sin(x @ w), 1, cases.WORLD).cos() @ w


def broadcast_returned(x: Tensor, w: Tensor) -> Tensor:
    return collectives.broadcast(torch.sin(x @ w), 1, cases.WORLD)


def scatter_unlike(x: Tensor, w: Tensor) -> Tensor:
    """48 bytes, in whole 16s, of which each of two ranks gets 24: torch's kernel does not take that."""
    return collectives.reduce_scatter_tensor(torch.sin(x[:2] @ w), "sum", 0, cases.WORLD)


def scatter_largest(x: Tensor, w: Tensor) -> Tensor:
    return collectives.reduce_scatter_tensor(torch.sin(x @ w), "max", 0, cases.WORLD)


def gather_given(x: Tensor, w: Tensor) -> Tensor:
    return collectives.all_gather_tensor(x, 0, cases.WORLD).sum(0) + w[0]


def gather_returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.sin(x @ w)
    return collectives.all_gather_tensor(h, 0, cases.WORLD) * 2, h


def gather_after_sum(x: Tensor, w: Tensor) -> Tensor:
    """One buffer, of two collectives."""
    h = collectives.all_reduce(torch.sin(x @ w), "sum", cases.WORLD)
    return collectives.all_gather_tensor(h, 0, cases.WORLD).sum(0) + h.sum()


def gather_integers(x: Tensor, w: Tensor) -> Tensor:
    return collectives.all_gather_tensor((x @ w > 0).to(torch.int64), 0, cases.WORLD).sum(0)


def gather_given_back(x: Tensor, w: Tensor) -> Tensor:
    return collectives.all_gather_tensor(torch.sin(x @ w), 0, cases.WORLD)


def all_reduce_returned(x: Tensor, w: Tensor) -> Tensor:
    return collectives.all_reduce(torch.sin(x @ w), "sum", cases.WORLD)


def twice(x: Tensor, w: Tensor) -> Tensor:
    h = torch.sin(x @ w)
    a, b = collectives.all_gather_into_tensor_coalesced([h, h], cases.WORLD)
    return a.sum(0) + b.cos().sum(0)


FORMS = {
    **cases.FORMS,
    **{
        f.__name__: f
        for f in (
            broadcast_inside,
            broadcast_returned,
            scatter_unlike,
            scatter_largest,
            gather_given,
            gather_returned,
            gather_after_sum,
            gather_integers,
            gather_given_back,
            all_reduce_returned,
            twice,
        )
    },
}


def run(
    folder: str, name: str, options: dict[str, object], wrapper: str, no_multicast: Sequence[str] = ("", "")
) -> tuple[list[str], list[str], int, int]:
    """Against eager, in several calls with ranks that tarry; targets, notes' texts, copies, and waits."""
    function, without = FORMS[name], no_multicast[dist.get_rank() % 2]
    with shared_files(folder, no_multicast=without), torch.no_grad():
        want_x, want_w = cases.inputs()
        want = function(want_x, want_w)
        with memplan.record() as recording:
            chosen = {"poison": True, "pools": "always", "communication": options, "wrapper": wrapper}
            compiled = torch.compile(function, backend="memplan", fullgraph=True, options=chosen)
            for k in range(6):
                x, w = cases.inputs()
                shared_memory.tarry[0] = 2e-3 if k else 0.0
                for found, right in zip(results(compiled(x, w)), results(want), strict=True):
                    assert_near(found, right, f"{name}, call {k}")
            shared_memory.tarry[0] = 0.0
        (graph,) = recording.graphs
        operations = graph.plan.program.operations
        targets = [op.target for op in operations if isinstance(op, Collective) or is_symmetric(op)]
        copies = sum(isinstance(op, Copy) for op in operations)
        return targets, [text for _, text in graph.plan.notes], copies, sum(isinstance(op, Wait) for op in operations)


def is_symmetric(op: object) -> bool:
    return isinstance(op, Extern) and op.target.startswith(("symm_mem.", "memplan.peer_"))


def results(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    given = out if isinstance(out, tuple) else (out,)
    return tuple(t.wait() if isinstance(t, collectives.AsyncCollectiveTensor) else t for t in given)


class Member(torch.nn.Module):
    """Sums, parts and wholes in a group that is not the whole world."""

    def __init__(self, group: dist.ProcessGroup, scatter: bool) -> None:
        super().__init__()
        self.group, self.scatter = group, scatter

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        h = collectives.all_reduce(torch.sin(x @ w), "sum", self.group)
        h = collectives.all_gather_tensor((h * 2).cos(), 0, self.group)
        if self.scatter:
            h = collectives.reduce_scatter_tensor(h + 1, "sum", 0, self.group)
        return collectives.broadcast(torch.sin(h), 1, self.group) @ w


def in_part(folder: str, members: list[int], scatter: bool) -> list[str] | None:
    """Some of the ranks, against eager; the targets."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    assert isinstance(group, dist.ProcessGroup)
    with shared_files(folder), torch.no_grad():
        net = Member(group, scatter)
        options = {**ALL_SYMMETRIC, "all_reduce": "two_shot"}
        x, w = cases.inputs()
        with memplan.record() as recording:
            compiled = torch.compile(net, backend="memplan", options={"poison": True, "communication": options})
            for _ in range(4):
                assert_near(compiled(x, w), net(x, w), "in a group")
        (plan,) = recording.plans
        return [op.target for op in plan.program.operations if isinstance(op, Collective) or is_symmetric(op)]
