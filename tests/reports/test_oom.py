"""Running out of memory for real, in a process of its own with a limit on its addresses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memplan.out_of_memory import explained, is_out_of_memory, requested, running_step

SCRIPT = """
import resource
import torch
from memplan import recording

def model(x, w):
    h = (x @ w).relu()
    outer = h[:, :, None] * h[:, None, :]   # 312 MiB
    return (torch.cumsum(outer, 0) if GRAD else outer).sum()

def limit(graph):
    if graph.plan.program.phase.value == PHASE:  # all is compiled: 200 MiB more and no further
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)

torch.set_num_threads(1)
told = recording.tell
recording.tell = lambda graph: (told(graph), limit(graph))
compiled = torch.compile(model, backend="memplan", options=OPTIONS)
try:
    with recording.record():
        compiled(torch.randn(20_000, 64), torch.randn(64, 64, requires_grad=GRAD)).backward()
except RuntimeError as error:
    print(type(error).__name__, error)
"""


def run_out(phase: str, options: dict[str, object], tmp_path: Path) -> str:
    head = f"PHASE, OPTIONS, GRAD = {phase!r}, {options!r}, {phase != 'inference'}\n"
    script = tmp_path / "train.py"
    script.write_text(head + SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_error_shows_step_line_and_advice(tmp_path: Path) -> None:
    out = run_out("backward", {}, tmp_path)
    assert out.startswith("RuntimeError"), out
    assert "DefaultCPUAllocator: can't allocate memory" in out, "torch's own words come first"
    assert "memplan: memory ran out at step" in out
    assert "asking for" in out
    assert "train.py:9    outer = h[:, :, None] * h[:, None, :]" in out
    assert "What would help most" in out or "The largest buffer is" in out
    assert out.count("memplan: memory ran out") == 1


def test_a_switched_off_pass_is_named_if_it_would_have_helped(tmp_path: Path) -> None:
    out = run_out("inference", {"disable": ["fusion"]}, tmp_path)
    assert "What would help most: leaving 'fusion' out of disable needs" in out, out


def test_what_counts_as_running_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert requested("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has") == 5 << 29
    assert requested("you tried to allocate 655360000 bytes. Error code 12") == 655_360_000
    assert requested("HIP error") == 0


def test_the_step_is_found_by_the_line_in_the_wrapper() -> None:
    code = compile("def call(n):\n    x = 1\n\n    y = 1 / n\n\n    z = x / (n - 1)\n", "<memplan g>", "exec")
    names: dict[str, object] = {}
    exec(code, names)
    starts = (2, 4, 6)
    for n, step in ((0, 1), (1, 2)):
        with pytest.raises(ZeroDivisionError) as caught:
            names["call"](n)  # type: ignore[operator]
        assert running_step(caught.tb, "<memplan g>", starts) == step
        assert running_step(caught.tb, "<memplan other>", starts) is None


def test_an_error_of_a_gpu_whose_type_was_lost_is_torchs_again() -> None:
    text = "a compiled graph failed in aten.sort.default: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"

    def call(args: list[object]) -> object:
        error = RuntimeError(text)
        error.memplan_step = 7  # type: ignore[attr-defined]
        raise error

    def explain(plan: object, step: int | None, asked: int) -> str:
        return f"step {step}, {asked} bytes"

    with pytest.raises(torch.OutOfMemoryError) as raised:
        explained(call, lambda: None, "", (), explain)([])  # type: ignore[arg-type, return-value]
    assert str(raised.value).startswith(text)
    assert str(raised.value).endswith(f"step 7, {2 << 30} bytes")
