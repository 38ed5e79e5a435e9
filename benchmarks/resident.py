"""What a process on a CPU keeps resident, by what it did: eager, tracing alone, Inductor, memplan.

    python -m benchmarks.resident resnet-inference vit-inference

Each model and system runs in a process of its own. After two steps freed pages go back (``malloc_trim``); then the
resident set is read, one step runs, and its peak is read: pages of the heap and other anonymous memory, and pages of
files (libraries). ``traced`` is ``torch.compile`` with the backend ``aot_eager``, which traces and compiles nothing:
what it has more than eager is Dynamo, AOTAutograd and what they import. ``again`` has its caches filled by the row
before it, so that nothing is compiled.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .measure import status_bytes
from .models import CASES
from .worker import _step

#: name of a row -> backend (None: eager)
SYSTEMS = {
    "eager": None,
    "traced": "aot_eager",
    "inductor": "inductor",
    "inductor again": "inductor",
    "memplan": "memplan",
    "memplan again": "memplan",
}
PARTS = ("before", "before_heap", "before_files", "peak")


def one(name: str, system: str) -> dict[str, int]:
    """Bytes of this process around one step of a model."""
    torch.set_num_threads(1)
    case = CASES["cpu", name]
    module, batch = case.make()
    backend = SYSTEMS[system]
    compiled = module if backend is None else torch.compile(module, backend=backend)
    step = _step(compiled, module, batch, case)
    for _ in range(2):
        step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found = {
        "before": status_bytes("VmRSS"),
        "before_heap": status_bytes("RssAnon"),
        "before_files": status_bytes("RssFile"),
    }
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    step()
    return {**found, "peak": status_bytes("VmHWM")}


def table(results: dict[tuple[str, str], dict[str, int]]) -> str:
    lines = ["| model | | before the step, MB | of it heap | of it files | peak within the step | peak / eager |"]
    lines.append("|---" * 7 + "|")
    for (model, system), r in results.items():
        cells = [f"{r[p] / 1e6:.1f}" for p in PARTS]
        eager = results.get((model, "eager"))
        ratio = f"{r['peak'] / eager['peak']:.2f}" if eager else ""
        lines.append(f"| {model} | {system} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    parser.add_argument("models", nargs="+", choices=[n for d, n in CASES if d == "cpu"])
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--one", help="measure this system in this process")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.models[0], given.one)))
        return
    results: dict[tuple[str, str], dict[str, int]] = {}
    for model in given.models:
        with tempfile.TemporaryDirectory(prefix="memplan-resident-") as folder:
            environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            environment |= {f"{n}_CACHE_DIR": f"{folder}/{n.lower()}" for n in ("TORCHINDUCTOR", "TRITON", "MEMPLAN")}
            for system in given.systems.split(","):
                command = [sys.executable, "-m", "benchmarks.resident", model, "--one", system]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                results[model, system] = json.loads(done.stdout.splitlines()[-1])
                print(model, system, results[model, system], flush=True)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, one thread\n\n{table(results)}")


if __name__ == "__main__":
    main()
