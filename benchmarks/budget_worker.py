"""One model in one process: runs what `benchmarks.budget` asks for, one line of standard input after another.

Several of these compile at once; the device is used by one at a time, which holds a lock from its first step to its
last. Each answer is a line that starts with ``@@``, the rest of it is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

import memplan
import memplan.backend
import memplan.budget
from memplan.analysis import budget_curves
from memplan.calibration import figures_for
from memplan.ir.config import Config
from memplan.recording import record
from memplan.runtime.library_workspaces import make_workspaces

from .measure import measure, resident_bytes
from .models import CASES, Batch, Case
from .prediction import predicted_bytes
from .worker import MARK

Found = dict[str, object]
Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., object]]


class Turn:
    """The device to oneself: what was given to `take` is given back at the end of `over`."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.taken = False

    def take(self) -> None:
        if not self.taken:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.taken = True

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.taken:
                fcntl.flock(self.file, fcntl.LOCK_UN)
                self.taken = False


class Noted(memplan.budget.Budget):
    """A search whose planned rungs can be asked for afterwards."""

    last: Noted | None = None

    def search(self) -> tuple[memplan.budget.Modules, memplan.budget.Planned]:
        Noted.last = self
        return super().search()

    def above(self) -> tuple[int, int] | None:
        """Bytes of the least plan that was tried and is over the budget, and rungs between it and the best within."""
        needs = {rung: planned.peak.needed for rung, (_, planned) in self._tried.items()}
        over = {rung: n for rung, n in needs.items() if n > self.limit}
        within = [rung for rung in needs if rung not in over]
        if not over or not within:
            return None
        rung = min(over, key=lambda r: (over[r], r))
        return over[rung], max(0, rung - max(r for r in within if needs[r] == max(needs[w] for w in within)) - 1)


def bounds(module: nn.Module, batch: Batch) -> Found:
    """Bytes that the least and the fastest plan need, those that the default is predicted to, and when all is known."""
    with mock.patch.object(memplan.budget, "CURVE", 1):
        (points,) = budget_curves(module, batch)
    torch._dynamo.reset()
    default = predicted_bytes(memplan.analyze(module, batch))["predicted"]
    return {"least": points[0].nbytes, "most": points[-1].nbytes, "default": default}


def backend_of(job: Found) -> Backend:
    if job["system"] == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx  # type: ignore[no-any-return]
    options = {} if job["budget"] is None else {"budget": job["budget"]}
    return partial(memplan.backend.compile, options=options)


def run(job: Found, module: nn.Module, batch: Batch, case: Case, turn: Turn, given: argparse.Namespace) -> Found:
    """Compile, then step and measure with the device to oneself."""

    def compiled_first(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        made = backend_of(job)(graph, inputs)
        turn.take()
        return made

    eager = job["system"] == "eager"
    if eager:
        turn.take()
    share = job["budget"] if job["system"] == "inductor" and job["budget"] is not None else 1.0
    resident = resident_bytes(case.device)
    begin = time.perf_counter()
    with record() as recorded, mock.patch.object(memplan.backend, "Budget", Noted), functorch_config.patch(
        activation_memory_budget=share, force_non_lazy_backward_lowering=True
    ):  # fmt: skip
        call = module if eager else torch.compile(module, backend=compiled_first)
        gradients = digest(call, module, batch)
    found: Found = {"first_step_s": time.perf_counter() - begin, "gradients": gradients}
    found |= predicted_bytes(recorded.graphs)
    if job["system"] == "memplan" and job["budget"] is not None:
        assert Noted.last is not None
        found["above"] = Noted.last.above()

    def step() -> None:
        call(*batch).backward()
        module.zero_grad(set_to_none=True)

    return found | measure(step, case.device, repeats=given.repeats, seconds=given.seconds, resident=resident)


def digest(call: Callable[..., Tensor], module: nn.Module, batch: Batch) -> int:
    """One step's loss and gradients as a number; leaves no gradient."""
    torch.manual_seed(1)
    loss = call(*batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = 0
    for t in (loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)):
        found = zlib.crc32(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), found)
    module.zero_grad(set_to_none=True)
    return found


def answer(job: Found, module: nn.Module, batch: Batch, case: Case, turn: Turn, given: argparse.Namespace) -> Found:
    torch._dynamo.reset()
    Noted.last = None
    try:
        with turn.over():
            try:
                if job["system"] != "bounds":
                    return run(job, module, batch, case, turn, given)
                turn.take()
                figures_for(case.device, Config(), measure=True)
            finally:  # nothing of it is on the device when the next one has its turn
                torch._dynamo.reset()
                module.zero_grad(set_to_none=True)
                gc.collect()
                if case.device == "cuda":
                    torch.cuda.empty_cache()
        return bounds(module, batch)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget_worker")
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    case, turn = CASES[given.device, given.model], Turn(given.lock)
    if case.device == "cuda":  # cuBLAS keeps these for good: no system's step is charged with them
        make_workspaces(torch.cuda.current_device(), trains=case.training)
    module, batch = case.make()
    for line in sys.stdin:
        found = answer(json.loads(line), module, batch, case, turn, given)
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
