"""What the Python wrapper's text calls: allocation, views, operators, kernels, poison."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._C._dynamo.guards import _empty_strided_cpu, _reinterpret_tensor  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from memplan.ir.errors import IndexOutOfRangeError

from .convolution import convolution_out

#: Byte that poison mode writes over what the plan calls free: a NaN in every floating dtype, a large odd integer.
POISON = 0xFF


def allocate_pool(nbytes: int, device: str) -> torch.Tensor:
    """One uninitialised allocation of ``nbytes`` bytes."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def in_pool(
    pool: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], offset: int
) -> torch.Tensor:
    """The tensor at ``offset`` bytes of a pool; the offset is a multiple of the item size."""
    return _reinterpret_tensor(pool.view(dtype), sizes, strides, offset // dtype.itemsize)  # type: ignore[no-any-return]


def reinterpret_as(
    tensor: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], offset_bytes: int
) -> torch.Tensor:
    """A tensor of another dtype on the same storage, ``offset_bytes`` after the given tensor's first element."""
    if tensor.dtype == dtype:
        return _reinterpret_tensor(tensor, sizes, strides, offset_bytes // dtype.itemsize)  # type: ignore[no-any-return]
    start = tensor.storage_offset() * tensor.element_size() + offset_bytes
    out = torch.empty(0, dtype=dtype, device=tensor.device)
    return out.set_(tensor.untyped_storage(), start // dtype.itemsize, tuple(sizes), tuple(strides))


def laid_out(tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """A fresh result in the layout that the plan was made for: itself, or a copy where the operator chose another.

    Raises
    ------
    RuntimeError
        If the operator returned another shape than it did when it was traced.
    """
    if tensor.stride() == strides and tensor.shape == sizes:
        return tensor
    if tuple(tensor.shape) != tuple(sizes):
        raise RuntimeError(f"an operator returned shape {tuple(tensor.shape)} where {tuple(sizes)} was traced")
    if all(n <= 1 or a == b for n, a, b in zip(sizes, tensor.stride(), strides, strict=True)):
        return tensor
    out = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
    return out.copy_(tensor)


#: What GPU kernels are built to expect of every address, in bytes: Triton then loads 16 bytes at once.
ALIGNMENT = 16


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy with the same sizes and strides if its first element is not at a multiple of 16 bytes."""
    if tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0:
        return tensor
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.as_strided(tensor.detach(), (extent,), (1,)).clone()  # gaps and overlaps are kept
    return torch.as_strided(flat, tensor.shape, tensor.stride(), 0)


def laid_out_aligned(tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """`laid_out` for results that may start anywhere in somebody's allocation."""
    return aligned(laid_out(tensor, sizes, strides))


def in_flight(tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """What a collective is still writing, which nobody may copy.

    Raises
    ------
    RuntimeError
        If the operator returned another shape or layout than it did when it was traced.
    """
    same = all(n <= 1 or a == b for n, a, b in zip(sizes, tensor.stride(), strides, strict=True))
    if tuple(tensor.shape) != tuple(sizes) or (tensor.numel() and not same) or tensor.data_ptr() % ALIGNMENT:
        raise RuntimeError(
            f"a collective returned shape {tuple(tensor.shape)} with strides {tensor.stride()} where {tuple(sizes)} "
            f"with {tuple(strides)} was traced"
        )
    return tensor


_zeros: dict[tuple[str, int], torch.Tensor] = {}


def zero_workspace(nbytes: int, device: str, stream: int) -> torch.Tensor:
    """A workspace of zeros for kernels of one stream that leave it zero, so that it is filled only when it is made.

    Kernels of a stream run one after another, so one workspace serves all of them; it grows to the largest. A CUDA
    graph that is being recorded gets one of its own, which every replay fills: it may run on any stream.
    """
    if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    found = _zeros.get((device, stream))
    if found is None or found.numel() < nbytes:
        found = _zeros[device, stream] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return found


def left_zero(workspace: torch.Tensor, name: str) -> None:
    """In poison mode: what a kernel promises to leave zero is zero.

    Raises
    ------
    RuntimeError
        Naming the workspace.
    """
    if workspace.any():
        workspace.zero_()
        raise RuntimeError(f"a kernel left its workspace {name} dirty: every byte has to be zero again")


def poison_tensor(tensor: torch.Tensor) -> None:
    """Overwrite every byte of the tensor's own elements."""
    if tensor.numel() == 0:
        return
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.as_strided(tensor.detach(), (extent,), (1,), tensor.storage_offset())
    flat.view(torch.uint8).fill_(POISON)


def poison_range(pool: torch.Tensor, offset: int, nbytes: int) -> None:
    """Overwrite bytes ``[offset, offset + nbytes)`` of a pool."""
    pool[offset : offset + nbytes].fill_(POISON)


def all_in_range(message: bytes | None, where: str) -> None:
    """What a kernel that checks indices returned.

    Raises
    ------
    IndexOutOfRangeError
        If an index was out of range; ``where`` names the operator and the user's line.
    """
    if message is not None:
        raise IndexOutOfRangeError(message.decode(), where=where)


def raise_out_of_range(address: int, where: str) -> None:
    """The same for a message that C++ has: its address."""
    all_in_range(ctypes.string_at(address), where)


def flatten(value: object) -> list[object]:
    """The flat results of an operator."""
    return pytree.tree_leaves(value)


#: Operators that have a function of their own, which takes half the time of a call through ``torch.ops``.
BOUND: Mapping[str, Callable[..., object]] = {
    "aten.mm.out": torch.mm,
    "aten.addmm.out": torch.addmm,
    "aten.bmm.out": torch.bmm,
    "aten.baddbmm.out": torch.baddbmm,
    "memplan.convolution.out": convolution_out,
}


def find_operator(target: str, callables: Mapping[str, object]) -> Callable[..., object]:
    """The operator that ``namespace.name.overload`` or ``callable:<key>`` names."""
    if target.startswith("callable:"):
        return callables[target.removeprefix("callable:")]  # type: ignore[return-value]
    if target in BOUND:
        return BOUND[target]
    namespace, name, overload = target.split(".")
    found: Callable[..., object] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


def namespace(
    operators: Mapping[str, str],
    callables: Mapping[str, object],
    constants: Mapping[str, torch.Tensor],
    kernels: Mapping[str, Callable[..., object]],
) -> dict[str, object]:
    """Global names of a Python wrapper."""
    names: dict[str, object] = {
        "torch": torch,
        "device": torch.device,
        "allocate_pool": allocate_pool,
        "in_pool": in_pool,
        "reinterpret": _reinterpret_tensor,
        "reinterpret_as": reinterpret_as,
        "aligned": aligned,
        "in_flight": in_flight,
        "laid_out": laid_out,
        "laid_out_aligned": laid_out_aligned,
        "zero_workspace": zero_workspace,
        "left_zero": left_zero,
        "poison_tensor": poison_tensor,
        "poison_range": poison_range,
        "flatten": flatten,
        "all_in_range": all_in_range,
        "raise_out_of_range": raise_out_of_range,
        "empty_cpu": _empty_strided_cpu,
        **{name: find_operator(target, callables) for name, target in operators.items()},
        **{name: aligned(constant) for name, constant in constants.items()},
        **kernels,
    }
    if torch.cuda.is_available():
        from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

        names["empty_cuda"] = _empty_strided_cuda
        names["current_stream"] = torch._C._cuda_getCurrentRawStream
    return names
