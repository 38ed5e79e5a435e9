"""Inputs that start anywhere: GPU kernels expect multiples of 16 bytes, CPU kernels expect nothing."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor, nn

from memplan.codegen.python_wrapper import print_python
from memplan.codegen.wrapper_lines import wrapper_lines
from memplan.ir.plan import Plan
from memplan.ir.program import Buffer, BufferKind, KernelOp, Phase, Program, TensorInput, View
from memplan.passes.schedule import make_plan
from memplan.runtime.python_runtime import aligned, namespace
from tests.models.against_eager import compare_trees
from tests.sample_kernels import F32, Builder, X


def at_byte(offset: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    """A tensor of random values whose first element lies ``offset`` bytes after a multiple of 64."""
    count = torch.Size(shape).numel()
    store = torch.empty(count * dtype.itemsize + 128, dtype=torch.uint8)
    start = -store.data_ptr() % 64 + offset
    out = store[start : start + count * dtype.itemsize].view(dtype).view(shape)
    assert out.data_ptr() % 64 == offset
    return out.copy_(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("strides", [(4, 1), (1, 3), (0, 1), (9, 2)])
def test_aligned_keeps_layout_and_values(strides: tuple[int, int]) -> None:
    store = at_byte(4, 64)
    tensor = torch.as_strided(store, (3, 4), strides, store.storage_offset())
    copy = aligned(tensor)
    assert copy.data_ptr() % 16 == 0
    assert copy.stride() == tensor.stride()
    assert torch.equal(copy, tensor)
    assert aligned(copy) is copy


N = 8


def add_into() -> KernelOp:
    """``a += b``."""
    k = Builder((N,))
    k.store("a", X[0], k.call("add", k.load("a", X[0]), k.load("b", X[0])))
    return KernelOp("add", k.done(), "cuda:0", (), mutates=("a",))


def double() -> KernelOp:
    """``out = b + b``."""
    k = Builder((N,))
    b = k.load("b", X[0])
    k.store("out", X[0], k.call("add", b, b))
    return KernelOp("double", k.done(), "cuda:0")


def gpu_program() -> Plan:
    view = {name: View(name, F32, (N,), (1,)) for name in ("a", "b", "c", "out")}
    kinds = {"out": BufferKind.OUTPUT}
    buffers = {n: Buffer(n, 4 * N, F32, "cuda:0", kinds.get(n, BufferKind.INPUT)) for n in view}
    inputs = tuple(TensorInput(k, view[n]) for k, n in enumerate(("a", "b", "c")))
    program = Program("p", Phase.INFERENCE, buffers, (add_into(), double()), inputs, (view["out"],))
    return make_plan(program, ("add", "double"), in_place={})


def floats(address: int) -> Tensor:
    assert address % 16 == 0, "a kernel was given an address that it does not expect"
    return torch.frombuffer((ctypes.c_float * N).from_address(address), dtype=F32)


def run(*inputs: Tensor) -> tuple[Tensor, str]:
    """The wrapper of `gpu_program`, with tensors of the CPU and kernels in Python that check their addresses."""
    kernels = {"k_add": ("a", "b"), "k_double": ("b", "out")}
    plan = gpu_program()
    arguments = {name: (f"k_{name}", kernels[f"k_{name}"], ()) for name in plan.order}
    wrapper = print_python(wrapper_lines(plan, arguments))

    def k_add(stream: int, a: int, b: int) -> None:
        floats(a).add_(floats(b))

    def k_double(stream: int, b: int, out: int) -> None:
        floats(out).copy_(floats(b) * 2)

    names = namespace(wrapper.operators, {}, {}, {"k_add": k_add, "k_double": k_double})
    names |= {"empty_cuda": names["empty_cpu"], "current_stream": lambda index: 0}
    exec(wrapper.source, names)
    (out,) = names["call"](list(inputs))  # type: ignore[operator]
    return out, wrapper.source


@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (0, 8), (12, 4)])
def test_gpu_kernels_get_aligned_addresses_and_changes_arrive(offsets: tuple[int, int]) -> None:
    a, b, c = at_byte(offsets[0], N), at_byte(offsets[1], N), at_byte(4, N)
    expected, before = a + b, b.clone()
    out, source = run(a, b, c)
    assert torch.equal(a, expected), "the input itself has to change"
    assert torch.equal(b, before)
    assert torch.equal(out, before * 2)
    assert "c.data_ptr()" not in source, "no kernel uses it"


class Wide(nn.Module):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        y.add_(1)
        return torch.softmax(x, 1), x.sum(0), (x + y).to(z.dtype) * z, z.float().mean(1), (z > 0).sum(1)


@pytest.mark.parametrize("offset", [4, 20])
def test_cpu_kernels_take_any_address(offset: int) -> None:
    """Vector instructions of CPU kernels must be those for addresses of any kind (others would crash)."""
    x, y = at_byte(offset, 33, 65), at_byte(offset + 4, 33, 65)
    z = at_byte(2, 33, 65, dtype=torch.bfloat16)
    theirs = [t.clone() for t in (x, y, z)]
    expected = Wide()(*theirs)
    actual = torch.compile(Wide(), backend="memplan")(x, y, z)
    compare_trees(actual, expected, "result")
    compare_trees([x, y, z], theirs, "input")
