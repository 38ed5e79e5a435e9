"""Measure the planner by itself: packing, order, randomly wired graphs against an exact oracle, growth with size.

python benchmarks/planner.py [--graphs 50] [-o benchmarks/results/planner.md]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import networkx as nx

from memplan import planner
from memplan.passes.order import order_ops
from memplan.passes.order_model import OrderBuffer, OrderGraph, adjacency, is_order
from memplan.passes.pack import PackProblem, pack_buffers

DATA = Path(__file__).parents[1] / "tests" / "data" / "planner"
CAPACITY = 1_048_576
ORACLE_STATES = 3_000_000
#: Seconds that the C++ solver's authors report for their instances.
PUBLISHED = {"A": 4.9, "C": 0.64, "D": 2.7, "E": 3.7, "G": 1.2, "I": 3.9, "K": 0.63}


def read_buffers(name: str) -> list[tuple[int, int, int]]:
    with (DATA / f"{name}.csv").open() as stream:
        return [(int(row["lower"]), int(row["upper"]), int(row["size"])) for row in csv.DictReader(stream)]


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    columns = list(header)
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def packing_rows() -> Iterator[tuple[object, ...]]:
    for path in sorted(DATA.glob("*.csv")):
        name, buffers = path.stem, read_buffers(path.stem)
        letter = name.removeprefix("minimalloc-")
        capacity = (1_039_360 if letter == "C" else CAPACITY) if letter in PUBLISHED else None
        start = time.perf_counter()
        packing = planner.pack(buffers, capacity=capacity)
        seconds = time.perf_counter() - start
        verdict = "" if capacity is None else "yes" if packing.arena <= capacity else "NO"
        over = f"{packing.gap * 100:.3f} %"
        published = PUBLISHED.get(letter, "")
        yield name, len(buffers), packing.arena, packing.max_live, over, verdict, f"{seconds:.2f}", published


def order_rows() -> Iterator[tuple[object, ...]]:
    for path in sorted(DATA.glob("*.json.gz")):
        data = json.loads(gzip.decompress(path.read_bytes()))
        for optimizer in (False, True):
            for inputs in planner.Inputs:
                graph = planner.graph_from_data(data, optimizer=optimizer, inputs=inputs)
                start = time.perf_counter()
                quick = order_ops(graph, native=planner.planner_libraries().order)
                middle = time.perf_counter()
                result = planner.order(graph)
                end = time.perf_counter()
                assert is_order(graph, result.order)
                yield (
                    path.name.removesuffix("_train.json.gz") + (" + updates" if optimizer else ""), inputs.value,
                    graph.ops, f"{(result.program_peak / result.lower_bound - 1) * 100:.3f} %",
                    f"{quick.gap * 100:.4f} %", f"{middle - start:.2f}", f"{result.gap * 100:.4f} %",
                    f"{end - middle:.2f}",
                )  # fmt: skip


def randomly_wired(seed: int, stages: int = 3, nodes: int = 32) -> OrderGraph:
    """Stages of Watts-Strogatz graphs with one entry and one exit each (Xie et al., ICCV 2019)."""
    generator = random.Random(seed)
    edges: list[tuple[int, int]] = []
    count = 0
    for stage in range(stages):
        wired = nx.connected_watts_strogatz_graph(nodes, 4, 0.75, seed=1000 * seed + stage)
        entry, first, end = count, count + 1, count + 1 + nodes
        inner = [(first + min(a, b), first + max(a, b)) for a, b in wired.edges]
        fed, read = {b for _, b in inner}, {a for a, _ in inner}
        edges += inner
        edges += [(entry, op) for op in range(first, end) if op not in fed]
        edges += [(op, end) for op in range(first, end) if op not in read]
        if stage:
            edges.append((entry - 1, entry))
        count = end + 1
    consumers: list[list[int]] = [[] for _ in range(count)]
    for earlier, later in edges:
        consumers[earlier].append(later)
    sizes = [generator.choice((1, 2, 3, 4, 6, 8, 12, 16)) * 1024 + generator.randrange(64) for _ in range(count)]
    buffers = tuple(OrderBuffer(sizes[v], v, tuple(sorted(consumers[v])), not consumers[v]) for v in range(count))
    return OrderGraph(count, buffers)


def transposed(seed: int) -> OrderGraph:
    """The graph of `randomly_wired` with each edge turned round."""
    graph = randomly_wired(seed)
    last = graph.ops - 1
    readers: list[list[int]] = [[] for _ in range(graph.ops)]
    for buffer in graph.buffers:
        for consumer in buffer.consumers:
            readers[last - consumer].append(last - buffer.producer)
    sizes = [buffer.size for buffer in reversed(graph.buffers)]
    buffers = (OrderBuffer(size, v, tuple(sorted(readers[v])), not readers[v]) for v, size in enumerate(sizes))
    return OrderGraph(graph.ops, tuple(buffers))


def differentiated(seed: int, nodes: int, *, joint: bool) -> OrderGraph:
    """One randomly wired stage with its backward, or the backward alone, to which what was saved is an input.

    The backward of a node reads what the node read, and a gradient from each reader of the node; gradients have the
    sizes of what they belong to and are summed up where they are read.
    """
    stage = randomly_wired(seed, 1, nodes)
    first = stage.ops if joint else 0
    at = [first + stage.ops - 1 - v for v in range(stage.ops)]  # the backward operation of each node
    made: list[OrderBuffer] = []
    for v, buffer in enumerate(stage.buffers):
        backward = tuple(sorted(at[reader] for reader in buffer.consumers)) or ((at[v],) if joint else ())
        if backward:
            forward = buffer.consumers if joint else ()
            made.append(OrderBuffer(buffer.size, v if joint else -1, (*forward, *backward)))
        made += [OrderBuffer(buffer.size, at[reader], (at[v],)) for reader in buffer.consumers]
    made.append(OrderBuffer(stage.buffers[0].size, at[0], (), True))
    return OrderGraph(first + stage.ops, tuple(made))


HARD: dict[str, Callable[[int], OrderGraph]] = {
    "transposed randomly wired, 102 operations": transposed,
    "forward and backward of one stage of 50 nodes": lambda seed: differentiated(seed, 50, joint=True),
    "backward of one stage of 100 nodes": lambda seed: differentiated(seed, 100, joint=False),
    "30 stages of 32 nodes": lambda seed: randomly_wired(seed, 30),
    "one stage of 100 nodes": lambda seed: randomly_wired(seed, 1, 100),
}


def hard_rows(count: int, seconds: float) -> Iterator[tuple[object, ...]]:
    for name, build in HARD.items():
        found = [planner.order(build(seed), time_limit=seconds, tolerance=0.0) for seed in range(count)]
        gaps = sorted(result.gap for result in found)
        saved = statistics.median(result.program_peak / result.peak - 1 for result in found)
        proved = sum(result.optimal for result in found)
        yield (
            name, f"{seconds:g}", f"{proved} of {count}", f"{statistics.median(gaps) * 100:.2f} %",
            f"{gaps[-1] * 100:.1f} %", f"{saved * 100:.0f} %",
        )  # fmt: skip


def can_stay_below(graph: OrderGraph, peak: int) -> bool | None:
    """The oracle: whether some order's peak is below ``peak``, by looking at every set of operations that may have run.

    It shares nothing with the planner: no bound, no reduction, no order of preference. None if there are too many.
    """
    near = adjacency(graph)
    needs = [sum(1 << op for op in ops) for ops in near.before]
    users = [sum(1 << op for op in buffer.consumers) for buffer in graph.buffers]
    full = (1 << graph.ops) - 1
    seen = {0}
    stack = [(0, graph.initial_bytes())]
    while stack:
        done, live = stack.pop()
        if done == full:
            return True
        if len(seen) > ORACLE_STATES:
            return None
        for op in range(graph.ops):
            if done >> op & 1 or needs[op] & ~done:
                continue
            during = live + sum(graph.buffers[b].size for b in near.outputs[op])
            after = done | 1 << op
            if during >= peak or after in seen:
                continue
            seen.add(after)
            dying = (b for b in near.inputs[op] if not users[b] & ~after and not graph.buffers[b].kept)
            stack.append((after, during - sum(graph.buffers[b].size for b in dying)))
    return False


def wired_lines(count: int) -> Iterator[str]:
    certified = optimal = undecided = 0
    slowest = worst = program = 0.0
    for seed in range(count):
        graph = randomly_wired(seed)
        start = time.perf_counter()
        result = planner.order(graph, time_limit=1.0, tolerance=0.0)
        slowest = max(slowest, time.perf_counter() - start)
        certified += result.optimal
        program = max(program, result.program_peak / result.peak - 1)
        better = can_stay_below(graph, result.peak)
        optimal += better is False
        undecided += better is None
        within = can_stay_below(graph, int(result.peak / 1.02)) if better else False
        worst = max(worst, 0.02 if within else 0.0)
    yield f"- {count} graphs of {graph.ops} operations, 1 s each at most; slowest {slowest:.2f} s."
    yield f"- The oracle proves {optimal} of {count} optimal ({undecided} have too many sets for it); the planner's own"
    yield f"  certificate says so of {certified}. More than 2 % above the optimum: {'some' if worst else 'none'}."
    yield f"- The program order is up to {program * 100:.0f} % above what was found."
    yield ""


def training_graph(buffers: int) -> OrderGraph:
    """A deep network's training step with updates at the end: 5 operations a layer, 5 buffers."""
    generator = random.Random(buffers)
    layers = buffers // 5
    made: list[OrderBuffer] = []
    backward, update = 2 * layers, 4 * layers
    for layer in range(layers):
        size = generator.choice((1, 2, 4, 8)) * 65536
        norm, linear = 2 * layer, 2 * layer + 1
        gradient, weight = backward + 2 * (layers - 1 - layer), backward + 2 * (layers - 1 - layer) + 1
        made.append(OrderBuffer(size, norm, (linear, weight)))
        following = (linear + 1, gradient) if layer + 1 < layers else (gradient,)
        made.append(OrderBuffer(2 * size, linear, following))
        made.append(OrderBuffer(size, gradient, (weight, gradient + 2) if layer else (weight,)))
        made.append(OrderBuffer(4 * size, weight, (update + layer,)))
        made.append(OrderBuffer(512, update + layer, (), True))
    return OrderGraph(5 * layers, tuple(made))


def growth_rows(sizes: Iterable[int]) -> Iterator[tuple[object, ...]]:
    libraries = planner.planner_libraries()
    for size in sizes:
        for kind in ("compiled", "Python"):
            graph = training_graph(size)
            start = time.perf_counter()
            result = order_ops(graph, native=libraries.order if kind == "compiled" else None)
            middle = time.perf_counter()
            problem = problem_of(graph, result.order)
            packing = pack_buffers(problem, native=libraries.pack if kind == "compiled" else None)
            end = time.perf_counter()
            yield (
                f"{len(graph.buffers):,}", kind, f"{middle - start:.2f}", f"{end - middle:.2f}",
                f"{(result.program_peak / result.peak - 1) * 100:.1f} %", f"{result.gap * 100:.3f} %",
                f"{packing.gap * 100:.3f} %",
            )  # fmt: skip


def problem_of(graph: OrderGraph, order: tuple[int, ...]) -> PackProblem:
    """Lifetimes in steps under an order."""
    place = {op: index for index, op in enumerate(order)}
    lower = tuple(place[buffer.producer] if buffer.producer >= 0 else 0 for buffer in graph.buffers)
    ends = (max((place[op] for op in b.consumers), default=at) for b, at in zip(graph.buffers, lower, strict=True))
    upper = tuple(graph.ops if b.kept else end + 1 for b, end in zip(graph.buffers, ends, strict=True))
    return PackProblem(lower, upper, tuple(buffer.size for buffer in graph.buffers))


def report(graphs: int) -> Iterator[str]:
    note = planner.planner_libraries().note
    yield "# The planner by itself"
    yield ""
    load = os.getloadavg()[0]
    yield f"Measured by `benchmarks/planner.py` on {platform.machine()}, {os.cpu_count()} cores (load {load:.1f} at the"
    yield f"start; times are upper bounds), Python {platform.python_version()}{', ' + note if note else ''}. Seconds."
    yield ""
    yield "## Offsets"
    yield ""
    yield "minimalloc instances with a capacity of 1,048,576 (C: 1,039,360); the others without one."
    yield ""
    header = ("instance", "buffers", "arena", "max-live", "over", "fits", "seconds", "published")
    yield from table(header, packing_rows())
    yield "## Order"
    yield ""
    yield "Percentages are over the certified lower bound. `in a compilation` has a work limit and no clock."
    yield ""
    header = ("graph", "inputs", "ops", "program order", "in a compilation", "s", "memplan order", "s")
    yield from table(header, order_rows())
    yield "## Randomly wired graphs"
    yield ""
    yield from wired_lines(graphs)
    yield "## Harder graphs"
    yield ""
    header = ("graphs", "s each", "proved", "gap, median", "worst", "program order over it, median")
    yield from table(header, (row for count, seconds in ((20, 1.0), (10, 5.0)) for row in hard_rows(count, seconds)))
    yield "## Growth"
    yield ""
    yield "A training step of a deep network with updates at the end, limits as inside a compilation."
    yield ""
    header = ("buffers", "way", "order", "packing", "program order over it", "gap of order", "gap of packing")
    yield from table(header, growth_rows((1_000, 10_000, 100_000)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=50)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments.graphs):
        print(line, flush=True)
        lines.append(line)
    if arguments.output:
        arguments.output.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
