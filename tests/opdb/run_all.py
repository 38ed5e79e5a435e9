"""Every sample of every operator that eager can run, contiguous and not, forward and gradient: hours on a laptop.

    python -m tests.opdb.run_all [--names add,mul] [--processes 2] [--limit 40]

Writes ``benchmarks/results/opdb.md``. Each operator has a process's attention for at most ``--seconds``; one that
crashes or hangs costs its own row only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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


def run_batch(batch: list[str], limit: int | None, seconds: float) -> list[dict[str, object]]:
    """One process for several operators; what it did not get to is tried again alone, or told."""
    command = [sys.executable, "-m", "tests.opdb.run_all", "--worker", ",".join(batch)]
    command += ["--limit", str(limit)] if limit else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds * len(batch))
        text, end = done.stdout, f"the process ended with code {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        end = f"took more than {seconds:.0f} s"
    rows: list[dict[str, object]] = [json.loads(line[2:]) for line in text.splitlines() if line.startswith("@@")]
    missing = [n for n in batch if n not in {r["name"] for r in rows}]
    if missing and len(batch) == 1:
        rows.append({"name": missing[0], "samples": 0, "error": end, "way": "graph", "seconds": seconds})
    elif missing:
        for name in missing:
            rows += run_batch([name], limit, seconds)
    for row in rows[-len(batch) :]:
        print(f"{row['name']}: {row['samples']} samples {row['error']}", flush=True)
    return rows


def report(rows: list[dict[str, object]], left_out: dict[str, str]) -> str:
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
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker.split(","), given.limit)
        return
    everything = given.names.split(",") if given.names else names()
    left_out = {n: reason for n in everything if (reason := skipped(n)) is not None}
    chosen = [n for n in everything if n not in left_out]
    batches = [chosen[k : k + OPERATORS] for k in range(0, len(chosen), OPERATORS)]
    with ThreadPoolExecutor(given.processes) as pool:
        rows = [r for found in pool.map(lambda b: run_batch(b, given.limit, given.seconds), batches) for r in found]
    rows.sort(key=lambda r: str(r["name"]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(report(rows, left_out))
    print(f"{len(rows)} operators, {sum(bool(r['error']) for r in rows)} disagree or fail; {given.out}")


if __name__ == "__main__":
    main()
