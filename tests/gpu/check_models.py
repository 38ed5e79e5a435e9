"""Many models that nothing else here names, whole, against eager. ``python -m tests.gpu.check_models``.

Every model trains one step in float64, in poison mode, and its loss, gradients and buffers are compared with eager's;
then it is compiled anew without poison, compared again, and its live peak is set beside eager's. What eager itself
owes to float32 inside (norms, rotary tables, softmax of transformers are computed so whatever the model's dtype is) is
found by running eager with every such cast widened: two right answers may lie that far apart, and a few times more.

``--device cpu`` runs it without a GPU, ``--only REGEX`` some of it, ``--jobs N`` so many processes, ``--write FILE``
keeps the table. timm's models are left out where timm is not installed, and that is said.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.measure import cpu_memory
from tests.gpu.model_zoo import MODELS, TIMM
from tests.models.against_eager import clone_inputs, total

#: Relative to the largest value of a tensor: what sums in another order may differ by in float64.
ROUNDING = 1e-10
#: Relative to the largest value of all: what is zero but for rounding (the gradient of a bias before a batch norm).
NOISE = 1e-13
#: Times eager's own distance from the same with nothing in float32.
FACTOR = 4.0
#: Bytes that a tiny model may need above eager's.
SLACK = 4096


def _hardswish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


#: ATen's kernels for a GPU have a sixth in float32 whatever the dtype.
_EXACT = {
    functional.hardswish: _hardswish,
    torch._C._nn.hardswish: _hardswish,
    torch._C._nn.hardswish_: _hardswish,
    functional.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid,
}


class Widened(TorchFunctionMode):
    """Nothing is computed in float32."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: dict | None = None
    ) -> object:
        wide = {torch.float32: torch.float64}
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        func = Tensor.double if func is Tensor.float else _EXACT.get(func, func)
        return func(*args, **kwargs)


def answers(module: nn.Module, call: Callable[..., object], inputs: Sequence[object]) -> dict[str, Tensor]:
    """The loss, all gradients and all buffers after one step."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    given = clone_inputs(inputs)
    loss = total(call(*given))
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
    leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    return found | {f"gradient of input {k}": t.grad for k, t in enumerate(leaves) if t.grad is not None}


def differences(ours: dict[str, Tensor], eager: dict[str, Tensor], wide: dict[str, Tensor]) -> Iterator[str]:
    if ours.keys() != eager.keys():
        yield f"other results than eager's: {sorted(ours.keys() ^ eager.keys())}"
    largest = max(float(t.abs().max()) for t in eager.values() if t.is_floating_point() and t.numel())
    for name in ours.keys() & eager.keys():
        a, b, c = ours[name], eager[name], wide[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{name}: {a.dtype} {tuple(a.shape)} where eager has {b.dtype} {tuple(b.shape)}"
        elif not b.is_floating_point():
            if not torch.equal(a, b):
                yield f"{name}: other integers"
        elif b.numel():
            scale = float(b.abs().max())
            allowed = ROUNDING * scale + NOISE * largest + FACTOR * float((b - c).abs().max())
            worst = float((a - b).abs().max())
            if not worst <= allowed:  # NaN as well
                yield f"{name}: off by {worst:.2e} of {scale:.2e}, {allowed:.2e} allowed"


def peak_of(module: nn.Module, call: Callable[..., object], inputs: Sequence[object], device: str) -> int:
    """Live bytes of a warm step above those before it."""

    def step() -> None:
        total(call(*inputs)).backward()
        module.zero_grad(set_to_none=True)
        for t in inputs:
            if isinstance(t, Tensor):
                t.grad = None

    module.zero_grad(set_to_none=True)
    step()
    if device == "cpu":
        return int(cpu_memory(step)["peak"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def check_one(name: str, device: str) -> str:
    """One line of the table."""
    build = {**MODELS, **TIMM}[name]
    torch.manual_seed(0)
    module, inputs = build()
    module = module.to(device, torch.float64).train()
    inputs = [_moved(value, device) for value in inputs]
    wide_module = copy.deepcopy(module)
    with Widened():
        wide = answers(wide_module, wide_module, inputs)
    del wide_module
    eager_module = copy.deepcopy(module)
    eager = answers(eager_module, eager_module, inputs)
    peaks = [peak_of(eager_module, eager_module, inputs, device)]
    seconds = time.perf_counter()
    wrong = []
    for options in ({"poison": True, "random": "eager"}, {"random": "eager"}):
        torch._dynamo.reset()
        ours = copy.deepcopy(module)
        compiled = torch.compile(ours, backend="memplan", options=options)
        wrong += differences(answers(ours, compiled, inputs), eager, wide)
        if not options.get("poison"):
            peaks.append(peak_of(ours, compiled, inputs, device))
    seconds = time.perf_counter() - seconds
    if wrong:
        return f"WRONG {name}: {len(wrong)} tensors; {wrong[0]}"
    over = "  OVER" if peaks[1] > peaks[0] + SLACK else ""
    megabytes = f"{peaks[0] / 1e6:9.3f} {peaks[1] / 1e6:9.3f} {peaks[1] / peaks[0]:6.3f}"
    return f"ok    {name:38s} {megabytes} {seconds:6.1f} s{over}"


def _moved(value: object, device: str) -> object:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value.double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def child(name: str, device: str) -> str:
    """The line of one model, from a process of its own."""
    command = [sys.executable, "-m", "tests.gpu.check_models", "--one", name, "--device", device]
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=420, env=environment)
    except subprocess.TimeoutExpired:
        return f"FAIL  {name}: no answer within 420 s"
    last = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "WRONG "))]
    if done.returncode == 0 and last:
        return last[-1]
    text = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in text if re.match(r"[\w.]*(Error|Failed|Exception)\b", line)] or text or ["nothing said"]
    return f"FAIL  {name}: exit {done.returncode}: {said[-1][:300]}"


TEXT = """# Models that the benchmarks do not name

`python -m tests.gpu.check_models --write FILE` on {where}, torch {torch}: one training step in float64 against eager,
in poison mode and without, with eager's random numbers. {good} of {all} agree{missing}. Columns: live peak above what
was there before the step in MB, eager's and memplan's, their ratio, seconds of both compilations. OVER: over eager's.

```
{lines}
```
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no model after so many")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        print(check_one(given.one, given.device), flush=True)
        return 0
    has_timm = importlib.util.find_spec("timm") is not None
    names = [n for n in (*(TIMM if has_timm else ()), *MODELS) if re.search(given.only, n)]  # the longest first
    begin = time.perf_counter()

    def run(name: str) -> str:
        late = time.perf_counter() - begin > given.seconds
        line = f"LATE  {name}: not started" if late else child(name, given.device)
        print(line, flush=True)
        return line

    with ThreadPoolExecutor(given.jobs) as pool:
        lines = list(pool.map(run, names))
    good = sum(line.startswith("ok ") for line in lines)
    missing = "" if has_timm else "; timm is not installed, its models are left out"
    print(f"{good} of {len(names)} agree{missing}; {sum('OVER' in line for line in lines)} need more than eager")
    if given.write:
        where = torch.cuda.get_device_name() if given.device == "cuda" else "a CPU"
        text = TEXT.format(
            where=where, torch=torch.__version__, good=good, all=len(names), missing=missing, lines="\n".join(lines)
        )
        given.write.write_text(text)
    return 0 if good == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
