"""How long a budget's search takes on GPT-2 of 12 to 96 layers, and whose time it is.

    python -m benchmarks.budget_time [LAYERS ...] [-o benchmarks/results/budget_time.md]

A GPT-2 of 768 wide layers without dropout and 16x1024 tokens is planned for an H100 that need not be there, with a
budget of 200 MB a layer, which is about a quarter of what the fastest plan needs. Every measurement is a process of its
own, on one thread, in seconds of the processor (`time.process_time`), without imports and tracing with fake tensors.
"torch's partitioner": its surgery on the joint graph, and the copies and common subexpressions that it wants. "model":
the joint graph read, losses in slices, menus and choices. "trial plans": cut, captured, passed, ordered and packed.
"taken": the plan that is taken captured again, verified and told.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan

from .models import BF16, gpt2, tokens
from .planning_time import Stages
from .simulate_reserved import fill

LAYERS = (12, 24, 48, 96)
#: Bytes of a budget for each layer.
BUDGET = 200_000_000
#: (module, function or method, stage); time in a stage inside another is not the other's.
STAGES = (
    ("memplan.capture.partition", "min_cut_rematerialization_partition", "torch's partitioner"),
    ("memplan.capture.partition", "fx_graph_cse", "torch's partitioner"),
    ("memplan.capture.partition", "copied", "torch's partitioner"),
    ("memplan.capture.partition", "chunk_losses", "model"),
    ("memplan.capture.partition", "choose_saved", "model"),
    ("memplan.budget", "make_menus", "model"),
    ("memplan.budget", "Choices.__init__", "model"),
    ("memplan.budget", "Choices.within", "model"),
    ("memplan.region", "Region.trial", "trial plans"),
    ("memplan.region", "Region.compile_forward", "taken"),
    ("memplan.region", "Region.compile_backward", "taken"),
)
COLUMNS = ("torch's partitioner", "model", "trial plans", "taken")


def measure(layers: int) -> dict[str, object]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    stages, calls = Stages(), [0]
    for module, path, stage in STAGES:
        owner: object = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function: Callable[..., object] = getattr(owner, name)
        setattr(owner, name, stages.timed(stage, counted(function, calls) if name == "trial" else function))
    with torch.device("meta"):
        model = gpt2(BF16, n_layer=layers, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        batch = tokens(50257, 16, 1024)()
        start = time.process_time()
        graphs = memplan.analyze(model, batch, options={"target": "h100", "budget": BUDGET * layers})
    whole = time.process_time() - start
    plan = graphs[-1].plan
    (memory,) = plan.step.values()
    return {
        "layers": layers, "plans": calls[0], "whole": whole, "stages": dict(stages.seconds),
        "used": (memory.reserved - memory.resident) / (BUDGET * layers), "load": os.getloadavg()[0],
        "operations": sum(len(g.plan.order) for g in graphs),
    }  # fmt: skip


def counted(function: Callable[..., object], calls: list[int]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        return function(*args, **kwargs)

    return call


def row(result: dict[str, object]) -> str:
    """Markdown of one measurement."""
    stages = result["stages"]
    assert isinstance(stages, dict)
    ours = sum(stages.get(s, 0.0) for s in COLUMNS[1:])
    rest = float(str(result["whole"])) - sum(stages.values())
    cells = [
        result["layers"], result["operations"], f"{result['used']:.3f}", result["plans"],
        *(f"{stages.get(s, 0.0):.1f}" for s in COLUMNS), f"{ours:.1f}", f"{rest:.1f}", f"{result['load']:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("layers", nargs="*", type=int, default=LAYERS)
    parser.add_argument("--one", type=int, help="measure this, here, and print it as JSON")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    head = ("layers", "steps", "used", "plans", *COLUMNS, "ours", "Dynamo, AOTAutograd", "load")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for layers in options.layers:
        command = [sys.executable, "-m", "benchmarks.budget_time", "--one", str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{layers} layers: {done.stderr[-2000:]}")
        lines.append(row(json.loads(done.stdout.splitlines()[-1])))
        title = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} processors"
        text = "\n".join(["# Searching a budget's plans", "", f"{title}, one thread; seconds", "", *lines, ""])
        print(text, flush=True)
        if options.output:
            options.output.write_text(text)


if __name__ == "__main__":
    main()
