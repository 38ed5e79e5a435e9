"""What compiling costs, cold and warm, memplan and Inductor in the same run: ``python -m benchmarks.compile_time``.

Every row is a process of its own, with one caching directory for a cold and a warm process of a backend; a warm row is
the quickest of several, which the backends take in turns. *first* is the first forward and backward altogether;
*compilers* the time inside of what AOTAutograd calls to compile (capture, planning, code and its loading; for Inductor
its ``compile_fx_inner``), also per 1,000 captured operations. Warm, both take the result of AOTAutograd from a cache as
well; Inductor then runs none of its compilers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .models import gpt2, llama, tokens

if TYPE_CHECKING:  # (a process that measures Inductor imports none of it)
    from memplan.ir.program import Program

F32 = torch.float32
RESULTS = Path(__file__).parent / "results" / "compile_time-cpu.md"


@dataclass(frozen=True)
class Row:
    """One process. Times in seconds; ``operations`` of all captured graphs, 0 where nobody counts them."""

    model: str
    layers: int
    backend: str
    start: str
    first: float
    compilers: float
    operations: int


def make(model: str, layers: int) -> Callable[[], nn.Module]:
    """A small model of so many layers."""
    if model == "gpt2":
        return gpt2(F32, n_layer=layers, n_embd=64, n_head=4, vocab_size=512, n_positions=64)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(F32, num_hidden_layers=layers, vocab_size=512, max_position_embeddings=64, **sizes)


def measure(model: str, layers: int, backend: str, start: str) -> Row:
    """Compile and run one training step in this process."""
    torch.manual_seed(0)
    module, batch = make(model, layers)(), tokens(512, 2, 32)()
    spent, operations = _watched(backend)
    compiled = torch.compile(module, backend=backend)
    begin = time.perf_counter()
    compiled(*batch).backward()
    first = time.perf_counter() - begin
    return Row(model, layers, backend, start, first, spent(), operations())


def _watched(backend: str) -> tuple[Callable[[], float], Callable[[], int]]:
    """Seconds inside of the compilers, and operations, both asked for afterwards."""
    if backend != "memplan":
        import torch._dynamo.utils as dynamo

        return lambda: sum(dynamo.compilation_time_metrics.get("compile_fx_inner", ())), lambda: 0
    from memplan.region import Region

    seconds: list[float] = []
    counts: list[int] = []
    running: list[str] = []

    def timed(name: str) -> None:
        original = getattr(Region, name)

        def compile(self: object, *given: object, **named: object) -> object:
            begin = time.perf_counter()
            running.append(name)
            try:
                return original(self, *given, **named)
            finally:
                running.pop()
                if not running:
                    seconds.append(time.perf_counter() - begin)

        setattr(Region, name, compile)

    def note(self: object, program: Program, traced: object) -> None:
        counts.append(len(program.operations))
        noted(self, program, traced)

    noted, Region.note = Region.note, note  # type: ignore[method-assign,assignment]
    for phase in ("forward", "backward", "inference"):
        for name in (f"compile_{phase}", f"finish_{phase}"):  # of traced graphs, and of those from the cache
            timed(name)
    return lambda: sum(seconds), lambda: sum(counts)


def run(model: str, layers: int, backend: str, start: str, cache: str) -> Row:
    """`measure` in a process of its own."""
    env = os.environ | {
        "MEMPLAN_CACHE_DIR": f"{cache}/memplan", "MEMPLAN_PLAN_CACHE": "1", "MEMPLAN_TRACE_CACHE": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.compile_time", "--one", model, str(layers), backend, start]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{model} {layers} {backend} {start} failed:\n{done.stderr[-4000:]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Row]) -> str:
    """The rows as a page."""
    lines = [
        "# Compiling, cold and warm",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores of a machine that also "
        f"did other things (load {os.getloadavg()[1]:.0f}); one training step. `python -m benchmarks.compile_time`",
        "",
        "| model | layers | backend | start | first step s | compilers s | operations | s per 1,000 operations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rate = f"{1000 * r.compilers / r.operations:.2f}" if r.operations else "n/a"
        lines.append(
            f"| {r.model} | {r.layers} | {r.backend} | {r.start} | {r.first:.1f} | {r.compilers:.2f} | "
            f"{r.operations or 'n/a'} | {rate} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "LAYERS", "BACKEND", "START"), help="one row, here")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--backends", nargs="+", default=["memplan", "inductor"])
    parser.add_argument("--repeats", type=int, default=3, help="warm processes a backend")
    given = parser.parse_args()
    if given.one:
        model, layers, backend, start = given.one
        print(json.dumps(asdict(measure(model, int(layers), backend, start))))
        return
    rows: list[Row] = []
    for model in given.models:
        for layers in given.layers:
            with tempfile.TemporaryDirectory() as folder:
                caches = {b: f"{folder}/{b}" for b in given.backends}
                cold = {b: run(model, layers, b, "cold", caches[b]) for b in caches}
                warm: dict[str, list[Row]] = {b: [] for b in caches}
                for _ in range(given.repeats):
                    for b in caches:
                        warm[b].append(run(model, layers, b, "warm", caches[b]))
                for b in caches:
                    rows += [cold[b], min(warm[b], key=lambda r: r.first)]
                    print(rows[-2], [round(r.first, 2) for r in warm[b]], flush=True)
                RESULTS.write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
