"""Where values stand in emitted loops: those of the vectorised range in arrays, conditions before its loop."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import sympy
import torch
from cpp_running import compare, run_cpp

from memplan.codegen.cpp_kernel import BUILD_FLAGS, emit_cpp, emit_cpp_library
from memplan.codegen.cpp_schedule import MOST_COLUMNS, plan_loops
from memplan.ir.canonical import canonicalize
from memplan.ir.loops import (
    Call,
    Constant,
    Index,
    Kernel,
    Load,
    Node,
    Range,
    Size,
    Store,
    StoreMode,
    outer_symbol,
)
from memplan.runtime.build import BuildJob, compile_command
from memplan.runtime.toolchain import find_toolchain

x0, x1, x2 = (outer_symbol(k) for k in range(3))
f32, i64 = torch.float32, torch.int64
S0 = sympy.Symbol("s0", integer=True, positive=True)


def normalised(points: Size, channels: Size, *, in_place: bool = False) -> Kernel:
    """``(a - mean) / sqrt(variance + 1e-5)`` of channels-last points."""
    at = sympy.sympify(channels) * x0 + x1
    nodes: tuple[Node, ...] = (
        Load("a", at, f32),
        Load("mean", x1, f32),
        Call("sub", (0, 1), f32),
        Load("variance", x1, f32),
        Constant(1e-5, f32),
        Call("add", (3, 4), f32),
        Call("sqrt", (5,), f32),
        Call("reciprocal", (6,), f32),
        Call("mul", (2, 7), f32),
    )
    return Kernel((Range(x0, points), Range(x1, channels)), (), nodes, (Store("a" if in_place else "o", at, 8, f32),))


def text(kernel: Kernel, hints: dict[sympy.Symbol, int] | None = None) -> str:
    return emit_cpp(canonicalize(kernel), name="kernel", hints=hints or {}, threads=False)


@pytest.mark.parametrize(("points", "channels"), [(40, 24), (3000, 7), (16, 4096)])
@pytest.mark.parametrize("in_place", [False, True])
def test_values_of_channels_are_computed_once(points: int, channels: int, in_place: bool) -> None:
    kernel = normalised(points, channels, in_place=in_place)
    buffers = {"a": torch.randn(points * channels), "mean": torch.randn(channels), "variance": torch.rand(channels)}
    if not in_place:
        buffers["o"] = torch.zeros(points * channels)
    compare(kernel, buffers)
    source = text(kernel)
    before, loops = source.split("for (int64_t x0", 1)
    assert f"[{channels}L];" in before
    assert before.count("mp::sqrt") == before.count("mp::reciprocal") == 1
    assert "mp::sqrt" not in loops
    assert "mp::reciprocal" not in loops


def test_arrays_are_only_for_what_pays_and_fits() -> None:
    assert plan_loops(normalised(40, 24), {}).columns == (7,)
    assert plan_loops(normalised(8, 24), {}).columns == ()  # used again too seldom
    assert plan_loops(normalised(40, MOST_COLUMNS + 1), {}).columns == ()  # too long for the stack
    assert plan_loops(normalised(40, S0), {S0: 24}).columns == ()  # of unknown length
    assert plan_loops(normalised(S0, 24), {S0: 40}).columns == (7,)
    cheap = normalised(40, 24)
    nodes = (*cheap.nodes[:6], Call("neg", (5,), f32), Call("abs", (6,), f32), cheap.nodes[8])
    assert plan_loops(Kernel(cheap.outer, (), nodes, cheap.stores), {}).columns == ()


def pooled(channels: int, *, masked_store: bool = False) -> Kernel:
    """Maxima of relu over windows of three with a border, channels last."""
    nodes: list[Node] = [Constant(0, i64), Constant(20, i64), Constant(-float("inf"), f32)]

    def add(node: Node) -> int:
        nodes.append(node)
        return len(nodes) - 1

    best = inside = -1
    for offset in (-1, 0, 1):
        position = add(Index(2 * x1 + offset))
        bounds = (add(Call("ge", (position, 0), torch.bool)), add(Call("lt", (position, 1), torch.bool)))
        inside = add(Call("logical_and", bounds, torch.bool))
        loaded = add(Load("a", 20 * channels * x0 + channels * (2 * x1 + offset) + x2, f32, inside))
        value = add(Call("where", (inside, add(Call("relu", (loaded,), f32)), 2), f32))
        if best < 0:
            best = value
            continue
        greater = add(Call("gt", (value, best), torch.bool))
        wins = add(Call("logical_or", (greater, add(Call("isnan", (value,), torch.bool))), torch.bool))
        best = add(Call("where", (wins, value, best), f32))
    at, mask = 11 * channels * x0 + channels * x1 + x2, inside if masked_store else None
    store = Store("o", at, best, f32, StoreMode.SET, mask)
    return Kernel((Range(x0, 5), Range(x1, 11), Range(x2, channels)), (), tuple(nodes), (store,))


@pytest.mark.parametrize("masked_store", [False, True])
@pytest.mark.parametrize("channels", [1, 8, 35])
def test_conditions_that_stay_the_same_in_the_vectorised_loop(channels: int, masked_store: bool) -> None:
    a = torch.randn(5 * 20 * channels)
    a[::17] = float("nan")
    kernel = pooled(channels, masked_store=masked_store)
    compare(kernel, {"a": a, "o": torch.full((5 * 11 * channels,), 7.0)})
    if channels > 1:  # else the innermost loop is the one that the conditions differ in
        assert re.search(r"if \(v\d+( & v\d+)*\) \{\s+constexpr bool", text(kernel))


def test_conditions_of_the_vectorised_range_stay_in_its_loop() -> None:
    nodes = (Index(x1), Constant(3, i64), Call("ge", (0, 1), torch.bool), Load("a", 8 * x0 + x1, f32, 2))
    kernel = Kernel((Range(x0, 40), Range(x1, 8)), (), nodes, (Store("o", 8 * x0 + x1, 3, f32),))
    source = run_cpp(kernel, {"a": torch.randn(320), "o": torch.zeros(320)})
    assert "constexpr bool v" not in source


@pytest.mark.skipif("g++" not in find_toolchain().version, reason="asks g++ for its report")
def test_pooling_of_channels_vectorises(tmp_path: Path) -> None:
    source = emit_cpp_library([("kernel", canonicalize(pooled(32)))], {}, threads=False)
    (tmp_path / "f.cpp").write_text(source)
    line = compile_command(BuildJob(source, "f", BUILD_FLAGS), find_toolchain())
    command = [*line, "-fopt-info-vec", "-c", "f.cpp", "-o", "f.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "loop vectorized" in done.stderr
