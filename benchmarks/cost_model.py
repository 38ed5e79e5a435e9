"""The cost model against a profile.

    python -m benchmarks.cost_model [--device cpu|cuda] [--models gpt2,llama] [--calibrate]

Each model is compiled with memplan; the estimated microseconds of its plans' operations are added up by what they are
(products, convolutions, attention, kernels of ours, the rest) and set beside the time that the profiler saw (on a CPU
our kernels are what is left of the step's own time). The error of the whole is what the choice of what to recompute
rests on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable

import torch

from .kernels import kernel_times
from .models import Case, cases
from .worker import _step

KINDS = ("products", "convolutions", "attention", "kernels", "rest")
_OF_CATEGORY = {"triton": "kernels", "gemm": "products", "conv": "convolutions", "attention": "attention"}


def kind_of_target(target: str) -> str:
    """The kind of a call by its operator's name."""
    name = target.split(".")[1] if target.count(".") >= 1 else target
    if "convolution" in name:
        return "convolutions"
    if "attention" in name:
        return "attention"
    return "products" if name in ("mm", "addmm", "bmm", "baddbmm") else "rest"


def estimated(graphs: list[object], device: str) -> dict[str, float]:
    """Milliseconds by kind."""
    from memplan.calibration import figures_for
    from memplan.ir.config import Config
    from memplan.ir.program import Extern
    from memplan.passes.costs import step_microseconds
    from memplan.recording import CompiledGraph

    figures = figures_for(device, Config())
    out: defaultdict[str, float] = defaultdict(float)
    for graph in graphs:
        assert isinstance(graph, CompiledGraph)
        program = graph.plan.program
        times = step_microseconds(program, figures)
        for op in program.operations:
            kind = kind_of_target(op.target) if isinstance(op, Extern) else "kernels"
            out[kind] += times[op.name] / 1e3
    return dict(out)


def profiled(step: Callable[[], object], device: str) -> tuple[dict[str, float], float]:
    """Milliseconds by kind, and of the whole step."""
    rows = kernel_times(step, device)["kernels"]
    out: defaultdict[str, float] = defaultdict(float)
    for name, ms, _ in rows:  # type: ignore[attr-defined]
        if device == "cuda":
            from .kernels import category

            out[_OF_CATEGORY.get(category(name), "rest")] += ms
        elif name.startswith("aten::"):
            kind = kind_of_target(name.replace("::", "."))
            out[kind] += ms
    if device == "cuda":
        return dict(out), sum(out.values())
    whole = _wall(step)
    out["kernels"] = max(0.0, whole - sum(out.values()))
    return dict(out), whole


def _wall(step: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def row(case: Case) -> tuple[dict[str, float], dict[str, float], float]:
    """Estimated and profiled milliseconds by kind, and the measured whole."""
    from memplan.recording import record

    torch._dynamo.reset()
    module, batch = case.make()
    compiled = torch.compile(module, backend="memplan")
    step = _step(compiled, module, batch, case)
    with record() as recorded:
        step()
    guess = estimated(list(recorded.graphs), "cuda:0" if case.device == "cuda" else "cpu")
    seen, whole = profiled(step, case.device)
    return guess, seen, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", default="", help="names separated by commas; all training models without")
    parser.add_argument("--calibrate", action="store_true", help="measure the device's figures first, and store them")
    given = parser.parse_args()
    if given.calibrate:
        from memplan.calibration import calibrate
        from memplan.ir.config import Config

        print(calibrate("cuda:0" if given.device == "cuda" else "cpu", Config()))
    print("estimated / measured ms by kind")
    print(f"| model | {' | '.join(KINDS)} | whole | error |\n|---|{'---|' * len(KINDS)}---|---|")
    ratios = []
    for case in cases(given.device, [m for m in given.models.split(",") if m]):
        if not case.training:
            continue
        try:
            guess, seen, whole = row(case)
        except Exception:
            traceback.print_exc()
            continue
        total = sum(guess.values())
        ratios.append(total / whole)
        cells = [f"{guess.get(k, 0.0):.2f} / {seen.get(k, 0.0):.2f}" for k in KINDS]
        cells += [f"{total:.2f} / {whole:.2f}", f"{total / whole - 1:+.0%}"]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        spread = math.exp(statistics.fmean(abs(math.log(r / mean)) for r in ratios))
        print(f"\nestimated over measured: geometric mean {mean:.2f}, mean factor around it {spread:.2f}")


if __name__ == "__main__":
    main()
