"""Run one step of a compiled model and measure its peak, to hold against the plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..ir.errors import MemplanError
from .measure_steps import on_timeline, sampled_cpu, sampled_cuda
from .model import Measurement, Report
from .target import Made, Request, TargetError, report_from, wants_backward

#: What a step can be measured with, beside memplan itself.
BACKENDS = ("eager", "inductor")
#: Stages of `measured`.
STAGES = 3


def measured(
    made: Made, request: Request, target: str, begin: Callable[[str], None] = lambda stage: None, *, warm_up: int = 2
) -> Report:
    """Compile with this backend, run ``warm_up`` steps and a measured one, and report plan and measurement.

    ``begin`` is told of each of the `STAGES`.

    Raises
    ------
    TargetError
        If the step fails, or nothing of it was compiled.
    """
    import memplan

    begin("compiling, and running the first steps")
    step = _step(made, compiled_with(made, request, "memplan"), backward_wanted(made, request))
    with failures(target), memplan.record() as recording:
        for _ in range(max(1, warm_up)):
            step()
    begin("measuring the peak")
    with failures(target):
        measurement = measure(step, _device(made))
    report = report_from(recording.graphs, target=target, measured=measurement)
    begin("measuring step by step of the plan")
    timeline = _timeline(made, request, target, report, [g.plan.program.name for g in recording.graphs])
    return report.model_copy(update={"measured": (measurement.model_copy(update={"timeline": timeline}),)})


def _timeline(
    made: Made, request: Request, target: str, report: Report, names: Sequence[str]
) -> tuple[int | None, ...]:
    """What the steps of the plan hold, measured on a run of the same plan by its Python wrapper."""
    import memplan

    options = {**request.options, "wrapper": "python"}
    step = _step(
        made, compiled_with(made, replace(request, options=options), "memplan"), backward_wanted(made, request)
    )
    with failures(target), memplan.record() as recording:
        step()
    again = [g.plan.program.name for g in recording.graphs]
    device = _device(made)
    with failures(target):
        gc.collect()
        series = sampled_cuda(step, device) if device.type == "cuda" else sampled_cpu(step)
    return on_timeline(series, dict(zip(again, names, strict=False)), report.step)


def measured_with(made: Made, request: Request, backend: str, target: str, *, warm_up: int = 2) -> Measurement:
    """The measured peak of a step with another backend of `BACKENDS`."""
    step = _step(made, compiled_with(made, request, backend), backward_wanted(made, request))
    with failures(target):
        for _ in range(max(1, warm_up)):
            step()
        return measure(step, _device(made))


@contextmanager
def failures(target: str) -> Iterator[None]:
    """What fails inside is the target's failure, and says so."""
    try:
        yield
    except TargetError:
        raise
    except MemplanError as error:
        raise TargetError(str(error)) from error
    except Exception as error:
        raise TargetError(f"{target!r} failed while it ran: {type(error).__name__}: {error}") from error


def backward_wanted(made: Made, request: Request) -> bool:
    """Whether the step has a backward: as asked for, or as the model is."""
    return wants_backward(made.model) if request.backward is None else request.backward


def compiled_with(made: Made, request: Request, backend: str) -> Callable[..., object]:
    """The model as a backend compiles it (memplan with the asked options); in eager the model itself."""
    if backend == "eager":
        return made.model
    options = (dict(request.options) or None) if backend == "memplan" else None
    torch.compiler.reset()
    return torch.compile(made.model, backend=backend, dynamic=request.dynamic or None, options=options)  # type: ignore[arg-type]


def _step(made: Made, compiled: Callable[..., object], backward: bool) -> Callable[[], None]:
    """One step; what it makes (results, gradients) is gone when it returns."""
    parameters = list(made.model.parameters()) if isinstance(made.model, torch.nn.Module) else []

    def step() -> None:
        if not backward:
            with torch.no_grad():
                compiled(*made.args, **made.kwargs)
            return
        loss = scalar(compiled(*made.args, **made.kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        for p in parameters:
            p.grad = None

    return step


def scalar(result: object) -> torch.Tensor:
    """A loss: the result itself if it is one number, else the sum of its first floating tensor.

    Raises
    ------
    TargetError
        If no floating tensor is in the result.
    """
    if isinstance(result, torch.Tensor) and result.is_floating_point():
        return result if result.ndim == 0 else result.float().sum()
    loss = getattr(result, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    values = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    for item in values:
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            return scalar(item)
    raise TargetError(f"the model returns {type(result).__name__}, in which there is no tensor to differentiate")


def _device(made: Made) -> torch.device:
    if isinstance(made.model, torch.nn.Module):
        for p in made.model.parameters():
            return p.device
    for a in (*made.args, *made.kwargs.values()):
        if isinstance(a, torch.Tensor):
            return a.device
    return torch.device("cpu")


def measure(step: Callable[[], None], device: torch.device) -> Measurement:
    """Peak bytes above those before the step: of CUDA's allocator, or of the CPU's as the profiler sees it."""
    gc.collect()
    if device.type == "cuda":
        return _measure_cuda(step, device)
    return _measure_cpu(step)


def _measure_cuda(step: Callable[[], None], device: torch.device) -> Measurement:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    baseline, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    step()  # the first step after that fills the allocator's cache, beforehand in one piece: no tensor of the step's
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return Measurement(
        device=f"cuda:{index}",
        peak_allocated=max(0, torch.cuda.max_memory_allocated(device) - baseline),
        peak_reserved=max(0, torch.cuda.max_memory_reserved(device) - reserved),
        baseline=baseline,
    )


def _measure_cpu(step: Callable[[], None]) -> Measurement:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Measurement(device="cpu", peak_allocated=peak)
