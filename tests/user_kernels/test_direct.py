"""User kernels of one variant: launched straight through the driver, by both wrappers, and kept like other kernels."""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import memplan
from memplan import user_kernels
from memplan.ir.program import UserKernel
from memplan.runtime import cuda_launch
from memplan.runtime.build import build_library
from memplan.runtime.user_kernel_direct import Direct, direct
from memplan.runtime.user_kernel_launch import UserLauncher
from tests.fake_gpu import FakeGpu, make_fake_gpu
from tests.user_kernels.pretended_gpu import pretended_gpu
from tests.user_kernels.test_wrapper import case, planned

with pretended_gpu():
    import triton
    import triton.language as tl


@pytest.fixture(autouse=True)
def triton_target() -> Iterator[None]:
    with pretended_gpu():
        yield


@triton.jit
def plane(x_ptr, out_ptr, rows, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row for each instance along the second axis."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    x = tl.load(x_ptr + row * 96 + at, mask=at < 96)
    tl.store(out_ptr + row * 96 + at, x * factor + rows, mask=at < 96)


_PLANE = """
#include <cstdint>
#include <cstring>
extern "C" void plane(const float* x, float* out, int64_t rows, uint64_t bits) {
    float factor;
    std::memcpy(&factor, &bits, 4);
    for (int64_t k = 0; k < rows * 96; ++k) out[k] = x[k] * factor + float(rows);
}
"""


def planes(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    plane[(3, x.shape[0])](x, out, x.shape[0], 0.25, BLOCK=32)
    return torch.relu(out) - 1


def variant(function: Callable[..., object], *shapes: tuple[int, ...], dynamic: bool = False) -> Direct | None:
    program = planned(function, *shapes, dynamic=dynamic).program
    op = next(op for op in program.operations if isinstance(op, UserKernel))
    launcher = UserLauncher(op, frozenset(), frozenset())
    return direct(launcher, "u0", launcher.prepare(program.hints))


def test_arguments_are_those_of_the_cubin() -> None:
    found = variant(planes, (5, 96))
    assert found is not None
    quarter = int.from_bytes(b"\x00\x00\x80\x3e", "little")
    assert found.fixed == (None, None, 5, quarter)
    assert [kind for _, kind in found.compiled.build.arguments] == ["*fp32", "*fp32", "i32", "fp32"]
    ptx = found.compiled.handle.asm["ptx"]  # type: ignore[attr-defined]
    entry = ptx[ptx.index(".entry") : ptx.index(")", ptx.index(".entry"))]
    assert len(re.findall(r"\.param", entry)) == len(found.fixed) + 2  # two pointers to scratch memory


def test_a_number_that_is_one_is_part_of_the_kernel() -> None:
    found = variant(planes, (1, 96))
    assert found is not None
    assert [name for name, _ in found.compiled.build.arguments] == ["x_ptr", "out_ptr", "factor"]


@pytest.mark.parametrize(
    ("name", "shapes", "dynamic"),
    [
        ("add_kernel, sizes that change", [(512,), (512,)], True),
        ("restore_value", [(512,)], False),
        ("add_kernel_with_tma_2d_new_api", [(32, 64), (32, 64)], False),
    ],
)
def test_what_has_several_variants_is_launched_by_triton(
    name: str, shapes: list[tuple[int, ...]], dynamic: bool
) -> None:
    assert variant(case(name), *shapes, dynamic=dynamic) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = make_fake_gpu(monkeypatch)
    library = ctypes.CDLL(str(build_library(_PLANE, name="plane", flags=("-O1",), openmp=False)))
    fake.driver.fake_register.restype = ctypes.c_uint64
    number = fake.driver.fake_register(ctypes.cast(library.plane, ctypes.c_void_p), 4)

    def on_the_fake(*arguments: object) -> Direct | None:
        found = direct(*arguments)  # type: ignore[arg-type]
        assert found is not None
        assert found.compiled.cubin.startswith(b"\x7fELF")
        handle, cubin = SimpleNamespace(name="plane"), b"\x7fELF" + number.to_bytes(8, "little")
        fake.names[number] = ("plane", None)  # type: ignore[assignment]
        return replace(found, compiled=replace(found.compiled, handle=handle, cubin=cubin))

    monkeypatch.setattr(user_kernels, "direct", on_the_fake)
    yield fake
    monkeypatch.undo()
    cuda_launch.native_launch.cache_clear()


def test_both_wrappers_launch_it_alike(gpu: FakeGpu) -> None:
    x = torch.randn(5, 96)
    wanted = torch.relu(x * 0.25 + 5) - 1
    made = []
    for wrapper in ("python", "cpp"):
        torch._dynamo.reset()
        gpu.reset()
        with memplan.record() as recording:
            found = torch.compile(planes, backend="memplan", options={"wrapper": wrapper})(x)
        torch.testing.assert_close(found, wanted)
        made.append([k for k in gpu.launches() if k.kernel == "plane"])
        assert [k.early for k in gpu.launches()] == [k.kernel != "plane" for k in gpu.launches()], "it may not wait"
        source = recording.graphs[0].wrapper
        assert ("MP_LAUNCH_USER" in source) == (wrapper == "cpp")
    (first,), (second,) = made
    assert first.grid == second.grid == (3, 5, 1)
    assert first.block == second.block == (128, 1, 1)
    assert (first.shared, first.stream, first.context) == (second.shared, second.stream, second.context)
    assert first.arguments[2:] == second.arguments[2:]
    assert all(address % 16 == 0 for address in (*first.arguments[:2], *second.arguments[:2]))


def test_it_is_kept_with_the_plan(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEMPLAN_PLAN_CACHE", "1")
    x = torch.randn(5, 96)
    wanted = torch.relu(x * 0.25 + 5) - 1
    caplog.set_level(logging.INFO, "memplan.cache")
    for hit in (False, True):
        torch._dynamo.reset()
        caplog.clear()
        found = torch.compile(planes, backend="memplan", options={"cache_dir": str(tmp_path)})(x)
        torch.testing.assert_close(found, wanted)
        assert ("is from the cache" in caplog.text) == hit
    assert [k.grid for k in gpu.launches() if k.kernel == "plane"] == [(3, 5, 1)] * 2
