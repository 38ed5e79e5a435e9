"""The C++ wrapper on a GPU that is not there: what it launches, and the same bytes as the Python wrapper."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import triton.backends.nvidia
from torch import Tensor, nn

import memplan
from memplan.ir.plan import Own
from memplan.ir.program import EXTERNAL_KINDS, Contract, Extern, Operation, View, evaluate
from memplan.runtime import cuda_launch
from memplan.runtime.toolchain import find_toolchain
from tests.fake_gpu import SHARED, FakeGpu, Launched, make_fake_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    yield make_fake_gpu(monkeypatch)
    monkeypatch.undo()
    cuda_launch.native_launch.cache_clear()


class Mixed(nn.Module):
    """Products, a convolution, norms, an operator without a C function, a mutation, a view of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Linear(4, 16)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen += 1
        y = self.conv(x).mean((2, 3))
        z = torch.nn.functional.gelu(self.norm(self.first(y)))
        return z.cumsum(0), z.sort(1).values, x.transpose(0, 1)


def train(wrapper: str, **options: object) -> tuple[list[Tensor], memplan.recording.Recording]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Mixed()
    dynamic = options.get("dynamic", False)
    given = {"wrapper": wrapper, **{k: v for k, v in options.items() if k != "dynamic"}}
    found: list[Tensor] = []
    with memplan.record() as recording:
        compiled = torch.compile(model, backend="memplan", dynamic=bool(dynamic), options=given)
        for n in (5, 7):
            x = torch.randn(n, 3, 6, 6, requires_grad=True)
            total, ordered, view = compiled(x)
            (total.square().sum() + ordered.sum()).backward()
            assert x.grad is not None
            found += [total.detach(), ordered.detach(), view.detach().clone(), x.grad]
    found += [p.grad for p in model.parameters() if p.grad is not None] + [model.seen]
    return found, recording


def shown(launched: Launched, gpu: FakeGpu) -> tuple[object, ...]:
    """All of a launch but the addresses."""
    pointers = gpu.kernel(launched).pointers
    sizes = launched.arguments[pointers:]
    return (launched.kernel, launched.grid, launched.block, launched.shared, launched.stream, launched.context, sizes)


@pytest.mark.parametrize(
    "options",
    [{}, {"dynamic": True}, {"pools": "always"}, {"poison": True}],
    ids=["plain", "dynamic", "pools", "poison"],
)
def test_both_wrappers_launch_the_same_and_give_the_same_bytes(gpu: FakeGpu, options: dict[str, object]) -> None:
    python, plans = train("python", **options)
    by_python = [shown(k, gpu) for k in gpu.launches()]
    gpu.reset()
    cpp, cpp_plans = train("cpp", **options)
    assert [p.placements for p in cpp_plans.plans] == [p.placements for p in plans.plans]
    assert by_python
    assert [shown(k, gpu) for k in gpu.launches()] == by_python
    for a, b in zip(python, cpp, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    torch.manual_seed(0)
    eager, x = Mixed(), torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(cpp[0], eager(x)[0].detach())


def test_launches_fit_the_kernels(gpu: FakeGpu) -> None:
    """Pointers first, and aligned; grids as the emitted kernel counts them; shared memory that was asked for."""
    train("cpp", dynamic=True)
    for launched in gpu.launches():
        kernel = gpu.kernel(launched)
        assert len(launched.arguments) == len(kernel.arguments)
        assert [kind.startswith("*") for _, kind in kernel.arguments] == sorted(
            (kind.startswith("*") for _, kind in kernel.arguments), reverse=True
        )
        pointers = launched.arguments[: kernel.pointers]
        assert all(address % 16 == 0 and address for address in pointers)
        sizes = dict(zip(kernel.symbols, launched.arguments[kernel.pointers :], strict=True))
        config = kernel.configs[0]
        assert launched.grid == (evaluate(kernel.grid(config), sizes), 1, 1)
        assert launched.block == (32 * config.num_warps, 1, 1)
        assert launched.shared == SHARED
    assert ctypes.c_int.in_dll(gpu.driver, "fake_shared_asked").value == SHARED


def test_pools_are_one_allocation_each(gpu: FakeGpu) -> None:
    """What a call allocates on the GPU is what the plan allocates: pools, and buffers of their own."""
    _, recording = train("cpp", pools="always")
    counted = 0
    for plan in recording.plans:
        fresh = {v.buffer for op in plan.program.operations for v in fresh_results(op)}
        own = [b for b, p in plan.placements.items() if isinstance(p, Own) and b not in fresh]
        on_gpu = [b for b in own if plan.program.buffers[b].kind not in EXTERNAL_KINDS]
        counted += len(plan.pools) + len(on_gpu)
    assert gpu.allocations() == counted  # each size was compiled, and ran once


def fresh_results(op: Operation) -> list[View]:
    """What the call itself allocates."""
    if not isinstance(op, Extern) or op.contract not in (Contract.FRESH, Contract.DYNAMIC):
        return []
    return [v for v in op.results if v is not None]


def pointwise(x: Tensor, y: Tensor) -> Tensor:
    y += 1
    return (x * 2).relu() + x.sum(1, keepdim=True)


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_an_input_that_starts_anywhere(gpu: FakeGpu, wrapper: str) -> None:
    store = torch.randn(100)
    x, y = store[1:65].view(8, 8), store[70:78]
    before = y.clone()
    out = torch.compile(pointwise, backend="memplan", options={"wrapper": wrapper})(x, y)
    torch.testing.assert_close(out, (x * 2).relu() + x.sum(1, keepdim=True))
    assert torch.equal(y, before + 1)
    assert all(a % 16 == 0 for k in gpu.launches() for a in k.arguments[: gpu.kernel(k).pointers])


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_an_error_of_the_driver_names_what_failed(gpu: FakeGpu, wrapper: str) -> None:
    compiled = torch.compile(pointwise, backend="memplan", options={"wrapper": wrapper})
    x, y = torch.randn(8, 8), torch.randn(8)
    compiled(x, y)
    gpu.fail_with(700)
    with pytest.raises(RuntimeError, match=r"(k\d_\w+|cuLaunchKernel).*an illegal memory access"):
        compiled(x, y)
    gpu.fail_with(0)
    torch.testing.assert_close(compiled(x, y), pointwise(x, y.clone()))


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_another_gpu_and_a_thread_that_used_none(gpu: FakeGpu, wrapper: str) -> None:
    gpu.device = "cuda:1"
    compiled = torch.compile(pointwise, backend="memplan", options={"wrapper": wrapper})
    x, y = torch.randn(8, 8), torch.randn(8)
    expected = pointwise(x, y.clone())
    gpu.driver.fake_current.restype = ctypes.c_void_p
    seen: list[object] = []

    def run() -> None:
        seen.append(gpu.driver.fake_current())
        seen.append(compiled(x, y))
        seen.append(gpu.driver.fake_current())

    torch.testing.assert_close(compiled(x, y), expected)
    assert {(k.context, k.stream) for k in gpu.launches()} == {(0x1001, 0x5001)}
    assert gpu.driver.fake_current() == 0x1000, "the caller's GPU is current again"
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0] is None
    assert seen[2] is None
    torch.testing.assert_close(seen[1], expected)


def test_an_error_that_a_function_of_torch_left_behind(gpu: FakeGpu) -> None:
    compiled = torch.compile(lambda x: x.sin() + 1, backend="memplan", options={"wrapper": "cpp"})
    x = torch.randn(64, 64)
    expected = compiled(x)
    ctypes.c_int.in_dll(gpu.driver, "fake_out_of_memory").value = 1
    # torch's own error for the same allocation, which this machine has for another reason
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        torch.empty(1, device="cuda:0")
    with pytest.raises(raised.type, match=re.escape(str(raised.value).splitlines()[0])):
        compiled(x)
    gpu.reset()
    assert torch.equal(compiled(x), expected)


def test_no_elements_are_no_launch(gpu: FakeGpu) -> None:
    compiled = torch.compile(lambda x: x * 2 + 1, backend="memplan", dynamic=True, options={"wrapper": "cpp"})
    assert compiled(torch.randn(4, 3)).shape == (4, 3)
    gpu.reset()
    assert compiled(torch.randn(0, 3)).shape == (0, 3)
    assert all(k.grid[0] for k in gpu.launches())


#: ours, and cuda.h's: where each member lies
_LAYOUTS = "".join(
    f'static_assert(offsetof({ours}, {mine}) == offsetof({theirs}, {its}), "{its}");\n'
    for ours, theirs, members in (
        ("LaunchAttribute", "CUlaunchAttribute", {"id": "id", "value": "value.programmaticStreamSerializationAllowed"}),
        (
            "LaunchConfig",
            "CUlaunchConfig",
            {
                **{f"grid[{k}]": f"gridDim{axis}" for k, axis in enumerate("XYZ")},
                **{f"block[{k}]": f"blockDim{axis}" for k, axis in enumerate("XYZ")},
                "shared": "sharedMemBytes",
                "stream": "hStream",
                "attributes": "attrs",
                "count": "numAttrs",
            },
        ),
    )
    for mine, its in members.items()
)


@pytest.mark.parametrize("text", ["wrapper", "loader"])
def test_declarations_are_the_drivers_own(text: str, tmp_path: Path) -> None:
    """The compiler refuses a pointer to a function of another type than cuda.h's."""
    if text == "wrapper":
        torchs = files("memplan.codegen") / "cpp_wrapper_cuda.h"
        config, declarations = torchs.read_text().split("MP_CUDA(MP_DECLARE)")[0].split("#define MP_CUDA(X)")
        config, declarations = config.split("#pragma once")[1] + "using namespace mp;", "#define LIST(X)" + declarations
    else:
        loader = (files("memplan.runtime") / "cuda_launch.cpp").read_text()
        declarations, config = loader.split("#define DRIVER(X)")[1].split("namespace driver")[:2]
        declarations = "#define LIST(X)" + declarations
        config = "namespace driver" + config.split("#define")[0] + "} using namespace driver;"
        config += "constexpr int starts_early" + loader.split("constexpr int starts_early")[1].split(";")[0] + ";"
    source = (
        "#include <cuda.h>\n#include <cstdint>\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
        'static_assert(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN == 97, "");\n'
        'static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8, "");\n'
        f"{config}\n"
        'static_assert(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION == starts_early, "");\n'
        f"{_LAYOUTS}"
        # a handle is a pointer, an enumeration an integer: the same in a register
        "template <class R, class... A, class S, class... B> constexpr bool alike(R (*)(A...), S (*)(B...)) {\n"
        "  return sizeof...(A) == sizeof...(B) && sizeof(R) == sizeof(S) && ((sizeof(A) == sizeof(B)) && ...);\n}\n"
        f"{declarations}\n"
        "#define CHECK(name, arguments) static_assert(alike((int32_t(*) arguments) nullptr, &::name), #name);\n"
        "LIST(CHECK)\n"
    )
    (tmp_path / "check.cpp").write_text(source)
    nvidia = Path(triton.backends.nvidia.__file__).parent / "include"
    torchs_own = Path(torch.__file__).parent / "include"
    command = [*find_toolchain().command, "-std=c++20", "-DUSE_CUDA", f"-I{nvidia}", f"-I{torchs_own}", "-fsyntax-only"]
    done = subprocess.run([*command, "check.cpp"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    (tmp_path / "check.cpp").write_text(source.replace("(cuCtxGetCurrent, (void**))", "(cuCtxGetCurrent, (int))"))
    assert subprocess.run([*command, "check.cpp"], cwd=tmp_path, capture_output=True, check=False).returncode != 0
