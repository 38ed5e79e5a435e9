"""Budgets in bytes against Inductor's activation budget: time, measured and predicted peak.

    python -m benchmarks.budget [--device cpu|cuda] [--models gpt2,resnet] [--budgets 1.5,0.8,0.6] [--time-limit 240]

A budget of memplan is given here as a part of the peak that it predicts with default options; memplan itself is given
the bytes. Jobs compile in processes of their own, several at once, and are measured one at a time (`benchmarks.run`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .models import cases
from .run import ROOT, Bench, Job, describe

MODELS = {"cpu": "gpt2,llama,resnet", "cuda": "gpt2,llama-0.9b,vit-l16,resnet50"}
BUDGETS = {"cpu": "1.5,0.85,0.65", "cuda": "1.3,0.8,0.65"}
PEERS = {
    "cpu": ("eager", "inductor", "inductor-budget=0.5"),
    "cuda": ("eager", "inductor", "inductor-budget=0.5"),
}
HEAD = (
    "| system | budget MB | predicted MB | live MB | reserved MB | held / budget | predicted off | ms | / Inductor "
    "| / memplan | compile s |"
)
Result = Mapping[str, object]


def table(results: Mapping[str, Result], environment: Mapping[str, str]) -> str:
    """Markdown, one section a model."""
    lines = [", ".join(f"{k} {v}" for k, v in sorted(environment.items()))]
    for model in dict.fromkeys(str(r["model"]) for r in results.values()):
        rows = {str(r["system"]): r for r in results.values() if r["model"] == model}
        base = rows.get("inductor", {}).get("ms")
        own = rows.get("memplan", {}).get("ms")
        lines += [
            "", f"## {model}", "",
            HEAD, "|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_row(system, r, base, own) for system, r in rows.items()]
    return "\n".join(lines) + "\n"


def _row(system: str, r: Result, base: object, own: object) -> str:
    if "ms" not in r:
        why = str(r.get("error", "not reached")).strip().splitlines() or ["not reached"]
        return f"| {system} | {_mb(r.get('budget'))} | {why[0][:160]} |" + " |" * 8
    peak, budget, predicted = r["peak"], r.get("budget"), r.get("predicted")
    assert isinstance(peak, (int, float))
    reserved = _reserved(r)
    held = peak if reserved is None else max(peak, reserved)
    cells = [system, _mb(budget), _mb(predicted), _mb(peak), _mb(reserved), _ratio(held, budget)]
    cells.append(f"{100 * (predicted / peak - 1):+.1f} %" if isinstance(predicted, int) and peak else "")
    ms = r["ms"]
    assert isinstance(ms, float)
    cells += [f"{ms:.1f}", _ratio(ms, base), _ratio(ms, own), f"{float(str(r['compile_s'])):.0f}"]
    return "| " + " | ".join(cells) + " |"


def _reserved(r: Result) -> int | None:
    """Bytes that the caching allocator holds beyond what was alive before the step; None on a CPU."""
    reserved, total, peak = r.get("reserved"), r.get("peak_total"), r.get("peak")
    if isinstance(reserved, int) and isinstance(total, int) and isinstance(peak, int):
        return reserved - (total - peak)
    return None


def _mb(value: object) -> str:
    return f"{value / 1e6:.1f}" if isinstance(value, (int, float)) else ""


def _ratio(value: float, base: object) -> str:
    return f"{value / base:.3f}" if isinstance(base, (int, float)) and base else ""


class _Bench(Bench):
    """Writes the table of budgets instead of the main one, and every row as soon as it is measured."""

    def measure(self, job: Job) -> None:
        super().measure(job)
        if job.said:
            row = {"model": job.model, "system": job.system, **job.said}
            print(f"{job.model} {_row(job.system, row, None, None)}", flush=True)

    def write(self) -> None:
        super().write()
        results = {j.key: {"model": j.model, "system": j.system, **j.said} for j in self.jobs if j.said}
        (self.out / f"{self.given.device}-budget.md").write_text(table(results, self.environment))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", default="")
    parser.add_argument("--budgets", default="", help="parts of the default's predicted peak")
    parser.add_argument("--systems", default="", help="instead of the peers: separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--time-limit", type=float, default=3600.0)
    parser.add_argument("--parallel", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    given.label, given.profile, given.optimizer, given.scratch = "budget", False, False, None
    given.parallel = given.parallel or (4 if given.device == "cuda" else max(1, (os.cpu_count() or 1) // 2))
    given.batch = given.parallel  # measured as soon as so many are compiled: a budget takes several plans
    budgets = [b for b in (given.budgets or BUDGETS[given.device]).split(",") if b]
    peers = tuple(given.systems.split(",")) if given.systems else PEERS[given.device]
    systems = ["memplan", *(f"memplan-budget={b}" for b in budgets), *peers]
    found = cases(given.device, (given.models or MODELS[given.device]).split(","))
    given.out.mkdir(parents=True, exist_ok=True)
    environment, free = describe(given.device)
    jobs = [Job(c.name, s, c.gigabytes) for c in found for s in systems]  # whole tables first
    print(HEAD, flush=True)
    bench = _Bench(given, jobs, free, given.out, time.monotonic() + given.time_limit, environment)
    bench.run()
    results = {j.key: {"model": j.model, "system": j.system, **j.said} for j in jobs if j.said}
    print(table(results, environment))
    sys.exit(any("error" in r for r in results.values()))


if __name__ == "__main__":
    main()
