"""Offload: programs with copies run right, plans with them are verified, and budgets use them. On a CPU copies are
done at once; `tests/gpu/check_offload.py` runs them on streams."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import memplan
import memplan.backend
import memplan.compilation
import memplan.offload_budget
import memplan.region
from memplan.analysis import budget_curves
from memplan.ir.activation import Fate
from memplan.ir.communication import Memory
from memplan.ir.device import CPU
from memplan.ir.errors import OptionError, UnsupportedError, VerificationError
from memplan.ir.in_flight import HostCopy, Wait
from memplan.ir.plan import Plan
from memplan.ir.verify import verify_program
from memplan.ir.verify_plan import verify_plan
from memplan.passes import offload, offload_choice
from memplan.passes.offload import Clock, inward, outward
from memplan.passes.step_peak import step_peak
from memplan.recording import CompiledGraph
from tests.fake_gpu import make_fake_gpu
from tests.models.blocks import FeedForward

WIDTH, ROWS, BLOCKS = 32, 256, 4
#: A device with a bus as fast as its memory. Whoever plans here is told these figures: a CPU's own are measured where a
#: budget asks for them, and what is then chosen would hang on what else the machine does.
DEVICE = replace(CPU, bandwidth=1e5, host_bandwidth=1e5)
CHECK = memplan.backend.check_offload  # as it is where no test replaces it


def stack() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(FeedForward(WIDTH) for _ in range(BLOCKS))), torch.randn(ROWS, WIDTH)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def peak_of(graphs: list[CompiledGraph]) -> int:
    joins = {later: earlier for g in graphs for earlier, later in g.joins}
    return step_peak([g.plan for g in graphs], joins).nbytes


class Compiled:
    """The stack with a budget below what recomputation alone needs, on a CPU that is taken for a device."""

    def __init__(self, budget: int | None, **options: object) -> None:
        torch._dynamo.reset()
        self.model, self.x = stack()
        given = {**options, **({} if budget is None else {"budget": budget, "offload": True})}
        self.call = torch.compile(loss_of, backend="memplan", options=given)
        with memplan.record() as recorded:
            self.loss = self.call(self.model, self.x)
            self.grads = torch.autograd.grad(self.loss, list(self.model.parameters()))
        self.graphs = list(recorded.graphs)
        self.peak = peak_of(self.graphs)

    @property
    def plans(self) -> tuple[Plan, Plan]:
        forward, backward = (g.plan for g in self.graphs)
        return forward, backward


@pytest.fixture(scope="module")
def as_device() -> Iterator[None]:
    """A CPU that may offload, with the figures of `DEVICE`; small tensors count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memplan.backend, "check_offload", lambda device: None)
        patch.setattr(offload_choice, "LEAST", 1 << 12)
        patch.setattr(offload, "LATENCY", 0.0)
        for module in (memplan.backend, memplan.region, memplan.offload_budget):
            patch.setattr(module, "copy_figures", lambda device, config: DEVICE)
        for module in (memplan.backend, memplan.compilation):
            patch.setattr(module, "figures_for", lambda device, config, measure=False: DEVICE)
        yield


@pytest.fixture(scope="module")
def plain(as_device: None) -> Compiled:
    return Compiled(None)


@pytest.fixture(scope="module")
def offloaded(as_device: None, plain: Compiled) -> Compiled:
    with pytest.MonkeyPatch.context() as patch:
        real = memplan.backend.OffloadBudget.search

        def search(self: memplan.backend.OffloadBudget) -> object:
            patch.setattr(self.budget, "search", lambda: pytest.fail("offload was not enough"))
            return real(self)

        patch.setattr(memplan.backend.OffloadBudget, "search", search)
        slow_again(patch)
        return Compiled(int(0.7 * plain.peak), poison=True)


def slow_again(patch: pytest.MonkeyPatch) -> None:
    """Let all recomputation that a budget adds be dearer than any copy."""
    real = memplan.budget.Budget.choice

    def choice(self: memplan.budget.Budget, rung: int) -> object:
        found = real(self, rung)
        return found if rung == memplan.budget.RUNGS else replace(found, microseconds=found.microseconds + 1e9)

    patch.setattr(memplan.budget.Budget, "choice", choice)


def same(one: Compiled, other: Compiled) -> bool:
    pairs = zip((one.loss, *one.grads), (other.loss, *other.grads), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_numbers_are_those_without_offload(plain: Compiled, offloaded: Compiled) -> None:
    assert same(offloaded, plain)


def test_the_peak_is_within_the_budget_and_bytes_are_on_the_host(plain: Compiled, offloaded: Compiled) -> None:
    assert offloaded.peak <= 0.7 * plain.peak
    forward, backward = offloaded.plans
    out = [op for op in forward.program.operations if isinstance(op, HostCopy)]
    back = [op for op in backward.program.operations if isinstance(op, HostCopy)]
    assert len(out) == len(back) > 0
    assert all(op.offloads for op in out)
    assert not any(op.offloads for op in back)
    fates = [a for a in offloaded.graphs[1].activations if a.fate is Fate.OFFLOADED]
    assert sum(a.nbytes for a in fates) == sum(forward.program.nbytes(op.results[0].buffer) for op in out)
    assert all(a.microseconds for a in fates)


def test_several_forwards_before_a_backward_and_kept_graphs(plain: Compiled, offloaded: Compiled) -> None:
    first = offloaded.call(offloaded.model, offloaded.x)
    second = offloaded.call(offloaded.model, 2 * offloaded.x)
    parameters = list(offloaded.model.parameters())
    once = torch.autograd.grad(first, parameters, retain_graph=True)
    again = torch.autograd.grad(first, parameters)
    for a, b, c in zip(once, again, plain.grads, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    expected = torch.autograd.grad(loss_of(offloaded.model, 2 * offloaded.x), parameters)
    for a, b in zip(torch.autograd.grad(second, parameters), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_get_what_is_saved(plain: Compiled, offloaded: Compiled) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = offloaded.call(offloaded.model, offloaded.x)
    for a, b in zip(torch.autograd.grad(loss, list(offloaded.model.parameters())), plain.grads, strict=True):
        assert torch.equal(a, b)


def without(plan: Plan, name: str) -> Plan:
    """A plan whose order lacks the wait's hold on a copy's source."""
    operations = tuple(replace(op, args=op.args[:1]) if op.name == name else op for op in plan.program.operations)
    return replace(plan, program=replace(plan.program, operations=operations))


def test_the_verifier_wants_waits_to_keep_both_ends(offloaded: Compiled) -> None:
    for plan in offloaded.plans:
        verify_plan(plan)
        wait = next(op for op in plan.program.operations if isinstance(op, Wait))
        with pytest.raises(VerificationError, match="does not keep"):
            verify_plan(without(plan, wait.name))


def test_the_verifier_wants_readers_after_the_wait(offloaded: Compiled) -> None:
    plan = offloaded.plans[1]
    wait = next(op for op in plan.program.operations if isinstance(op, Wait))
    order = [n for n in plan.order if n != wait.name]
    with pytest.raises(VerificationError):
        verify_plan(replace(plan, order=(*order, wait.name)))


def test_the_verifier_wants_a_wait(offloaded: Compiled) -> None:
    program = offloaded.plans[0].program
    wait = next(op for op in program.operations if isinstance(op, Wait))
    with pytest.raises(VerificationError, match="nothing waits"):
        verify_program(replace(program, operations=tuple(op for op in program.operations if op is not wait)))


def test_the_verifier_keeps_others_off_pinned_memory(offloaded: Compiled) -> None:
    program = offloaded.plans[1].program
    host = next(b for b in program.buffers.values() if b.memory is Memory.PINNED)
    given = {**program.buffers, host.name: replace(host, donated=True)}
    with pytest.raises(VerificationError, match="donated"):
        verify_program(replace(program, buffers=given))
    plain = {**program.buffers, host.name: replace(host, memory=Memory.PLAIN)}
    with pytest.raises(VerificationError, match="pinned"):
        verify_program(replace(program, buffers=plain))


def test_offloads_follow_one_another_and_are_waited_for_when_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LATENCY", 15.0)
    clock = Clock((0.0, 100.0, 200.0, 300.0, 400.0, 500.0))
    flights, waited = outward(clock, [("a", 0, 100), ("b", 1, 100)])
    assert [(f.name, f.issue, f.wait) for f in flights] == [("a", 1, 3), ("b", 2, 4)]  # ends at 215 and 330
    assert waited == 0
    _, waited = outward(clock, [("a", 4, 100)])
    assert waited == pytest.approx(115)


def test_prefetches_end_when_they_are_needed_and_start_no_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LATENCY", 15.0)
    clock = Clock((0.0, 100.0, 200.0, 300.0, 400.0, 500.0))
    flights, late = inward(clock, [("a", 4, 100), ("b", 3, 50)])
    assert [(f.name, f.issue, f.wait) for f in flights] == [("b", 2, 3), ("a", 2, 4)]
    assert late == 0
    flights, late = inward(clock, [("a", 0, 100)])
    assert [(f.issue, f.wait) for f in flights] == [(0, 0)]
    assert late == pytest.approx(115)


def test_gpu_plans_hold_slabs_and_copies(as_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned together for a GPU, as the fake one runs it; nothing on the host counts as the device's."""
    make_fake_gpu(monkeypatch)
    slow_again(monkeypatch)
    # a GPU's budget is of what its allocator reserves, in segments of 2 MiB and more
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 64 * ROWS)
    monkeypatch.setattr("memplan.runtime.reserve._native_allocator", lambda: False)  # which a CPU build cannot say
    plain = Compiled(None)
    found = Compiled(int(0.85 * plain.peak), poison=True)
    assert found.peak <= 0.85 * plain.peak
    assert same(found, plain)
    for plan in found.plans:
        verify_plan(plan)
        assert plan.predicted_peak["cpu"] == 0
        copies = [op for op in plan.program.operations if isinstance(op, HostCopy)]
        assert copies
        assert {op.device for op in copies} == {"cuda:0"}
        assert all(op.microseconds > 0 for op in copies)


def test_the_curve_has_points_with_offload(as_device: None) -> None:
    torch._dynamo.reset()
    model, x = stack()
    (points,) = budget_curves(loss_of, (model, x), options={"offload": True})
    least = min(p.nbytes for p in points if not p.on_host)
    assert any(p.on_host and p.nbytes < least for p in points)


def test_what_cannot_be_had_is_refused() -> None:
    model, x = stack()
    for options, kind, match in (
        ({"offload": True}, OptionError, "give one"),
        ({"offload": True, "budget": "1GB", "cuda_graphs": True}, UnsupportedError, "CUDA graphs"),
        ({"offload": 1}, OptionError, "True or False"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=match) as found:
            torch.compile(loss_of, backend="memplan", options=options)(model, x)
        assert isinstance(found.value, kind) or kind.__name__ in str(found.value)
    with pytest.raises(OptionError, match="runs on cpu"):
        CHECK("cpu")
