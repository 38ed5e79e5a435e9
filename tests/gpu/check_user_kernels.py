"""Every user kernel of torch's samples and of ours, compiled, against the same function uncompiled, on a GPU.

    python3 tests/gpu/check_user_kernels.py [name ...]

Needs one NVIDIA GPU; about a minute. Prints a line for each, and how many are right. Each is called three times (the
first call may time configurations), in poison mode; what it changes of its arguments is compared as well, and the live
peak of the last call with that of the uncompiled one.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
import memplan  # noqa: E402

if not any(Path(p) == ROOT for p in memplan.__path__):
    memplan.__path__.append(str(ROOT))  # memplan.codegen, where the package is not installed

from memplan.fallback import FallbackWarning  # noqa: E402
from tests.user_kernels.cases import CASES, Case  # noqa: E402


def clones(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def measured(function: object, arguments: tuple[object, ...]) -> tuple[object, int]:
    """The result, and the peak of live bytes above the start."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*arguments)  # type: ignore[operator]
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def difference(found: object, wanted: object) -> str:
    mine, theirs = (r if isinstance(r, tuple) else (r,) for r in (found, wanted))
    for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if isinstance(b, torch.Tensor) and not torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"result {k} differs by {(a.double() - b.double()).abs().max().item():.3g}"
    return ""


def check(case: Case) -> str:
    """Empty, or what is wrong."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    arguments = case.make("cuda")
    compiled = torch.compile(
        case.function, backend="memplan", options={"poison": True}, dynamic=case.dynamic, fullgraph=True
    )
    for call in range(3):
        mine, theirs = clones(arguments), clones(arguments)
        # Triton's own tuning may leave behind what it has changed; it tunes at the first call
        wanted, eager_peak = measured(case.function, theirs)
        found, peak = measured(compiled, mine)
        wrong = difference(found, wanted) or difference(mine, theirs)
        if wrong:
            return f"call {call}: {wrong}"
    return f"live peak {peak} bytes, uncompiled {eager_peak}" if peak > eager_peak else ""


def main() -> int:
    chosen = [c for c in CASES if len(sys.argv) == 1 or any(n in c.name for n in sys.argv[1:])]
    failed = 0
    start = time.perf_counter()
    warnings.simplefilter("error", FallbackWarning)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for case in chosen:
        before = time.perf_counter()
        try:
            wrong = check(case)
        except Exception as error:
            traceback.print_exc(limit=-4)
            lines = str(error).strip().splitlines()
            wrong = f"{type(error).__name__}: {lines[0] if lines else ''}"
        failed += bool(wrong)
        print(f"{case.name:<52} {time.perf_counter() - before:5.1f} s  {wrong or 'ok'}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} right, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
