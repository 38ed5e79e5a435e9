"""Every sample of every operator that eager can run, contiguous and not, forward and gradient: hours on a laptop.

    python -m tests.opdb.run_all [--names add,mul] [--processes 2] [--limit 40] [--time-limit 3600]

Writes ``benchmarks/results/opdb.md``, and a row for each operator as it is done to ``--rows``: a run that was cut goes
on from there. Each operator has a process's attention for at most ``--seconds``; one that
crashes or hangs costs its own row only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.opdb.harness import Outcome, calls, check_one, names, quiet, skipped

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "opdb.md"
#: Samples in one graph, and operators in one process.
SAMPLES = 16
OPERATORS = 12


def check_all(name: str, limit: int | None) -> Outcome:
    """All samples of one operator, some at a time; the first error is kept."""
    found = calls(name, limit=limit)
    way = "graph"
    with quiet():
        for k in range(0, len(found), SAMPLES):
            outcome = check_one(found[k : k + SAMPLES])
            if outcome.error:
                return Outcome(name, len(found), outcome.error, outcome.way)
            way = outcome.way if outcome.way != "graph" else way
    return Outcome(name, len(found), way=way)


def worker(batch: list[str], limit: int | None) -> None:
    for name in batch:
        begin = time.perf_counter()
        o = check_all(name, limit)
        row = {"name": o.name, "samples": o.samples, "error": o.error, "way": o.way}
        print("@@" + json.dumps({**row, "seconds": time.perf_counter() - begin}), flush=True)


@dataclass(frozen=True)
class Run:
    """What all processes of a run share: samples of an operator, seconds for one, when to stop, where rows go."""

    limit: int | None
    seconds: float
    deadline: float
    rows: Path
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, rows: list[dict[str, object]]) -> None:
        with self.lock, self.rows.open("a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def run_batch(batch: list[str], run: Run) -> None:
    """One process for several operators; what it did not get to is tried again alone, or told."""
    left = run.deadline - time.monotonic()
    if left < 1:
        return
    limit, seconds = run.limit, run.seconds
    command = [sys.executable, "-m", "tests.opdb.run_all", "--worker", ",".join(batch)]
    command += ["--limit", str(limit)] if limit else []
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=errors)
        late = threading.Timer(min(left, seconds * len(batch)), process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:  # each row is kept as it comes: a run that is cut loses one operator
            if line.startswith("@@"):
                rows.append(json.loads(line[2:]))
                run.keep(rows[-1:])
                print(f"{rows[-1]['name']}: {rows[-1]['samples']} samples {rows[-1]['error']}", flush=True)
        code = process.wait()
        cut_off = not late.is_alive()
        late.cancel()
        errors.seek(0)
        said = errors.read().strip()[-300:]
    end = f"took more than {seconds:.0f} s" if cut_off else f"the process ended with code {code}: {said}"
    missing = [n for n in batch if n not in {r["name"] for r in rows}]
    if missing and len(batch) == 1 and time.monotonic() < run.deadline:
        run.keep([{"name": missing[0], "samples": 0, "error": end, "way": "graph", "seconds": seconds}])
        print(f"{missing[0]}: {end}", flush=True)
    if len(batch) > 1:
        for name in missing:
            run_batch([name], run)


def read(path: Path) -> list[dict[str, object]]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[dict[str, object]], left_out: dict[str, str], missing: int = 0) -> str:
    wrong = [r for r in rows if r["error"]]
    samples = sum(int(str(r["samples"])) for r in rows)
    dynamo = sorted(str(r["name"]) for r in rows if r["way"] == "dynamo" and not r["error"])
    lines = [
        "# torch's own operator samples\n",
        f"torch {torch.__version__}, CPU. {len(rows)} operators with {samples} samples (those that eager can run, each "
        "also not contiguous where it can be), forward and gradient, against eager.\n",
        f"- agree: {len(rows) - len(wrong)}",
        f"- of them in graphs that Dynamo breaks at data-dependent sizes: {len(dynamo)}",
        f"- disagree or fail: {len(wrong)}",
        f"- not run yet: {missing}",
        f"- left out: {len(left_out)} ({100 * len(left_out) / (len(rows) + len(left_out)):.1f} %)\n",
    ]
    if wrong:
        lines += ["## Disagree or fail\n", "| operator | samples | what |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['samples']} | {_cell(str(r['error']))} |" for r in wrong]
        lines.append("")
    lines += ["## Left out\n", "| operator | reason |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in left_out.items()]
    lines += ["\n## Samples by operator\n", ", ".join(f"{r['name']} {r['samples']}" for r in rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:300]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.opdb.run_all")
    parser.add_argument("--names", default="")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="samples of an operator, at most")
    parser.add_argument("--seconds", type=float, default=600.0, help="for one operator, at most")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=Path, default=None, help="rows so far; beside --out without")
    parser.add_argument("--time-limit", type=float, default=1e6, help="seconds after which nothing more is started")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker.split(","), given.limit)
        return
    everything = given.names.split(",") if given.names else names()
    left_out = {n: reason for n in everything if (reason := skipped(n)) is not None}
    kept = given.rows or given.out.with_suffix(".jsonl")
    done = {str(r["name"]) for r in read(kept)}
    chosen = [n for n in everything if n not in left_out and n not in done]
    batches = [chosen[k : k + OPERATORS] for k in range(0, len(chosen), OPERATORS)]
    run = Run(given.limit, given.seconds, time.monotonic() + given.time_limit, kept)
    with ThreadPoolExecutor(given.processes) as pool:
        for _ in pool.map(lambda b: run_batch(b, run), batches):
            pass
    rows = sorted(read(kept), key=lambda r: str(r["name"]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(report(rows, left_out, len(set(everything) - set(left_out)) - len(rows)))
    print(f"{len(rows)} operators, {sum(bool(r['error']) for r in rows)} disagree or fail; {given.out}")


if __name__ == "__main__":
    main()
