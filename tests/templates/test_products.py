"""Products from templates: numbers by Triton's interpreter, builds for an H100, counters left at zero."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memplan.codegen.triton_kernel import TritonKernel
from memplan.codegen.triton_product import emit_launches, emit_product
from memplan.ir.template import Method, ProductConfig
from memplan.runtime.triton_build import Build, Target, compile_one, resources
from tests.templates.products import CONFIGS, buffers, product

Run = Callable[[TritonKernel, list[torch.Tensor]], list[torch.Tensor]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    worker = Path(__file__).parents[1] / "codegen_triton" / "interpreter_worker.py"
    with subprocess.Popen([sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        source, sink = process.stdout, process.stdin
        assert source is not None
        assert sink is not None

        def run(kernel: TritonKernel, made: list[torch.Tensor]) -> list[torch.Tensor]:
            instances = kernel.axes[0][0]
            data = pickle.dumps((kernel.source, kernel.name, instances, made, [], {"UNIT": 1}))
            sink.write(struct.pack("<Q", len(data)) + data)
            sink.flush()
            answer = pickle.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
            assert isinstance(answer, list), f"{answer}\n{kernel.source}"
            return answer

        yield run
        sink.close()


SHAPES = pytest.mark.parametrize(
    ("sizes", "transposed", "bias", "epilogue"),
    [
        ((1, 32, 32, 64), (False, False), False, "none"),
        ((1, 48, 40, 80), (False, True), True, "relu"),
        ((1, 35, 21, 50), (True, False), True, "residual"),
        ((3, 20, 36, 33), (False, False), False, "residual"),
        ((2, 16, 16, 16), (True, True), False, "relu"),
    ],
)


@pytest.mark.parametrize("method", CONFIGS)
@SHAPES
def test_numbers(
    run: Run, method: str, sizes: tuple[int, int, int, int], transposed: tuple[bool, bool], bias: bool, epilogue: str
) -> None:
    p = product(sizes, CONFIGS[method], transposed=transposed, bias=bias, epilogue=epilogue)
    made, expected = buffers(p)
    wanted = expected()
    found = made
    kernels = emit_launches(p, name="product")
    assert tuple(k.name for k in kernels) == p.launches("product")
    for kernel in kernels:
        found = run(kernel, found)
    for a, b in zip(found, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    if p.workspaces() and p.config.method is not Method.STAGED:
        assert p.workspaces()[-1].zero_fill
        assert not found[-1].any()


@SHAPES
def test_whole_tiles_may_be_added_up_by_one_instance(
    run: Run, sizes: tuple[int, int, int, int], transposed: tuple[bool, bool], bias: bool, epilogue: str
) -> None:
    config = replace(CONFIGS["staged"], slice=CONFIGS["staged"].rows)
    p = product(sizes, config, transposed=transposed, bias=bias, epilogue=epilogue)
    made, expected = buffers(p)
    wanted = expected()
    for kernel in emit_launches(p, name="product"):
        made = run(kernel, made)
    for a, b in zip(made[: len(wanted)], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "config",
    [
        ProductConfig(128, 128, 64, warps=8, stages=3),
        ProductConfig(64, 64, 64, Method.SPLIT, parts=8, warps=4, stages=3),
        ProductConfig(128, 128, 64, Method.SPLIT, parts=32, warps=8, stages=3, bunch=8),
        ProductConfig(128, 128, 64, Method.STREAM, parts=132, warps=8, stages=3),
    ],
    ids=lambda c: f"{c.method.value}{c.bunch}",
)
def test_builds_without_spilling(config: ProductConfig) -> None:
    p = product((1, 1000, 768, 3072), config, transposed=(False, True), bias=True, epilogue="residual")
    kernel = emit_product(p, name="product")
    built = compile_one(Build.of(kernel, kernel.configs[0]), Target())
    found = resources(built.cubin)
    assert found.registers <= 255
    assert found.spilled_bytes == 0
    assert built.scratch_bytes == 0
    assert built.shared_bytes <= 227 << 10


def test_workspaces_are_counted_in_bytes() -> None:
    p = product((2, 70, 50, 64), ProductConfig(32, 32, 16, Method.SPLIT, parts=4))
    partials, counters = p.workspaces()
    assert p.tiles == 2 * 3 * 2
    assert (partials.count, partials.zero_fill) == (p.tiles * 4 * 32 * 32 * 4, False)
    assert (counters.count, counters.zero_fill) == (p.tiles * 4, True)
    bunches = product((2, 70, 50, 64), ProductConfig(32, 32, 16, Method.SPLIT, parts=4, bunch=2)).workspaces()
    assert bunches[0].count == partials.count
    assert bunches[1].count == p.tiles * (1 + 2) * 4
    stream = product((2, 70, 50, 64), ProductConfig(32, 32, 16, Method.STREAM, parts=5))
    assert stream.workspaces()[0].count == 2 * 5 * 32 * 32 * 4
