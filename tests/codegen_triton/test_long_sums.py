"""The forms of a long sum that a benchmark compares: they build for a GPU, and the interpreter finds them right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.long_sums import build_of
from memplan.runtime.triton_build import Target, compile_one

_SCRIPT = """
import torch
from benchmarks.long_sums import SOURCE, constants
from memplan.runtime.triton_worker import load_module

scope = load_module(SOURCE, "long_sums")
torch.manual_seed(0)
size, parts = 100_003, 7
x = torch.rand(size)
counter, bits = torch.zeros(1, dtype=torch.int32), set()
for _ in range(2):
    partials, out = torch.full((parts,), float("nan")), torch.full((2,), float("nan"))
    scope.in_one[(parts,)](x, partials, counter, out, **constants("in_one", size, parts))
    assert int(counter) == 0, counter
    again = torch.full((parts,), float("nan"))
    scope.parts_only[(parts,)](x, again, **constants("parts_only", size, parts))
    scope.then_sum[(1,)](again, out[1:], **constants("then_sum", size, parts))
    assert torch.equal(partials, again)
    bits.update(out.tolist())
assert len(bits) == 1, bits
torch.testing.assert_close(torch.tensor(bits.pop()), x.double().sum().float())
"""


@pytest.mark.parametrize("name", ["parts_only", "then_sum", "in_one"])
def test_they_build(name: str) -> None:
    built = compile_one(build_of(name, 100_000_000, 1056), Target())
    assert built.cubin[:4] == b"\x7fELF"
    assert built.scratch_bytes == 0
    if name == "in_one":
        assert "atom.global.gpu.acq_rel.add" in built.handle.asm["ptx"]  # type: ignore[attr-defined]


def test_one_launch_and_two_give_the_same_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
