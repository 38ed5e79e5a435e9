"""Loops over the C++ prelude's functions, for the tests of the prelude."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from memplan.runtime.build import build_library, load_library

FOLDER = Path(__file__).resolve().parents[2] / "codegen"
PRELUDE = (FOLDER / "cpp_prelude.h").read_text(encoding="utf-8").replace("#pragma once\n", "")
SPECIAL = (FOLDER / "cpp_special.h").read_text(encoding="utf-8").replace("#pragma once\n", "")

C_TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bool: "bool", torch.uint8: "uint8_t", torch.int8: "int8_t",
    torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t", torch.bfloat16: "mp::bfloat16",
    torch.float16: "mp::float16",
}  # fmt: skip


class Loops:
    """Collects loops, builds them once into one library, and calls them by name."""

    def __init__(self, extra: str = "") -> None:
        self.lines = [PRELUDE, SPECIAL, extra, 'extern "C" {']
        self.known: set[str] = set()

    def map(self, name: str, expression: str, inputs: tuple[torch.dtype, ...], output: torch.dtype) -> None:
        """A loop ``out[i] = expression`` where ``a``, ``b``, ``c`` are the inputs' elements and ``i`` the index."""
        names = "abc"[: len(inputs)]
        parameters = "".join(
            f"const {C_TYPES[t]}* __restrict p{n}, " for n, t in zip(names, inputs, strict=True)
        )  # fmt: skip
        loads = " ".join(f"auto {n} = mp::load(&p{n}[i]);" for n in names)
        half = output in (torch.float16, torch.bfloat16)
        store = f"mp::store(&out[i], {'float' if half else C_TYPES[output]}({expression}));"
        self.lines.append(
            f"void {name}({parameters}{C_TYPES[output]}* __restrict out, int64_t n) {{\n"
            f"#pragma omp simd\nfor (int64_t i = 0; i < n; ++i) {{ {loads} {store} }} }}"
        )
        self.known.add(name)

    def build(self, native: bool = True) -> ctypes.CDLL:
        source = "\n".join([*self.lines, "}"])
        self.library = load_library(build_library(source, name="prelude_test", native=native))
        return self.library

    def __call__(self, name: str, *inputs: torch.Tensor, output: torch.dtype, size: int | None = None) -> torch.Tensor:
        assert name in self.known
        count = inputs[0].numel() if size is None else size
        out = torch.empty(count, dtype=output)
        function = getattr(self.library, name)
        pointers = [ctypes.c_void_p(t.contiguous().data_ptr()) for t in (*inputs, out)]
        function(*pointers, ctypes.c_int64(count))
        return out


@pytest.fixture(scope="session")
def loops_type() -> type[Loops]:
    return Loops


@pytest.fixture(scope="session")
def prelude_text() -> str:
    return PRELUDE


@pytest.fixture(scope="session")
def special_text() -> str:
    return SPECIAL
