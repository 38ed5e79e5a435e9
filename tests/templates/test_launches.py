"""Templates on a GPU that is not there: what both wrappers launch for a product of one launch and of two."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch

import memplan
import memplan.compilation
import memplan.templates
from memplan.ir.template import Method, ProductConfig
from memplan.passes.templates import Candidate
from memplan.runtime import cuda_launch
from memplan.runtime.build import build_library
from memplan.runtime.triton_build import Build, Compiled, Target
from tests.fake_gpu import FakeGpu, Launched, make_fake_gpu

_NOTHING = 'extern "C" void nothing() {}'
STAGED = ProductConfig(32, 32, 32, Method.STAGED, parts=2, slice=4)
TILE = ProductConfig(32, 32, 32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Products do nothing there."""
    fake = make_fake_gpu(monkeypatch)
    nothing = ctypes.CDLL(str(build_library(_NOTHING, name="nothing", openmp=False, native=False))).nothing
    fake.keep.append(nothing)
    fake.driver.fake_register.restype = ctypes.c_uint64

    def compile_builds(builds: Sequence[Build], target: Target) -> list[Compiled]:
        found = []
        for build in builds:
            number = fake.driver.fake_register(ctypes.cast(nothing, ctypes.c_void_p), len(build.arguments))
            fake.names[number] = (build.name, None)  # type: ignore[assignment]
            cubin = b"\x7fELF" + number.to_bytes(8, "little")
            found.append(Compiled(build, SimpleNamespace(name=build.name), cubin, 0, 0, "gdc_wait" in build.source))
        return found

    monkeypatch.setattr(memplan.templates, "compile_builds", compile_builds)
    yield fake
    monkeypatch.undo()
    cuda_launch.native_launch.cache_clear()


def launched(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, config: ProductConfig, wrapper: str) -> list[Launched]:
    def choose(found: Sequence[Candidate], program: object) -> dict[object, ProductConfig]:
        return {c.key: config for c in found}

    monkeypatch.setattr(memplan.compilation, "chooser", lambda config, kept: choose)
    torch._dynamo.reset()
    gpu.driver.fake_reset()
    x, w, v = (torch.randn(*s, dtype=torch.float16) for s in ((64, 64), (64, 32), (32, 4096)))
    torch.compile(lambda x, w, v: (x @ w).relu() @ v, backend="memplan", options={"wrapper": wrapper})(x, w, v)
    return [k for k in gpu.launches() if k.kernel.startswith("t")]


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_two_launches_take_the_same_arguments(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, wrapper: str) -> None:
    first, last = launched(gpu, monkeypatch, STAGED, wrapper)[:2]
    assert (first.kernel, last.kernel) == ("t0_staged_product", "t0_staged_product_finish")
    assert first.arguments == last.arguments
    assert len(set(first.arguments)) == len(first.arguments) == 4  # two factors, the result, partial sums
    assert (first.grid, last.grid) == ((2 * 2, 1, 1), (2 * 8, 1, 1))
    assert first.early
    assert last.early
    (tile, *_) = launched(gpu, monkeypatch, TILE, wrapper)
    assert (tile.kernel, tile.grid, len(tile.arguments)) == ("t0_tile_product", (2, 1, 1), 3)
