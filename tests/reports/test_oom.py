"""Running out of memory for real, in a process of its own with a limit on its addresses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memplan.free_memory import free_on_gpu
from memplan.out_of_memory import Shortage, explained, is_out_of_memory, requested, running_step

OUTER = """
def model(x, w):
    h = (x @ w).relu()
    outer = h[:, :, None] * h[:, None, :]   # 312 MiB
    return (torch.cumsum(outer, 0) if GRAD else outer).sum()

def given():
    return torch.randn(20_000, 64), torch.randn(64, 64, requires_grad=GRAD)
"""
LAYERS = """
def model(x, *weights):
    for up, down in zip(weights[::2], weights[1::2]):
        x = x + torch.nn.functional.gelu(x @ up) @ down  # 15.6 MiB are kept for the backward of each layer
    return x.square().mean()

def given():
    shapes = [(128, 512), (512, 128)] * 8
    return torch.randn(8_000, 128), *(torch.randn(s, requires_grad=True) for s in shapes)
"""
SCRIPT = """
import resource

torch.set_num_threads(1)
compiled, args = torch.compile(model, backend="memplan", options=OPTIONS), given()

def step():
    loss = compiled(*args)
    if GRAD:
        loss.backward()
        for a in args:
            a.grad = None

step()  # what compilers and libraries take once is taken: now LIMIT MiB more, and no further
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT * 2**20,) * 2)
try:
    step()
    print("it fits")
except RuntimeError as error:
    print(type(error).__name__, error)
"""


def run_out(options: dict[str, object], folder: Path, model: str, limit: int, *, train: bool = True) -> str:
    """What a process prints whose second step has ``limit`` MiB for all that it needs."""
    head = f"OPTIONS, LIMIT, GRAD = {options!r}, {limit}, {train}\nimport torch\n"
    script = folder / "train.py"
    script.write_text(head + model + SCRIPT)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back to the system at once
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_error_shows_step_line_and_that_nothing_known_helps(tmp_path: Path) -> None:
    out = run_out({}, tmp_path, OUTER, 200)
    assert out.startswith("RuntimeError"), out
    assert "DefaultCPUAllocator: can't allocate memory" in out, "torch's own words come first"
    assert "memplan: memory ran out at step" in out
    assert "asking for" in out
    assert "train.py:6    outer = h[:, :, None] * h[:, None, :]" in out
    assert "No known change would have made it fit" in out
    assert "The largest buffer is" in out
    assert out.count("memplan: memory ran out") == 1


def test_what_cannot_be_imported_any_more_leaves_step_line_and_bytes(tmp_path: Path) -> None:
    """Under a limit on addresses a library may not load: the message does without."""
    out = run_out({}, tmp_path, OUTER + '\nimport sys\nsys.modules["pydantic"] = None\n', 200)
    assert "DefaultCPUAllocator: can't allocate memory" in out, "torch's own words come first"
    assert re.search(r"memplan: memory ran out in \S+, at step \d+ of \d+", out), out
    assert re.search(r"the plan holds [\d,]+ bytes there, at most [\d,]+\n", out), out
    assert "train.py:6    outer = h[:, :, None] * h[:, None, :]" in out
    assert "(no more can be said: ModuleNotFoundError: import of pydantic halted" in out


def test_a_switched_off_pass_is_named_if_it_would_have_helped(tmp_path: Path) -> None:
    out = run_out({"disable": ["fusion"]}, tmp_path, OUTER, 200, train=False)
    found = re.search(
        r"What would have made it fit:\n    leaving 'fusion' out of disable\n.*MiB less than there were", out
    )
    assert found, out


@pytest.mark.parametrize("wrapper", ["cpp", "python"])
def test_the_budget_that_it_names_does_make_it_fit(wrapper: str, tmp_path: Path) -> None:
    """What is free is measured: by either wrapper it is what the limit leaves, and a plan within it runs within it."""
    out = run_out({"wrapper": wrapper}, tmp_path, LAYERS, 120)
    there = re.search(r"there were about (\d+(?:\.\d)?) MiB for it", out)
    assert there, out
    assert 105 < float(there[1]) <= 120
    found = re.search(r'What would have made it fit:\n    options=\{"budget": (\d+)\}', out)
    assert found, out
    assert run_out({"wrapper": wrapper, "budget": int(found[1])}, tmp_path, LAYERS, 120) == "it fits\n"


def test_what_a_gpu_has_left_is_read_off_its_message() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.50 GiB is "
        "free. Including non-PyTorch memory, this process has 77.6 GiB memory in use. {}Of the allocated memory 70.00 "
        "GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
    )
    assert free_on_gpu(text.format("")) == 3 << 29
    assert free_on_gpu(text.format("71.00 GiB allowed; ")) == 1 << 29
    assert free_on_gpu(text.format("70.00 GiB allowed; ")) == 0
    assert free_on_gpu("HIP error") is None


def test_what_the_host_has_left_is_the_nearest_limit() -> None:
    code = """
import resource
from memplan.free_memory import free_on_host
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print(free_on_host())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (56 << 20) < int(done.stdout) <= 64 << 20


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

    def explain(plan: object, shortage: Shortage) -> str:
        assert shortage.on_gpu
        return f"step {shortage.step}, {shortage.requested} bytes"

    with pytest.raises(torch.OutOfMemoryError) as raised:
        explained(call, lambda: None, "", (), explain)([])  # type: ignore[arg-type, return-value]
    assert str(raised.value).startswith(text)
    assert str(raised.value).endswith(f"step 7, {2 << 30} bytes")
