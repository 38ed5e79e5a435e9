"""Offload on a GPU: ``python -m tests.gpu.check_offload [--goal 6.0] [--no-llama]``.

Numbers with and without offload (the same cut of the step, so equal bit for bit), under random delays of the copies,
with several forwards before a backward, with kept graphs and hooks; peaks as predicted; how much of the copies' time
passes beside kernels. Plans are made for a bus ``--bus`` times as fast as it is, so that they have copies in flight
while kernels run, whatever would pay. Then a Llama-style model of 0.9 B at 4 x 2048 within a total of ``--goal`` GB,
against Inductor's default, in one run. About five minutes, two of them without that model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
import memplan.backend
import memplan.budget
import memplan.offload_budget
import memplan.region
from benchmarks.models import cases
from memplan.analysis import budget_curves
from memplan.budget import RUNGS, Budget
from memplan.calibration import copy_figures
from memplan.ir.config import Config
from memplan.ir.device import DeviceFigures
from memplan.ir.in_flight import HostCopy, Wait
from memplan.ir.plan import Plan
from memplan.passes.remat_choice import Choice
from memplan.passes.step_peak import step_peak
from memplan.runtime import host_copies
from tests.models.blocks import FeedForward

WIDTH, ROWS, BLOCKS = 1024, 16384, 8


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()  # type: ignore[no-any-return]


def dearly(choice: Callable[[Budget, int], Choice]) -> Callable[[Budget, int], Choice]:
    """Choices whose recomputation costs more than any copy, so that copies are made."""

    def dear(self: Budget, rung: int) -> Choice:
        found = choice(self, rung)
        return found if rung == RUNGS else replace(found, microseconds=found.microseconds + 1e9)

    return dear


def on_a_bus(times: float) -> Callable[[str, Config], DeviceFigures]:
    """The device's figures, with a bus so many times as fast as it is."""

    def figures(device: str, config: Config) -> DeviceFigures:
        found = copy_figures(device, config)
        return replace(found, host_bandwidth=times * found.host_bandwidth)

    return figures


class Stack:
    """Blocks compiled with a budget, with offload or with the same cut and nothing on the host.

    ``part``: the budget over what the step needs that computes nothing again; ``bus``: how many times as fast as it is
    the bus is taken for.
    """

    def __init__(self, part: float, bus: float, *, copies: bool, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(FeedForward(WIDTH) for _ in range(BLOCKS))).to(device).bfloat16()
        self.x = torch.randn(ROWS, WIDTH, device=device, dtype=torch.bfloat16)
        # (Dynamo takes equal options for one backend; with a budget this one decides nothing)
        told = 0.2 + part / 1e3 + (0.0 if copies else 0.01)
        self.budget = int(part * most_of(self.model, self.x))
        options = {"budget": self.budget, "offload": True, "plan_cache": False, "recompute_time": told}
        with contextlib.ExitStack() as patched:
            enter, patch = patched.enter_context, mock.patch.object
            for module in (memplan.region, memplan.offload_budget):
                enter(patch(module, "copy_figures", on_a_bus(bus)))
            enter(patch(Budget, "choice", dearly(Budget.choice)))
            if not copies:
                enter(patch(memplan.offload_budget, "chosen", lambda taken: taken.modules))
            self.call = torch.compile(loss_of, backend="memplan", options=options)
            recorded = enter(memplan.record())
            self.step()
        self.plans = [g.plan for g in recorded.graphs]
        self.predicted = peak_of(recorded.graphs)
        copied = [(p, op) for p in self.plans for op in p.program.operations if isinstance(op, HostCopy)]
        self.copies = len(copied)
        self.nbytes = sum(p.program.nbytes(op.in_flight_results[0]) for p, op in copied)
        self.hidden = sum(beside(p, op) > 0 for p, op in copied)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def step(self) -> list[Tensor]:
        loss = self.call(self.model, self.x)
        return [loss.detach(), *torch.autograd.grad(loss, self.parameters)]


def most_of(model: nn.Module, x: Tensor) -> int:
    """Bytes that the step needs if it computes nothing again."""
    with mock.patch.object(memplan.budget, "CURVE", 1):
        (points,) = budget_curves(lambda x: loss_of(model, x), (x,))
    return points[-1].nbytes


def beside(plan: Plan, copy: HostCopy) -> int:
    """Kernels and calls that the plan runs between a copy's start and the wait for it."""
    waits = {op.mutates[0]: op.name for op in plan.program.operations if isinstance(op, Wait)}
    between = plan.order[plan.order.index(copy.name) + 1 : plan.order.index(waits[copy.in_flight_results[0]])]
    return sum(not isinstance(plan.program.by_name[name], (HostCopy, Wait)) for name in between)


def peak_of(graphs: object) -> int:
    found = list(graphs)  # type: ignore[call-overload]
    joins = {later: earlier for g in found for earlier, later in g.joins}
    return step_peak([g.plan for g in found], joins).nbytes


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def measured(run: Callable[[], object]) -> int:
    """Bytes of a warm step at its peak, above those before it."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int = 8, steps: int = 4) -> dict[str, float]:
    """Medians over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(steps):
                run()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / steps * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


#: How many times as fast as it is the bus is taken for, unless told otherwise.
BUS = 8.0
#: Budgets that are tried, of what the step needs that computes nothing again, until one has copies in flight.
PARTS = (0.8, 0.7, 0.9, 0.6)
STACKS: dict[bool, Stack] = {}


def stacks(bus: float = BUS, device: str = "cuda") -> tuple[Stack, Stack]:
    if not STACKS:
        for part in PARTS:
            mine = Stack(part, bus, copies=True, device=device)
            if mine.hidden:
                STACKS[True], STACKS[False] = mine, Stack(part, bus, copies=False, device=device)
                break
        else:
            raise AssertionError(f"no budget of {PARTS} has copies beside kernels")
    return STACKS[True], STACKS[False]


def bandwidth() -> str:
    """What plans are made with, measured as in a compilation: while fake tensors are traced."""
    with FakeTensorMode():
        told = copy_figures("cuda:0", Config(cache_dir=tempfile.mkdtemp())).host_bandwidth
    device = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    found = milliseconds({"out": lambda: host.copy_(device, non_blocking=True)})["out"]
    seen = host.numel() / found / 1e3
    if not 0.7 < told / seen < 1.4:
        raise AssertionError(f"plans suppose {told / 1e3:.1f} GB/s, a copy of 256 MiB has {seen / 1e3:.1f}")
    return f"plans suppose {told / 1e3:.1f} GB/s, a copy of 256 MiB has {seen / 1e3:.1f}"


def compiled(bus: float) -> str:
    mine, _ = stacks(bus)
    return f"a budget of {mine.budget / 1e6:.0f} MB, planned for a bus {bus:g} times as fast as it is"


def numbers() -> str:
    mine, plain = stacks()
    if not mine.copies or plain.copies:
        raise AssertionError(f"{mine.copies} copies with offload, {plain.copies} without")
    if not same(mine.step(), plain.step()):
        raise AssertionError("gradients differ from those without offload")
    return f"equal bit for bit, {mine.copies} copies a step, {mine.hidden} of them beside kernels"


def delays() -> str:
    mine, plain = stacks()
    expected = plain.step()
    random.seed(0)

    def delay(stream: torch.cuda.Stream, direction: str) -> None:
        if random.random() < 0.5:
            torch.cuda._sleep(random.randrange(1, 2_000_000))

    wrong = 0
    for _ in range(30):
        host_copies.before_copy.append(delay)
        try:
            wrong += not same(mine.step(), expected)
        finally:
            host_copies.before_copy.clear()
    if wrong:
        raise AssertionError(f"{wrong} of 30 steps wrong")
    return "30 steps with random delays of up to 1 ms on the copies' streams: all equal"


def several() -> str:
    mine, plain = stacks()
    expected = plain.step()
    losses = [mine.call(mine.model, mine.x) for _ in range(3)]
    for loss in reversed(losses):
        if not same(list(torch.autograd.grad(loss, mine.parameters)), expected[1:]):
            raise AssertionError("one of three forwards before their backwards is wrong")
    loss = mine.call(mine.model, mine.x)
    for keep in (True, True, False):
        if not same(list(torch.autograd.grad(loss, mine.parameters, retain_graph=keep)), expected[1:]):
            raise AssertionError("a kept graph gives other gradients")
    with torch.autograd.graph.save_on_cpu():
        loss = mine.call(mine.model, mine.x)
    if not same(list(torch.autograd.grad(loss, mine.parameters)), expected[1:]):
        raise AssertionError("hooks change the gradients")
    return "three forwards, three backwards of a kept graph, save_on_cpu: all equal"


def peaks() -> str:
    mine, plain = stacks()
    rows = []
    for title, one in (("offload", mine), ("same cut without", plain)):
        found = measured(one.step)
        rows.append(
            f"{title}: predicted {one.predicted / 1e6:.1f} MB, measured {found / 1e6:.1f} "
            f"({100 * (one.predicted / found - 1):+.2f} %), budget {one.budget / 1e6:.1f}"
        )
    return "; ".join(rows)


def times() -> str:
    mine, plain = stacks()
    found = milliseconds({"offload": mine.step, "without": plain.step})
    figures = copy_figures("cuda:0", Config())
    alone = mine.nbytes / figures.host_bandwidth / 1e3
    beside = found["without"] + alone - found["offload"]
    return (
        f"offload {found['offload']:.2f} ms, same cut without {found['without']:.2f}; {mine.nbytes / 1e6:.0f} MB there "
        f"and back take {alone:.2f} ms in one direction after the other: {beside:.2f} ms at once with something else"
    )


def llama(goal: float) -> str:
    """All there is on the device within ``goal`` GB: the budget is what parameters and the batch leave of it."""
    STACKS.clear()
    gc.collect()
    torch.cuda.empty_cache()
    (case,) = cases("cuda", ["llama-0.9b"])
    start = torch.cuda.memory_allocated()
    module, batch = case.make()
    resident = torch.cuda.memory_allocated() - start
    runs: dict[str, Callable[[], object]] = {}
    rows = []
    systems: dict[str, dict[str, object]] = {
        "inductor": {"backend": "inductor"},
        "memplan": {"backend": "memplan"},
        f"memplan {goal:g} GB, offload": {
            "backend": "memplan",
            "options": {"budget": int(goal * 1e9) - resident, "offload": True},
        },
        f"memplan {goal:g} GB": {"backend": "memplan", "options": {"budget": int(goal * 1e9) - resident}},
    }
    for name, arguments in systems.items():
        try:
            compiled = torch.compile(module, **arguments)  # type: ignore[call-overload]

            def run(compiled: Callable[..., Tensor] = compiled) -> None:
                compiled(*batch).backward()
                module.zero_grad(set_to_none=True)

            begin = time.perf_counter()
            with memplan.record() as recorded:
                run()
            graphs = [g for g in recorded.graphs if g.plan.order]
            predicted = peak_of(graphs) + resident if graphs else 0
            copied = sum(
                g.plan.program.nbytes(op.in_flight_results[0])
                for g in graphs
                for op in g.plan.program.operations
                if isinstance(op, HostCopy) and op.offloads
            )
            seconds = time.perf_counter() - begin
            peak = measured(run) + resident
            alone = milliseconds({name: run}, rounds=5)[name]
            rows.append(
                f"{name}: {alone:.1f} ms, peak {peak / 1e9:.3f} GB, predicted {predicted / 1e9:.3f}, "
                f"reserved {torch.cuda.max_memory_reserved() / 1e9:.2f}, {copied / 1e9:.2f} GB to the host, "
                f"first step {seconds:.0f} s"
            )
            print("   ", rows[-1], flush=True)
            runs[name] = run
        except Exception:
            traceback.print_exc()
            rows.append(f"{name}: failed")
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    base = runs.get("inductor")
    for name, run in runs.items():
        if base is not None and run is not base:
            found = milliseconds({"inductor": base, name: run})
            rows.append(f"{name} / inductor, in turns: {found[name] / found['inductor']:.3f}")
    return "\n    ".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goal", type=float, default=6.0, help="GB of the Llama-style model in all")
    parser.add_argument("--no-llama", action="store_true")
    parser.add_argument("--bus", type=float, default=BUS, help="how many times as fast as it is the bus is taken for")
    given = parser.parse_args()
    checks: dict[str, Callable[[], str]] = {
        "bandwidth": bandwidth, "stacks": lambda: compiled(given.bus), "numbers": numbers, "delays": delays,
        "peaks": peaks, "times": times,
        "several": several,  # last: hooks make a region keep to backwards that free nothing
    }  # fmt: skip
    if not given.no_llama:
        checks["llama"] = lambda: llama(given.goal)
    failed = 0
    for name, check in checks.items():
        begin = time.perf_counter()
        try:
            said = f"ok      {check()}"
        except Exception:
            failed += 1
            said = f"FAILED  {traceback.format_exc()}"
        print(f"{name:9} {time.perf_counter() - begin:6.1f} s  {said}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
