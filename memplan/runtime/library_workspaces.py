"""cuBLAS' workspaces made before a step, not in the middle of its first one.

Each thread that multiplies matrices has a cuBLAS handle, and torch gives a handle on a stream a workspace (32 MiB on an
H100) out of the caching allocator, at its first product, for good. Made inside a step it lies across a segment that
later steps would need whole, and they reserve another one: what a plan was predicted to reserve no longer holds. So
both workspaces of a training step, that of the thread that runs the forward and that of autograd's, are there before
the step's first allocation, as parameters are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch._dynamo import compiled_autograd

from ..ir.program import Extern, Program
from .current_device import Call, gpu_index

#: Operators, without namespace and overload, that cuBLAS runs.
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "_scaled_mm", "mv", "addmv", "dot", "vdot", "linear"})

#: (thread, GPU, stream, whether autograd's thread has its own, too) whose workspaces are there
_there: set[tuple[int, int, int, bool]] = set()


def product_gpus(program: Program) -> frozenset[int]:
    """The GPUs on which a program may call cuBLAS."""
    return frozenset(
        gpu_index(op.device)
        for op in program.operations
        if isinstance(op, Extern) and op.device.startswith("cuda") and _name(op.target) in PRODUCTS
    )


def _name(target: str) -> str:
    """Of ``aten.mm.default``: ``mm``."""
    return target.partition(".")[2].partition(".")[0]


def with_workspaces(call: Call, gpus: Callable[[], frozenset[int]], *, trains: bool) -> Call:
    """The call, before which cuBLAS has its workspaces on the current streams.

    Parameters
    ----------
    gpus:
        Where they are wanted; asked at the first call, when the backward is known as well.
    trains:
        Whether a backward follows, in autograd's thread.
    """
    if not torch.cuda.is_available():
        return call
    wanted: list[int] | None = None
    thread, stream = threading.get_ident, torch._C._cuda_getCurrentRawStream

    def run(args: list[object]) -> object:
        nonlocal wanted
        if wanted is None:
            wanted = sorted(gpus())
        for gpu in wanted:
            key = (thread(), gpu, stream(gpu), trains)
            if key not in _there and not torch.cuda.is_current_stream_capturing():
                make_workspaces(gpu, trains)
                _there.add(key)
        return call(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def make_workspaces(gpu: int, trains: bool) -> None:
    """Have cuBLAS' workspace of this thread and, with ``trains``, of autograd's thread on a GPU's current stream."""
    with torch.cuda.device(gpu), torch.enable_grad():
        _make_current(torch.empty(1, device=f"cuda:{gpu}"))
        if trains:
            given = torch.empty(1, device=f"cuda:{gpu}", requires_grad=True)
            with compiled_autograd._disable():
                torch.autograd.grad(_InBackward.apply(given), given)  # type: ignore[no-untyped-call]


def _make_current(on_gpu: torch.Tensor) -> None:
    """The workspace of this thread. Torch looks for the thread's context first, which a launch has made current."""
    on_gpu.detach().fill_(0.0)
    torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]


class _InBackward(torch.autograd.Function):
    """Its backward runs where autograd runs those of compiled models, on the stream of its forward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        _make_current(gradient.clone())
        return gradient
