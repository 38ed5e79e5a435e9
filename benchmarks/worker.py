"""One model under one system, in a process of its own.

It compiles (and runs the first step, which builds what is built lazily), compares with eager, moves the model off the
device, says so on standard output and waits for a line on standard input; then it measures alone and ends. Messages
are lines that start with ``@@``, the rest of the line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .device_memory import DeviceMemory
from .measure import measure, resident_bytes
from .models import CASES, Batch, Case
from .prediction import predicted_bytes
from .systems import System

MARK = "@@"


def say(**message: object) -> None:
    print(MARK + json.dumps(message), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker")
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--optimizer", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--alone", action="store_true", help="no other worker holds a context on the device")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        _work(CASES[given.device, given.model], System.parse(given.system), given)
    except Exception as e:
        traceback.print_exc()
        text = str(e).strip()
        say(stage="failed", error=f"{type(e).__name__}: {text[:1500]}")
        sys.exit(1)


def _work(case: Case, system: System, given: argparse.Namespace) -> None:
    device_memory = DeviceMemory.before_context(alone=given.alone) if case.device == "cuda" else None
    _first_products(case.device)
    module, batch = case.make()
    reference = None if system.backend == "eager" else _answer(module, batch, case)
    _release(module, case.device)
    system = system.with_bytes(module, batch)
    with recording(system) as graphs:
        compiled = system.compile(module)
        begin = time.perf_counter()
        answer = _answer(compiled, batch, case)
        seconds = time.perf_counter() - begin
    found: dict[str, object] = {"compile_s": seconds}
    if reference is not None:
        found |= compare(answer, reference)
        found |= against_wider(answer, reference, case)
    found |= predicted_bytes(graphs)
    if "budget" in system.options:
        found["budget"] = system.options["budget"]
    parameters = [*module.parameters(), *module.buffers()]
    found["parameters"] = sum(p.numel() for p in module.parameters())
    del reference, answer
    home = _move(parameters, "cpu") if case.device != "cpu" else None
    batch = tuple(t.cpu() for t in batch)
    _release(module, case.device)
    say(stage="compiled", **found)
    sys.stdin.readline()
    if home is not None:
        _move(parameters, case.device)
        batch = tuple(t.to(case.device) for t in batch)
    step = _step(compiled, module, batch, case)
    if given.profile:
        from .kernels import kernel_times

        say(stage="done", **kernel_times(step, case.device))
        return
    used = device_memory.of_this_process if device_memory is not None else lambda: None
    resident = resident_bytes(case.device)
    found = dict(measure(step, case.device, repeats=given.repeats, seconds=given.seconds, used=used, resident=resident))
    if given.optimizer and case.training:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
        accumulated = _accumulating_step(compiled, optimizer, batch)
        accumulated()
        resident = resident_bytes(case.device)  # with the optimiser's states
        found["optimizer"] = measure(
            accumulated, case.device, repeats=given.repeats, seconds=given.seconds, used=used, resident=resident
        )
    elif case.random and system.backend != "eager":
        found |= agreement_under_eagers_random_numbers(module, batch, case, system)
    say(stage="done", **found)


def _first_products(device: str) -> None:
    """One product forward and one backward, at which cuBLAS gets its workspaces: one for each thread, for good. Carved
    out of what a large step has freed they would keep all of that segment from going back to the device."""
    if device == "cuda":
        one = torch.ones((64, 64), device=device, dtype=torch.bfloat16, requires_grad=True)
        torch.nn.functional.linear(one, one, one[0]).sum().backward()  # type: ignore[no-untyped-call]


def _step(compiled: Callable[..., Tensor], module: nn.Module, batch: Batch, case: Case) -> Callable[[], object]:
    """One step that leaves no gradient and no result."""
    parameters = list(module.parameters())

    def train() -> None:
        compiled(*batch).backward()  # type: ignore[no-untyped-call]
        for p in parameters:
            p.grad = None

    def infer() -> None:
        with torch.no_grad():
            compiled(*batch)

    return train if case.training else infer


def _accumulating_step(
    compiled: Callable[..., Tensor], optimizer: torch.optim.Optimizer, batch: Batch
) -> Callable[[], object]:
    """Gradients accumulated over two forward and backward passes, then the optimiser."""

    def step() -> None:
        for _ in range(2):
            compiled(*batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _answer(function: Callable[..., Tensor], batch: Batch, case: Case) -> list[Tensor]:
    """Loss and gradients (or the result) of one step, on the CPU, from the same random state; leaves no gradient."""
    torch.manual_seed(1)
    if not case.training:
        with torch.no_grad():
            return [function(*batch).cpu()]
    module = function if isinstance(function, nn.Module) else None
    assert module is not None, "torch.compile of a module gives a module"
    loss = module(*batch)
    loss.backward()
    out = [loss.detach().cpu()]
    for p in module.parameters():
        out.append(p.grad.cpu() if p.grad is not None else torch.zeros(()))
        p.grad = None
    return out


def compare(answer: list[Tensor], reference: list[Tensor]) -> dict[str, object]:
    """How far from eager: of the loss (or result), and of all gradients together, as norms of the difference over
    the norms of eager's; and whether everything is finite."""
    finite = all(bool(torch.isfinite(t).all()) for t in answer)
    first = _relative(answer[:1], reference[:1])
    found: dict[str, object] = {"finite": finite, "result_difference": first}
    if len(answer) > 1:
        found["gradient_difference"] = _relative(answer[1:], reference[1:])
    return found


def against_wider(answer: list[Tensor], reference: list[Tensor], case: Case) -> dict[str, object]:
    """How far this answer's gradients (or result) and eager's are from those of eager in a wider dtype.

    Nothing where that does not fit on the device.
    """
    try:
        exact = _wider_answer(case)
    except torch.OutOfMemoryError:
        return {}
    finally:
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
    first = 1 if len(answer) > 1 else 0
    return {
        "reference_difference": _relative(answer[first:], exact[first:]),
        "eager_reference_difference": _relative(reference[first:], exact[first:]),
    }


def _wider_answer(case: Case) -> list[Tensor]:
    """The step in float64, or in float32 where the model computes in half types; without TF32 and autocast."""
    module, batch = case.make()
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()) or getattr(module, "amp", False)
    dtype = torch.float32 if half else torch.float64
    if hasattr(module, "amp"):
        module.amp = False  # type: ignore[assignment]
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
        return _answer(module.to(dtype), batch, case)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def agreement_under_eagers_random_numbers(
    module: nn.Module, batch: Batch, case: Case, system: System
) -> dict[str, object]:
    """Compiled once more, drawing what eager draws: only so do models with dropout compare at all."""
    torch._dynamo.reset()
    answer = _answer(system.with_eager_random().compile(module), batch, case)
    reference = _answer(module, batch, case)
    return compare(answer, reference) | against_wider(answer, reference, case)


def _relative(new: list[Tensor], old: list[Tensor]) -> float:
    difference = total = 0.0
    for a, b in zip(new, old, strict=True):
        if a.shape != b.shape:
            raise RuntimeError(f"a result has shape {tuple(a.shape)}, in eager {tuple(b.shape)}")
        difference += float((a.double() - b.double()).norm()) ** 2
        total += float(b.double().norm()) ** 2
    return (difference / total) ** 0.5 if total else difference**0.5


def _move(tensors: list[Tensor], device: str) -> bool:
    for t in tensors:
        t.data = t.data.to(device)
    return True


def _release(module: nn.Module, device: str) -> None:
    module.zero_grad(set_to_none=True)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def recording(system: System) -> Iterator[list[object]]:
    """The graphs that memplan compiles inside; empty for the other systems."""
    if system.backend != "memplan":
        yield []
        return
    from memplan.recording import record

    graphs: list[object] = []
    with record() as recorded:
        yield graphs
        graphs.extend(recorded.graphs)


if __name__ == "__main__":
    main()
