"""How long planning takes, stage by stage, and how it grows: with layers of a Llama, with dynamic sizes, with buffers.

python -m benchmarks.planning_time [NAME ...] [--runs 3] [-o benchmarks/results/planning_time.md]

Every measurement is a process of its own, on one thread. Times are seconds of the processor (`time.process_time`),
which other work on the machine stretches less than seconds of the clock; the table has the load beside them. Nothing
is built and nothing runs: models are traced with fake tensors. "ours" leaves out Dynamo, AOTAutograd and torch's
partitioner, "whole" has them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch

import memplan
from benchmarks import models
from memplan import compilation, kernels
from memplan.codegen.cpp_kernel import emit_cpp_library
from memplan.codegen.wrapper_lines import wrapper_lines
from memplan.ir.config import Config
from memplan.ir.plan import Plan
from memplan.ir.program import (
    Argument,
    Buffer,
    BufferKind,
    Contract,
    Extern,
    Literal,
    Phase,
    Program,
    TensorInput,
    Tuple,
    View,
)

#: (module, function or method, stage): what is timed; time in a stage inside another is not the other's.
STAGES = (
    ("memplan.backend", "simplify_masks", "capture"),
    ("memplan.backend", "capture", "capture"),
    ("memplan.capture.partition", "seed_random", "partition"),
    ("memplan.capture.partition", "chunk_losses", "partition"),
    ("memplan.compilation", "ProgramVerifier.__call__", "verify"),
    ("memplan.compilation", "verify_plan", "verify"),
    ("memplan.compilation", "reorder", "order"),
    ("memplan.passes.inplace", "plan_in_place", "in place"),
    ("memplan.compilation", "make_plan", "pools"),
    ("memplan.compilation", "choose", "pools"),
    ("memplan.compilation", "step_memories", "pools"),
    ("memplan.compilation", "own_peak", "peaks"),
    ("memplan.compilation", "_unplanned_peak", "peaks"),
)
#: Bytes of a budget for each layer: about two thirds of what the fastest plan needs.
BUDGET = 300_000
SMALL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
NAMES = (
    *("llama-4", "llama-16", "llama-64", "llama-4-dynamic", "gpt2-4", "gpt2-4-dynamic", "efficientnet"),
    *("gpt2-24-budget", "gpt2-96-budget"),
    *("buffers-1000", "buffers-10000", "buffers-100000"),
)


class Stages:
    """Seconds by stage, each without those of the stages inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []

    def timed(self, stage: str, function: Callable[..., object]) -> Callable[..., object]:
        @wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            start = time.process_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[stage] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The functions of `STAGES` and all passes timed, until the end."""
        places = [(importlib.import_module(m), path, stage) for m, path, stage in STAGES]
        undo: list[tuple[object, str, object]] = []
        for place, path, stage in (*places, *((p, "run", p.name) for p in compilation.PASSES)):
            owner: object = place
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self.timed(stage, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, original in undo:
                setattr(owner, name, original)


def model_of(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A small model whose graph is that of a large one, and a batch."""
    family, *rest = name.split("-")
    layers = int(rest[0]) if rest else 0
    if family == "llama":
        shape = {**SMALL, "num_hidden_layers": layers, "num_key_value_heads": 2, "max_position_embeddings": 128}
        return models.llama(torch.float32, **shape)().train(), models.tokens(1000, 2, 64)()
    if family == "gpt2":
        shape = {"n_layer": layers, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
        return models.gpt2(torch.float32, **shape)().train(), models.tokens(1000, 2, 64)()
    if family == "efficientnet":
        from transformers import EfficientNetConfig, EfficientNetForImageClassification

        config = EfficientNetConfig(width_coefficient=0.5, image_size=64, num_labels=10, hidden_dim=640)
        model = models.Classifier(EfficientNetForImageClassification(config))
        return model.train(), models.images(2, 64, 10)()
    raise SystemExit(f"unknown name {name!r}; known are {', '.join(NAMES)}")


def synthetic(buffers: int) -> Program:
    """Blocks of a matrix product, pointwise calls, a mean and a sum with the block's input, as captured from ATen."""
    rows, columns = 32, 48
    held: dict[str, Buffer] = {}
    operations: list[Extern] = []

    def view(name: str, kind: BufferKind, *sizes: int) -> View:
        strides = [1] * len(sizes)
        for k in range(len(sizes) - 2, -1, -1):
            strides[k] = strides[k + 1] * sizes[k + 1]
        count = strides[0] * sizes[0]
        held[name] = Buffer(name, 4 * count, torch.float32, "cpu", kind)
        return View(name, torch.float32, sizes, tuple(strides))

    def call(target: str, result: View, *args: Argument) -> View:
        operations.append(Extern(result.buffer, target, args, (), (result,), Contract.FRESH, "cpu"))
        return result

    def made(name: str, width: int = columns) -> View:
        return view(name, BufferKind.TEMPORARY, rows, width)

    x = start = view("x", BufferKind.INPUT, rows, columns)
    weight = view("weight", BufferKind.PARAMETER, columns, columns)
    for k in range(max(1, buffers // 6)):
        product = call("aten.mm.default", made(f"mm{k}"), x, weight)
        active = call("aten.relu.default", made(f"relu{k}"), product)
        scaled = call("aten.mul.Tensor", made(f"mul{k}"), active, Literal(0.5))
        mean = call("aten.mean.dim", made(f"mean{k}", 1), scaled, Tuple((Literal(1),)), Literal(True))
        centred = call("aten.sub.Tensor", made(f"sub{k}"), scaled, mean)
        x = call("aten.add.Tensor", made(f"add{k}"), x, centred)
    held[x.buffer] = Buffer(x.buffer, 4 * rows * columns, torch.float32, "cpu", BufferKind.OUTPUT)
    inputs = (TensorInput(0, start), TensorInput(1, weight))
    return Program("synthetic", Phase.INFERENCE, held, tuple(operations), inputs, (x,))


def emission(plan: Plan, stages: Stages) -> int:
    """Print kernels and wrapper lines of a plan; the number of distinct kernels."""

    def emit() -> int:
        found = kernels.collect(plan.program)
        mine = [(n, k) for n, (_, k) in found.sources.items()]
        emit_cpp_library(mine, plan.program.hints, deterministic=False)
        arguments = {n: (a.source, a.buffers, a.symbols) for n, a in found.arguments.items()}
        wrapper_lines(plan, arguments, {n: a.offsets for n, a in found.arguments.items()})
        return len(found.sources)

    count = stages.timed("emission", emit)()
    assert isinstance(count, int)
    return count


def measure(name: str) -> dict[str, object]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    stages = Stages()
    start, clock = time.process_time(), time.perf_counter()
    with stages.watching():
        if name.startswith("buffers-"):
            program = synthetic(int(name.partition("-")[2]))
            counted, start, clock = len(program.buffers), time.process_time(), time.perf_counter()
            plans = [compilation.plan_program(program, Config()).plan]
        else:
            model, batch = model_of(name)
            captured: list[int] = []
            region = importlib.import_module("memplan.region")
            original = region.capture

            def capture(*args: object, **kwargs: object) -> Program:
                made = original(*args, **kwargs)
                captured.append(len(made.operations))
                return made  # type: ignore[no-any-return]

            region.capture = capture
            dynamic = name.endswith("-dynamic")
            given = {"budget": BUDGET * int(name.split("-")[1])} if name.endswith("-budget") else None
            graphs = memplan.analyze(model, batch, fake=True, backward=True, dynamic=dynamic, options=given)
            plans, counted = [g.plan for g in graphs], sum(captured)
    distinct = sum(emission(plan, stages) for plan in plans)
    ours = sum(stages.seconds.values())
    return {
        "name": name, "counted": counted, "kernels": distinct, "steps": sum(len(p.order) for p in plans),
        "ours": ours, "whole": time.process_time() - start, "clock": time.perf_counter() - clock,
        "stages": dict(stages.seconds), "load": os.getloadavg()[0],
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def table(results: list[dict[str, object]]) -> Iterator[str]:
    """Markdown: one row a name, seconds per 1,000 operations (buffers, for the made-up programs) by stage."""
    names = list(dict.fromkeys(s for r in results for s in r["stages"]))  # type: ignore[attr-defined]
    head = ["", "operations", "steps", "kernels", "whole s", "ours s", "ours per 1,000", *names, "MB", "load"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for r in results:
        count = int(str(r["counted"]))
        per = [f"{1000 * r['stages'].get(s, 0.0) / count:.3f}" for s in names]  # type: ignore[attr-defined]
        cells = [
            r["name"], count, r["steps"], r["kernels"], f"{r['whole']:.1f}", f"{r['ours']:.2f}",
            f"{1000 * float(str(r['ours'])) / count:.2f}", *per, f"{r['megabytes']:.0f}", f"{r['load']:.1f}",
        ]  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


def median_of(name: str, runs: int) -> dict[str, object]:
    """The run with the median of seconds, each in a fresh process."""
    found = []
    for _ in range(runs):
        command = [sys.executable, "-m", "benchmarks.planning_time", "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    middle = statistics.median_low([float(r["ours"]) for r in found])
    return next(r for r in found if float(r["ours"]) == middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", help="measure this, here, and print it as JSON")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    results = []
    title = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} processors, one thread"
    for name in options.names:
        results.append(median_of(name, options.runs))
        text = "\n".join(["# Planning time", "", f"{title}; medians of {options.runs}", "", *table(results), ""])
        print(text, flush=True)
        if options.output:
            options.output.write_text(text)


if __name__ == "__main__":
    main()
