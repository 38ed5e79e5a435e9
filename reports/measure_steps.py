"""The bytes that a run really holds, step by step of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .model import Graph, once

#: Before a step's number in the profiler's events.
_MARK = "memplan step "
#: (graph, its run in the order of the runs, step in it) -> the most bytes held while it ran, above those before all.
Series = dict[tuple[str, int, int], int]


def sampled_cpu(step: Callable[[], None]) -> Series:
    """Of the CPU's allocator, as the profiler sees it."""
    from memplan.step_sampling import sampling

    def mark(name: str, number: int | None) -> None:
        with torch.profiler.record_function(f"{_MARK}{number} {name}"):
            pass

    activities = [torch.profiler.ProfilerActivity.CPU]
    with sampling(mark), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    series: Series = {}
    runs: dict[str, int] = {}
    live, now = 0, None
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
        elif event.name().startswith(_MARK):
            number, _, name = event.name().removeprefix(_MARK).partition(" ")
            now = (name, runs.setdefault(name, 0), int(number)) if number != "None" else None
            if now is None:
                runs[name] = runs.get(name, 0) + 1
        if now is not None:
            series[now] = max(series.get(now, 0), live)
    return series


@dataclass
class _CudaMarks:
    """Peaks between marks; ``peak`` of allocated bytes is kept for all, since marking starts it anew."""

    device: torch.device
    baseline: int
    series: Series = field(default_factory=dict)
    running: tuple[str, int, int] | None = None
    runs: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str, number: int | None) -> None:
        if self.running is not None:
            most = torch.cuda.max_memory_allocated(self.device) - self.baseline
            self.series[self.running] = max(self.series.get(self.running, 0), most)
        torch.cuda.reset_peak_memory_stats(self.device)
        run = self.runs.setdefault(name, 0)
        self.running = None if number is None else (name, run, number)
        if number is None:
            self.runs[name] = run + 1


def sampled_cuda(step: Callable[[], None], device: torch.device) -> Series:
    """Of CUDA's caching allocator, which counts when the host asks: nothing waits for the device."""
    from memplan.step_sampling import sampling

    torch.cuda.synchronize(device)
    marks = _CudaMarks(device, torch.cuda.memory_allocated(device))
    with sampling(marks):
        step()
    torch.cuda.synchronize(device)
    return marks.series


def on_timeline(series: Series, names: Mapping[str, str], graph: Graph) -> tuple[int | None, ...]:
    """The series along the steps of a report's graph; None where a step was not seen.

    Parameters
    ----------
    names:
        What a graph of the run is called in the report.
    """
    known = {(names.get(name, name), run, step): value for (name, run, step), value in series.items()}
    runs: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    out: list[int | None] = []
    for step in graph.steps:
        number = seen.get(step.graph, 0)
        seen[step.graph] = number + 1
        name = once(step.graph)
        labels = runs.setdefault(name, [])
        if not number:
            labels.append(step.graph)
        out.append(known.get((name, labels.index(step.graph), number)))
    return tuple(out) if any(v is not None for v in out) else ()
