"""Times of launches on a GPU, by CUDA graphs of several runs: medians over rounds in which all take turns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

_log = logging.getLogger("memplan.triton")
_GRAPH_MICROSECONDS = 400.0
_ROUNDS = 7
#: about half a millisecond, several times what two launches take
_SLEEP_CYCLES = 1_000_000


def device_times(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Microseconds of each: medians over rounds in which all take turns."""
    graphs: list[tuple[torch.cuda.CUDAGraph | None, int]] = []
    for run in runs:
        try:
            graphs.append(_recorded(run))
        except Exception as error:  # a configuration that asks for too much shared memory, for example
            _log.info("a contender cannot run: %s", error)
            graphs.append((None, 1))
    times: list[list[float]] = [[] for _ in runs]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(_ROUNDS):
        for k, (graph, count) in enumerate(graphs):
            if graph is None:
                continue
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[k].append(begin.elapsed_time(end) * 1000 / count)
    give_workspaces_back()  # those of the streams that recorded
    return [sorted(t)[len(t) // 2] if t else math.inf for t in times]


def _recorded(run: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of as many runs as take a few hundred microseconds, and how many those are.

    How many follows from the device's time alone: by the host's, calls that are slow to launch would have the graphs of
    fewest runs, each of which bears more of what starting a graph costs (some microseconds). The runs before it are on
    the current stream, and the libraries' workspaces (32 MiB and more for each stream) are given back before the graph
    takes its own: one at a time, as when the model runs.
    """
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # while the device waits, the host gets ahead of it
    torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    run()
    end.record()
    end.synchronize()
    count = max(3, min(50, int(_GRAPH_MICROSECONDS / max(1.0, begin.elapsed_time(end) * 1000 / 2))))
    give_workspaces_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    graph.replay()
    return graph, count


def give_workspaces_back() -> None:
    """Free what cuBLAS keeps for each stream; recorded graphs hold theirs, and the next call takes new."""
    torch._C._cuda_clearCublasWorkspaces()
