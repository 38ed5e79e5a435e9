"""Building and running one emitted CPU kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import sympy
import torch
from reference_kernel import run_reference

from memplan.codegen.cpp_kernel import BUILD_FLAGS, emit_cpp_library
from memplan.ir.canonical import CanonicalKernel, canonicalize
from memplan.ir.loops import Kernel
from memplan.runtime.build import build_library, load_library


def run_cpp(
    kernel: Kernel,
    buffers: Mapping[str, torch.Tensor],
    hints: Mapping[sympy.Symbol, int] | None = None,
    *,
    threads: bool = True,
    planned: Mapping[sympy.Symbol, int] | None = None,
) -> str:
    """Emit, build and run ``kernel`` on the buffers (changed in place); the source is returned.

    ``hints`` are the sizes it runs with, ``planned`` those it is emitted for, if they differ.
    """
    canonical = canonicalize(kernel)
    values = hints or {}
    library, source = build_and_load([("kernel", canonical)], planned or values, threads=threads)
    arguments: list[object] = [ctypes.c_void_p(buffers[b].data_ptr()) for b in canonical.buffers]
    arguments += [ctypes.c_int64(values[s]) for s in canonical.symbols]
    library.kernel(*arguments)
    return source


def compare(kernel: Kernel, buffers: dict[str, torch.Tensor], hints: dict[sympy.Symbol, int] | None = None) -> None:
    """Run a kernel on the buffers (changed in place), and its reference on copies; both must give the same."""
    expected = {n: t.clone() for n, t in buffers.items()}
    run_reference(kernel, expected, hints)
    run_cpp(kernel, buffers, hints)
    for name, value in buffers.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True, msg=lambda t, n=name: f"{n}: {t}")


def build_and_load(
    kernels: Sequence[tuple[str, CanonicalKernel]],
    hints: Mapping[sympy.Symbol, int] | None = None,
    *,
    threads: bool = True,
) -> tuple[ctypes.CDLL, str]:
    """The loaded library of these kernels, and its source."""
    source = emit_cpp_library(kernels, hints or {}, threads=threads)
    return load_library(build_library(source, name="kernels", flags=BUILD_FLAGS, openmp=threads)), source
