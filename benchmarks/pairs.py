"""CPU time and bytes of a step beside Inductor's and eager's, on a machine that others use too.

    python -m benchmarks.pairs --out benchmarks/results/cpu-inductor.md

Each model runs in a process of its own, in which every system compiles it; then their steps take turns, and what is
compared is the CPU time of the process (one thread) in each turn: the ratio is the median over the turns, so that what
else the machine does falls on all of them alike. Bytes are live bytes above those before the step, from the events of
PyTorch's CPU allocator. Compiled code is taken from the compilers' caches where the environment names some
(``TORCHINDUCTOR_CACHE_DIR``, ``MEMPLAN_CACHE_DIR``); compile time is not measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from .measure import cpu_memory
from .models import CASES, cases
from .prediction import predicted_bytes
from .run import ROOT, describe
from .systems import System
from .worker import _answer, _step, compare, recording

SYSTEMS = ("memplan", "inductor", "eager")
Row = Mapping[str, object]


def one(name: str, turns: int) -> dict[str, dict[str, object]]:
    """All systems on one model, in this process."""
    torch.set_num_threads(1)
    case = CASES["cpu", name]
    steps: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, object]] = {}
    reference = None
    for text in reversed(SYSTEMS):  # eager first
        module, batch = case.make()
        torch._dynamo.reset()
        with recording(System.parse(text)) as graphs:
            compiled = System.parse(text).compile(module)
            answer = _answer(compiled, batch, case)
        found[text] = dict(predicted_bytes(graphs))
        if reference is None:
            reference = answer
        elif not case.random:
            found[text] |= compare(answer, reference)
        steps[text] = _step(compiled, module, batch, case)
    times: dict[str, list[float]] = {s: [] for s in SYSTEMS}
    for s in SYSTEMS:
        steps[s]()
        found[s] |= cpu_memory(steps[s])
    for _ in range(turns):
        for s in SYSTEMS:
            begin = time.process_time()
            steps[s]()
            times[s].append((time.process_time() - begin) * 1e3)
    for s in SYSTEMS:
        ratios = sorted(a / b for a, b in zip(times["memplan"], times[s], strict=True))
        found[s] |= {"cpu_ms": statistics.median(times[s]), "turns": turns, "ratio": statistics.median(ratios)}
        found[s] |= {"ratio_low": ratios[len(ratios) // 4], "ratio_high": ratios[-1 - len(ratios) // 4]}
    return found


def markdown(results: Mapping[str, Mapping[str, Row]], environment: Mapping[str, str]) -> str:
    """Time, bytes and agreement, a row for each model."""
    about = ", ".join(f"{k} {v}" for k, v in sorted(environment.items()))
    others = [s for s in SYSTEMS if s != "memplan"]
    time_rows, byte_rows, other_rows = [], [], []
    for model, r in results.items():
        shown = [f"{_number(r[s], 'cpu_ms'):.1f}" for s in SYSTEMS]
        ratios = [_ratio(r[s]) for s in others]
        time_rows.append([model, *shown, *ratios])
        peaks = {s: _number(r[s], "peak") for s in SYSTEMS}
        byte_rows.append([model, *(f"{p / 1e6:.3f}" for p in peaks.values())])
        byte_rows[-1] += [f"{peaks['memplan'] / peaks[s]:.2f}" for s in others]
        predicted = _number(r["memplan"], "predicted")
        byte_rows[-1] += [f"{predicted / 1e6:.3f}", f"{(predicted / peaks['memplan'] - 1) * 100:+.2f} %"]
        other_rows.append([model, *(_difference(r[s]) for s in SYSTEMS if s != "eager")])
    means = ["geometric mean", *[""] * len(SYSTEMS)]
    time_rows.append([*means, *(_mean([_number(r[s], "ratio") for r in results.values()]) for s in others)])
    over = [[_number(r["memplan"], "peak") / _number(r[s], "peak") for r in results.values()] for s in others]
    byte_rows.append([*means, *map(_mean, over), "", ""])
    pairs = [f"memplan / {s}" for s in others]
    parts = [
        about,
        "**CPU time of a step, ms (median), and the ratio turn by turn (median, and its middle half)**",
        _table(["model", *SYSTEMS, *pairs], time_rows),
        "**live peak above what was there before the step, MB**",
        _table(["model", *SYSTEMS, *pairs, "predicted", "off by"], byte_rows),
        "**difference from eager: result, gradients (norm of the difference / norm)**",
        _table(["model", *(s for s in SYSTEMS if s != "eager")], other_rows),
    ]
    return "\n\n".join(parts) + "\n"


def _number(row: Row, key: str) -> float:
    return float(cast(float, row[key]))


def _ratio(row: Row) -> str:
    return f"{_number(row, 'ratio'):.2f} ({_number(row, 'ratio_low'):.2f} to {_number(row, 'ratio_high'):.2f})"


def _difference(row: Row) -> str:
    if "result_difference" not in row:
        return "draws random numbers"
    keys = [k for k in ("result_difference", "gradient_difference") if k in row]
    return ", ".join(f"{_number(row, k):.1e}" for k in keys)


def _mean(values: Sequence[float]) -> str:
    return f"**{math.exp(sum(map(math.log, values)) / len(values)):.2f}**"


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    parser.add_argument("--models", default="", help="names separated by commas; all of the CPU's without")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--out", type=Path, help="file for the tables; what was measured goes beside it as JSON")
    parser.add_argument("--one", help="measure this model in this process")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.turns)))
        return
    environment, _ = describe("cpu")
    environment["threads"] = "1"
    results: dict[str, dict[str, Row]] = {}
    for case in cases("cpu", [m for m in given.models.split(",") if m]):
        command = [sys.executable, "-m", "benchmarks.pairs", "--one", case.name, "--turns", str(given.turns)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(f"{case.name}: ended with {done.returncode}", file=sys.stderr)
            continue
        results[case.name] = json.loads(done.stdout.splitlines()[-1])
        print(case.name, {s: r["ratio"] for s, r in results[case.name].items()}, flush=True)
        if given.out:
            given.out.write_text(markdown(results, environment))
            text = json.dumps({"environment": environment, "results": results}, indent=1)
            given.out.with_suffix(".json").write_text(text)
    print(markdown(results, environment))


if __name__ == "__main__":
    main()
