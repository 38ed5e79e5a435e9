"""Whole models with ``max_autotune`` on a GPU: templates and tuned kernels, right answers, memory while compiling.

    python3 tests/gpu/check_templates.py

Needs one NVIDIA GPU; about two minutes. For each model: which products became templates, which kernels another
configuration than the first, the largest difference from eager (as part of the mean) in poison mode and three calls in
a row, live peak of the first call while it compiles and times kernels, and of a first call that takes all that from the
cache (both with the libraries' own workspaces), and times beside those without ``max_autotune`` and eager's.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
import memplan  # noqa: E402

if not any(Path(p) == ROOT for p in memplan.__path__):
    memplan.__path__.append(str(ROOT))  # memplan.codegen, where the package is not installed

from memplan.ir.template import Template  # noqa: E402
from memplan.runtime.device_times import give_workspaces_back  # noqa: E402

HALF = torch.bfloat16


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, device="cuda", dtype=HALF) * 0.1


def mlp(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x + F.gelu(F.linear(x, w, b)) @ v


def skinny(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Products with few rows and long sums, one after another: they share the stream's workspace of zeros."""
    for _ in range(3):
        x = F.silu(x @ w) @ v + x
    return x


def scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.tanh(q @ k.transpose(1, 2) * 0.125) @ v


def training(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return mlp(x, w, b, v).float().square().mean()


def norms(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A feed-forward layer with hundreds of megabytes in flight, and a loss."""
    h = F.layer_norm(x, x.shape[-1:], g)
    return F.cross_entropy(mlp(h, w, b, v).float(), torch.arange(x.shape[0], device=x.device) % x.shape[1])


MODELS: list[tuple[str, Callable[..., torch.Tensor], Callable[[], tuple[torch.Tensor, ...]], bool]] = [
    ("mlp 640", mlp, lambda: (random(640, 640), random(640, 640), random(640), random(640, 640)), False),
    ("mlp of odd sizes", mlp, lambda: (random(333, 520), random(777, 520), random(777), random(777, 520)), False),
    ("skinny", skinny, lambda: (random(16, 3072), random(3072, 3072), random(3072, 3072)), False),
    ("scores", scores, lambda: (random(96, 512, 64), random(96, 512, 64), random(96, 512, 64)), False),
    ("training", training, lambda: (random(512, 640), random(640, 640), random(640), random(640, 640)), True),
    (
        "norms",
        norms,
        lambda: (random(16384, 1024), random(1024), random(4096, 1024), random(4096), random(4096, 1024)),
        True,
    ),
]


def peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    give_workspaces_back()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def microseconds(run: Callable[[], object], count: int = 30) -> float:
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count * 1e6


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / (wanted.float().abs().mean() + 1e-12))


@contextmanager
def tuned_kernels() -> Iterator[list[int]]:
    """The configurations of the kernels that are timed meanwhile, by number."""
    found: list[int] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = re.search(r": configuration (\d+) of ", record.getMessage())
            found.extend([int(text[1])] if text else [])

    log, handler = logging.getLogger("memplan.triton"), Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def check(
    name: str, model: Callable[..., torch.Tensor], make: Callable[[], tuple[torch.Tensor, ...]], backward: bool
) -> bool:
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = tuple(t.requires_grad_(backward) for t in make())

    def step(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        out = function(*inputs)
        if not backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, inputs)]

    def compiled(**more: object) -> Callable[..., torch.Tensor]:
        torch._dynamo.reset()
        return torch.compile(model, backend="memplan", options={"cache_dir": folder, "max_autotune": True, **more})

    with tempfile.TemporaryDirectory() as folder, tuned_kernels() as tuned:
        first = compiled()
        with memplan.record() as recording:
            compiling = peak(lambda: step(first))
        quick = compiled()
        running = peak(lambda: step(quick))
        wanted = step(model)
        times = [microseconds(lambda: step(quick)), microseconds(lambda: step(model))]
        plain = compiled(max_autotune=False)
        times.insert(1, microseconds(lambda: step(plain)))
        poisoned = compiled(poison=True)
        worst = max(difference(a, b) for _ in range(3) for a, b in zip(step(poisoned), wanted, strict=True))
    used = [op for g in recording.graphs for op in g.plan.program.operations if isinstance(op, Template)]
    kinds = ", ".join(f"{op.product.config.method.value}" for op in used if op.product is not None)
    wrong = not worst < (0.2 if not backward else 0.5)
    over = compiling > running + (64 << 20)
    print(
        f"{name:<18} {len(used)} templates ({kinds or 'none'}); differs by {worst:.3g} of the mean"
        f"{' WRONG' if wrong else ''}; peak compiling {compiling >> 10} KiB, running {running >> 10} KiB"
        f"{' TOO MUCH' if over else ''}; {times[0]:.0f} us, by default {times[1]:.0f}, eager {times[2]:.0f}; "
        f"{sum(k > 0 for k in tuned)} of {len(tuned)} kernels not in their first configuration",
        flush=True,
    )
    return not wrong and not over


def main() -> int:
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    good = 0
    for name, model, make, backward in MODELS:
        try:
            good += check(name, model, make, backward)
        except Exception:
            traceback.print_exc(limit=-6)
            print(f"{name:<18} FAILED", flush=True)
    print(f"{good} of {len(MODELS)} good")
    return 0 if good == len(MODELS) else 1


if __name__ == "__main__":
    sys.exit(main())
