"""What all ranks run: functions with collectives, compiled and as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

import memplan
from memplan.ir.in_flight import Collective, Wait
from tests.tolerances import assert_near

WORLD = dist.group.WORLD


def all_reduce(x: Tensor, w: Tensor) -> Tensor:
    h = torch.relu(x @ w)
    out = collectives.all_reduce(h, "sum", WORLD)
    later = (x * 2).exp() @ w  # may not be written where the collective still reads
    return torch.softmax(out + later, -1) @ w.t()


def all_reduce_kept(x: Tensor, w: Tensor) -> Tensor:
    h = torch.relu(x @ w)
    return collectives.all_reduce(h, "sum", WORLD) * h  # the value before is read afterwards


def all_reduce_transposed(x: Tensor, w: Tensor) -> Tensor:
    return collectives.all_reduce((x @ w).t(), "max", WORLD) @ x


def reduce_scatter(x: Tensor, w: Tensor) -> Tensor:
    h = torch.cos(x @ w)
    part = collectives.reduce_scatter_tensor(h, "sum", 0, WORLD)
    return torch.sin(part) + h.sum()


def all_gather(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    whole = collectives.all_gather_tensor(h, 0, WORLD)
    other = torch.tanh(x * 3) @ w
    return whole.sum(0) + other


def gather_scatter(x: Tensor, w: Tensor) -> Tensor:
    whole = collectives.all_gather_tensor_autograd(torch.tanh(x @ w), 0, WORLD)
    return collectives.reduce_scatter_tensor_autograd(whole.exp(), "sum", 0, WORLD) * 2


def all_to_all(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    parts = [h.shape[0] // dist.get_world_size()] * dist.get_world_size()
    return collectives.all_to_all_single(torch.sin(h), parts, parts, WORLD).cos()


def uneven(x: Tensor, w: Tensor) -> Tensor:
    n = x.shape[0]
    sent = [1, n - 1] if dist.get_rank() == 0 else [3, n - 3]
    taken = [1, 3] if dist.get_rank() == 0 else [n - 1, n - 3]
    return collectives.all_to_all_single(torch.sin(x @ w), taken, sent, WORLD).sum(0)


def broadcast(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return collectives.broadcast(h, 1, WORLD) * 2 - x.sum()


def coalesced(x: Tensor, w: Tensor) -> Tensor:
    a, b = torch.sin(x), x @ w
    a, b = collectives.all_reduce_coalesced([a, b], "sum", WORLD)
    c, d = collectives.all_gather_into_tensor_coalesced([a, b], WORLD)
    e, f = collectives.reduce_scatter_tensor_coalesced([c.exp(), d * 2], "sum", [0, 0], WORLD)
    return e.sum() + f * a.sum()


def hand_written(x: Tensor, w: Tensor) -> Tensor:
    """In-place calls of torch.distributed, as Dynamo rewrites them."""
    h = x @ w
    dist.all_reduce(h)
    whole = torch.empty(dist.get_world_size() * h.shape[0], h.shape[1])
    dist.all_gather_into_tensor(whole, h)
    part = torch.empty_like(h)
    dist.reduce_scatter_tensor(part, whole * 2)
    other = torch.empty_like(h)
    dist.all_to_all_single(other, part)
    return other + h


def given_out(x: Tensor, w: Tensor) -> Tensor:
    """Functional collectives with ``out=``, which torch hides in a wrapper; their arguments die before the wait."""
    ops, ranks = torch.ops._c10d_functional, dist.get_world_size()
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    whole, part = torch.empty(ranks * x.shape[0], w.shape[1]), torch.empty(x.shape[0] // ranks, w.shape[1])
    ops.all_gather_into_tensor_out(torch.sin(x @ w), ranks, name, out=whole)
    ops.reduce_scatter_tensor_out(torch.cos(x @ w), "sum", ranks, name, out=part)
    other = torch.exp(x @ w - 3)
    ops.wait_tensor(whole)
    ops.wait_tensor(part)
    return whole.sum(0) + part + other[0]


def parts(x: Tensor, w: Tensor) -> Tensor:
    """A part of a tensor, a list of tensors, and a reduction of nothing."""
    h, part = x @ w, x * 2
    dist.all_reduce(part[1:3])
    gathered = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.tanh(part))
    nothing = part[:0] + 1
    dist.all_reduce(nothing)
    return (h + gathered[0] - gathered[1]) * 2 + nothing.sum() + part


def changes_input(x: Tensor, w: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x @ w


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        all_reduce,
        all_reduce_kept,
        all_reduce_transposed,
        reduce_scatter,
        all_gather,
        gather_scatter,
        all_to_all,
        uneven,
        broadcast,
        coalesced,
        hand_written,
        parts,
        changes_input,
        *([given_out] if hasattr(torch.Tag, "out") else []),
    )
}


def recompiles(sizes: list[tuple[int, int]]) -> list[int]:
    """A sum over batches of other sizes on each rank; programs compiled up to each call. Recompiling asks nobody."""
    torch.manual_seed(7)
    w = torch.randn(6, 6)

    def summed(x: Tensor) -> Tensor:
        out = (x @ w).square().sum(0)
        dist.all_reduce(out)
        return out / x.shape[0]

    compiled = torch.compile(summed, backend="memplan", options={"communication": {"timeout": 20}})
    found = []
    with memplan.record() as recording:
        for pair in sizes:
            x = torch.randn(pair[dist.get_rank()], 6)
            torch.testing.assert_close(compiled(x), summed(x))
            found.append(len(recording.graphs))
    return found


#: eager autograd has no formula for the other calls
WITH_BACKWARD = ("gather_scatter",)


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(8, 6)
    torch.manual_seed(7)
    return x.requires_grad_(requires_grad), torch.randn(6, 6).requires_grad_(requires_grad)


def form(name: str, options: dict[str, object]) -> tuple[int, int]:
    """Compare with eager; the numbers of collectives and of waits that were planned."""
    function = FORMS[name]
    want_x, want_w = inputs()
    x, w = inputs()
    with torch.no_grad():
        want = function(want_x, want_w)
        want = want.wait() if isinstance(want, collectives.AsyncCollectiveTensor) else want
        with memplan.record() as recording:
            compiled = torch.compile(function, backend="memplan", fullgraph=True, options=options)
            found = compiled(x, w)
    assert_near(found, want, name)
    assert_near(x, want_x, f"{name}: what it leaves in its input")
    with torch.no_grad():
        x, w = inputs()
        assert_near(compiled(x, w), want, f"{name}: the second call")
    (graph,) = recording.graphs
    operations = graph.plan.program.operations
    return sum(isinstance(op, Collective) for op in operations), sum(isinstance(op, Wait) for op in operations)


def backward(name: str, options: dict[str, object]) -> None:
    """Gradients, compared with eager's."""
    function = FORMS[name]
    results = []
    for run in (function, torch.compile(function, backend="memplan", options=options)):
        x, w = inputs(requires_grad=True)
        out = run(x, w)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, w.grad))
    for found, want in zip(results[1], results[0], strict=True):
        assert found is not None
        assert want is not None
        assert_near(found, want, name)
