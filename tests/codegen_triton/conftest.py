"""The interpreter's process, and checks of a kernel against the reference evaluator and against the compiler."""

from __future__ import annotations

import pickle
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import sympy
import torch

TESTS = Path(__file__).parents[1]
for folder in (TESTS, TESTS / "codegen_triton"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from reference_kernel import run_reference  # noqa: E402

from memplan.codegen.triton_kernel import TritonKernel, emit_triton  # noqa: E402
from memplan.ir.canonical import canonicalize  # noqa: E402
from memplan.ir.loops import Kernel  # noqa: E402
from memplan.ir.program import evaluate  # noqa: E402
from memplan.runtime.triton_build import Build, Resources, Target, compile_one, resources  # noqa: E402

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Interpreter:
    """Triton's interpreter in another process."""

    process: subprocess.Popen[bytes]

    def run(
        self, kernel: TritonKernel, config: int, buffers: list[torch.Tensor], hints: Mapping[sympy.Symbol, int]
    ) -> list[torch.Tensor]:
        chosen = kernel.configs[config]
        grid = evaluate(kernel.grid(chosen), hints)
        extra = [hints[s] for s in kernel.symbols]
        data = pickle.dumps((kernel.source, kernel.name, grid, buffers, extra, dict(chosen.blocks)))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(struct.pack("<Q", len(data)) + data)
        self.process.stdin.flush()
        header = self.process.stdout.read(8)
        answer = pickle.loads(self.process.stdout.read(struct.unpack("<Q", header)[0]))
        assert not isinstance(answer, str), f"{answer}\n{kernel.source}"
        return answer


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    worker = Path(__file__).parent / "interpreter_worker.py"
    with subprocess.Popen([sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Interpreter(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session", autouse=True)
def _own_triton_cache() -> Iterator[None]:
    """Builds of the tests are made anew in every run, so that they are tests."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        yield


@dataclass
class Checker:
    """Compare a kernel's emitted form with its meaning."""

    interpreter: Interpreter

    def numbers(
        self,
        kernel: Kernel,
        buffers: Tensors,
        hints: Mapping[sympy.Symbol, int] | None = None,
        *,
        config: int = 0,
        rtol: float | None = None,
        atol: float | None = None,
        wide: bool = False,
    ) -> TritonKernel:
        """Run through the interpreter and compare every buffer, those only read included."""
        canonical = canonicalize(kernel)
        emitted = emit_triton(canonical, name="kernel", hints=hints or {}, wide=wide)
        expected = {k: v.clone() for k, v in buffers.items()}
        run_reference(kernel, expected, hints)
        found = self.interpreter.run(emitted, config, [buffers[b].clone() for b in canonical.buffers], hints or {})
        for name, got in zip(canonical.buffers, found, strict=True):
            message = f"buffer {name}\n{emitted.source}"
            tolerances = {} if rtol is None or not got.dtype.is_floating_point else {"rtol": rtol, "atol": atol or 0.0}
            torch.testing.assert_close(
                got, expected[name], equal_nan=True, msg=lambda m, message=message: f"{m}\n{message}", **tolerances
            )
        return emitted

    def builds(self, kernel: Kernel, hints: Mapping[sympy.Symbol, int] | None = None, *, config: int = 0) -> Resources:
        """Compile for an H100; gives registers and spills."""
        emitted = emit_triton(canonicalize(kernel), name="kernel", hints=hints or {})
        built = compile_one(Build.of(emitted, emitted.configs[config]), Target())
        assert built.cubin[:4] == b"\x7fELF"
        assert built.scratch_bytes == 0
        return resources(built.cubin)


@pytest.fixture
def check(interpreter: Interpreter) -> Checker:
    return Checker(interpreter)


@pytest.fixture
def golden_source() -> Callable[[TritonKernel], str]:
    """The body of a kernel without its header, for goldens of a few lines."""

    def body(kernel: TritonKernel) -> str:
        return re.sub(r"\A.*?@triton\.jit\n", "", kernel.source, count=1, flags=re.DOTALL)

    return body
