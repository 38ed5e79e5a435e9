"""Every pointwise function and every reduction: numbers through the interpreter, cubins for all."""

from __future__ import annotations

import operation_kernels as o
import pytest
import torch
from sample_kernels import F32, I64, Builder, X

from memplan.codegen.triton_configs import LaunchConfig
from memplan.codegen.triton_kernel import emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import CompilerError, LoweringError
from memplan.ir.loops import CHECKED_INDEX, OPERATIONS
from memplan.runtime.triton_build import Build, Target, compile_builds

OPERATION_CASES = {name: (k, b) for dtype in o.KINDS for name, k, b in o.operation_cases(dtype)}


@pytest.mark.parametrize("name", OPERATION_CASES)
def test_operation(name: str, check) -> None:
    kernel, buffers = OPERATION_CASES[name]
    check.numbers(kernel, buffers, **o.tolerance(name, buffers["out"].dtype))


def test_every_operation_builds() -> None:
    """Compiled as one batch; the functions of a type share a kernel, to be quick."""
    builds = []
    for dtype in o.KINDS:
        for names in (o.operations(dtype)[::2], o.operations(dtype)[1::2]):
            k = Builder((1024,))
            x, y = k.load("a", X[0], dtype), k.load("b", X[0], dtype)
            less = k.call("lt", x, y, dtype=torch.bool)
            for op in names:
                args = {1: (x,), 2: (x, y), 3: (less if op == "where" else x, x, y)}[OPERATIONS[op]]
                result = torch.bool if op in o._TO_BOOL else dtype
                k.store(f"out_{op}", X[0], k.call(op, *args, dtype=result), result)
            kernel = emit_triton(canonicalize(k.done()), name="kernel", hints={})
            builds.append(Build.of(kernel, kernel.configs[0]))
    for found in compile_builds(builds, Target(), workers=1):
        assert not isinstance(found, CompilerError), found


@pytest.mark.parametrize("op", sorted(o.REFUSED))
def test_refused(op: str) -> None:
    _, kernel, _ = o.operation(op, F32)
    with pytest.raises(LoweringError, match=op):
        emit_triton(canonicalize(kernel), name="kernel", hints={})


def test_every_operation_is_tested() -> None:
    tested = {op for dtype in o.KINDS for op in o.operations(dtype)}
    assert tested | o.REFUSED | {CHECKED_INDEX} == set(OPERATIONS)  # that one: test_indices.py


PERSISTENT = {name: (k, b) for name, k, b in o.reduction_cases(3, 21)}
COLUMNS = {name: (k, b) for name, k, b in o.reduction_cases(5, 20, transposed=True)}


@pytest.mark.parametrize("name", PERSISTENT)
def test_persistent_reduction(name: str, check) -> None:
    check.numbers(*PERSISTENT[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PERSISTENT)
def test_looped_reduction(name: str, check, monkeypatch: pytest.MonkeyPatch) -> None:
    small = LaunchConfig((("XBLOCK", 2), ("RBLOCK", 8)), 4)
    monkeypatch.setattr("memplan.codegen.triton_configs._PERSISTENT_ELEMENTS", 0)
    monkeypatch.setattr("memplan.codegen.triton_configs._looped_rows", lambda x, r: (small,))
    emitted = check.numbers(*PERSISTENT[name], rtol=1e-5, atol=1e-5)
    assert "for roffset" in emitted.source


@pytest.mark.parametrize("name", COLUMNS)
def test_reduction_of_columns(name: str, check) -> None:
    check.numbers(*COLUMNS[name], rtol=1e-5, atol=1e-5)


def test_every_reduction_builds() -> None:
    builds = []
    for cases in (
        o.reduction_cases(64, 1000),
        o.reduction_cases(8, 40_000),
        o.reduction_cases(256, 4000, transposed=True),
    ):
        for _, kernel, _ in cases:
            emitted = emit_triton(canonicalize(kernel), name="kernel", hints={})
            builds.append(Build.of(emitted, emitted.configs[0]))
    for found in compile_builds(builds, Target()):
        assert not isinstance(found, CompilerError), found


def test_integer_index_type(check) -> None:
    k = Builder((40,))
    k.store("out", X[0], k.index(3 * X[0] + 1, torch.int32), torch.int32)
    k.store("wide", X[0], k.call("mul", k.index(X[0]), k.const(1 << 40, I64)), I64)
    check.numbers(k.done(), {"out": torch.zeros(40, dtype=torch.int32), "wide": torch.zeros(40, dtype=I64)})
