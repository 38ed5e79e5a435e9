"""Budgets in bytes against Inductor's activation budget: peaks measured and predicted, and time.

    python -m benchmarks.budget [--device cpu|cuda] [--models gpt2,resnet50] [--count 20] [--time-limit 240]

For each model memplan is given ``--count`` budgets, at equal ratios from the least that a plan of the step needs to
what the fastest one needs, and Inductor each of its ``--shares``. Several processes for each model compile at once and
take turns at the device (`benchmarks.budget_worker`); each result is written when it is known. Times are measured while
others compile: the step's kernels have the device to themselves, its launches share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .budget_table import Row, table
from .models import cases
from .run import ROOT, describe
from .worker import MARK

MODELS = {"cpu": "gpt2,resnet", "cuda": "gpt2,resnet50"}
SHARES = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1"
#: The largest budget over what the fastest plan needs: bytes planned without the device differ a little.
ABOVE = 1.04


@dataclass
class Sweep:
    """One model: the jobs that are left, and what came out. ``bounds`` comes first: budgets hang on it."""

    model: str
    given: argparse.Namespace
    scratch: Path
    deadline: float
    changed: threading.Condition
    rows: list[Row] = field(default_factory=list)
    #: by when they are to be done, the number of a job
    jobs: queue.PriorityQueue[tuple[float, int]] = field(default_factory=queue.PriorityQueue)
    known: list[dict[str, object]] = field(default_factory=list)
    left: int = 0

    def fill(self) -> None:
        peers = [p for p in self.given.peers.split(",") if p]
        for place, system in enumerate(("bounds", "memplan", *peers)):
            self.add(place - 10, system)
        if "inductor" in peers:
            shares = [float(s) for s in self.given.shares.split(",") if s]
            for k, share in enumerate(shares):
                self.add(k / len(shares), "inductor", share)

    def add(self, place: float, system: str, budget: float | None = None) -> None:
        with self.changed:
            self.left += 1
            self.known.append({"system": system, "budget": budget})
            self.jobs.put((place, len(self.known) - 1))

    def work(self, number: int) -> None:
        """Start one process and hand it jobs until there are none."""
        log = self.scratch / f"{self.model}-{number}.txt"
        command = [sys.executable, "-m", "benchmarks.budget_worker", "--device", self.given.device]
        command += ["--model", self.model, "--lock", str(self.scratch / "turn")]
        command += ["--repeats", str(self.given.repeats), "--seconds", str(self.given.seconds)]
        command += ["--threads", str(self.given.threads)] if self.given.threads else []
        environment = dict(os.environ) | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "HF_HUB_OFFLINE": "1"}
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MEMPLAN_CACHE_DIR"):
            environment[name] = str(self.scratch / name.split("_")[0].lower())
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log.open("w"),
        )  # fmt: skip
        cut = threading.Timer(max(0.0, self.deadline - time.monotonic()), process.kill)
        cut.start()
        try:
            self.serve(process, log)
        finally:
            cut.cancel()
            process.kill()
            process.wait()

    def serve(self, process: subprocess.Popen[str], log: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while self.left and time.monotonic() < self.deadline:
            try:
                job = self.known[self.jobs.get(timeout=0.5)[1]]
            except queue.Empty:
                continue
            begin = time.monotonic()
            said: dict[str, object] = {"error": "cut by the time limit"}
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                line = next((text for text in process.stdout if text.startswith(MARK)), None)
            except BrokenPipeError:
                line = None
            if line is not None:
                said = json.loads(line.removeprefix(MARK))
            elif time.monotonic() < self.deadline:
                said = {"error": f"the process ended: {log.read_text(errors='replace').strip()[-400:]}"}
            self.note(job, said, time.monotonic() - begin)
            if line is None:
                return

    def note(self, job: dict[str, object], said: dict[str, object], seconds: float) -> None:
        if job["system"] == "bounds" and "error" not in said:
            for k, budget in enumerate(budgets(int(str(said["least"])), int(str(said["most"])), self.given.count)):
                self.add(k / self.given.count, "memplan", budget)
        with self.changed:
            row = Row(self.model, job, said)
            self.rows.append(row)
            self.left -= 1
            print(f"{time.strftime('%H:%M:%S')} {self.model} {row} ({seconds:.0f} s)", flush=True)
            self.changed.notify_all()


def budgets(least: int, most: int, count: int) -> list[int]:
    """At equal ratios, the first of them the least bytes that can be had, the last above the most."""
    ratio = (ABOVE * most / least) ** (1 / max(1, count - 1))
    found = [int(least * ratio**k) for k in range(count)]
    return [least, *found[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", default="")
    parser.add_argument("--count", type=int, default=20, help="budgets of memplan")
    parser.add_argument("--peers", default="inductor,eager", help="what else is measured")
    parser.add_argument("--shares", default=SHARES, help="activation budgets of Inductor")
    parser.add_argument("--processes", type=int, default=0, help="for each model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds after which what runs is cut")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps, at most")
    parser.add_argument("--seconds", type=float, default=1.0, help="no new timed step after so many")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    deadline = time.monotonic() + given.time_limit
    found = cases(given.device, (given.models or MODELS[given.device]).split(","))
    cores = len(os.sched_getaffinity(0))
    processes = given.processes or max(1, (cores - 2) // len(found) if given.device == "cuda" else 1)
    environment, _ = describe(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"budget-{given.device}.json"
    changed = threading.Condition()
    with tempfile.TemporaryDirectory(prefix="memplan-budget-", ignore_cleanup_errors=True) as scratch:
        sweeps = [Sweep(c.name, given, Path(scratch), deadline, changed) for c in found]
        threads = []
        for sweep in sweeps:
            sweep.fill()
            threads += [threading.Thread(target=sweep.work, args=(k,)) for k in range(processes)]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            with changed:
                changed.wait(timeout=1.0)
                rows = [row for sweep in sweeps for row in sweep.rows]
            write(path, environment, rows)
    print(table(rows, environment))
    sys.exit(any("error" in row.said for row in rows) or any(sweep.left for sweep in sweeps))


def write(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """The results so far, as data and as a table."""
    data = {"environment": environment, "rows": [{"model": r.model, "job": r.job, "said": r.said} for r in rows]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)
    path.with_suffix(".md").write_text(table(rows, environment))


if __name__ == "__main__":
    main()
