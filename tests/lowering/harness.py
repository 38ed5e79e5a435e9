"""One ATen call as a program of one extern, lowered, run by the reference evaluator, and compared with eager.

`LoweringMode` does this to every ATen call that is dispatched inside of it (after memplan's decompositions), so that
any piece of torch code is a test of all the lowerings it comes to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.ir.config import Config
from memplan.ir.program import (
    Argument,
    Buffer,
    BufferKind,
    Contract,
    Extern,
    KernelOp,
    Literal,
    Operation,
    Phase,
    Program,
    Tuple,
    View,
    evaluate,
)
from memplan.ir.verify_kernel import verify_kernel
from memplan.lowering.decompositions import decomposition_table
from memplan.lowering.lower import lower_program
from tests.reference_kernel import run_reference

TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


class _Storages:
    """Buffers of a call by the storage they lie in."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.buffers: dict[str, Buffer] = {}
        self.contents: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[int, torch.dtype], str] = {}

    def view(self, tensor: torch.Tensor, kind: BufferKind) -> View:
        storage = tensor.untyped_storage()
        # an empty storage has no address of its own
        key = (storage.data_ptr() or id(tensor), tensor.dtype)
        name = self._names.get(key)
        if name is None:
            name = f"{'arg' if kind is BufferKind.INPUT else 'out'}{len(self.buffers)}"
            self._names[key] = name
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,))
            self.contents[name] = flat.clone() if kind is BufferKind.INPUT else poisoned_like(flat)
            self.buffers[name] = Buffer(name, flat.numel() * flat.itemsize, tensor.dtype, self.device, kind)
        return View(name, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())

    def argument(self, value: object) -> Argument:
        if isinstance(value, torch.Tensor):
            return self.view(value, BufferKind.INPUT)
        if isinstance(value, (list, tuple)):
            return Tuple(tuple(self.argument(v) for v in value))
        return Literal(value)  # type: ignore[arg-type]


def poisoned_like(flat: torch.Tensor) -> torch.Tensor:
    """A pattern that nobody computes, so that an element that was not written shows."""
    out = torch.empty_like(flat)
    out.view(torch.uint8).fill_(0x77 if flat.dtype is not torch.bool else 1)
    return out


@dataclass
class Call:
    """A call as a program, and eager's answer."""

    program: Program
    contents: dict[str, torch.Tensor]
    expected: list[torch.Tensor | None]
    results: list[View | None]


def make_call(
    overload: torch._ops.OpOverload,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    expected: object,
    device: str = "cpu",
) -> Call:
    """The program of one extern call whose results lie as eager's ``expected`` do."""
    storages = _Storages(device)
    arguments = tuple(storages.argument(a) for a in args)
    named = tuple((k, storages.argument(v)) for k, v in kwargs.items())
    flat = list(expected) if isinstance(expected, (list, tuple)) else [expected]
    tensors = [t if isinstance(t, torch.Tensor) else None for t in flat]
    results = [None if t is None else storages.view(t, BufferKind.OUTPUT) for t in tensors]
    op = Extern("call", str(overload), arguments, named, tuple(results), Contract.FRESH, device)
    outputs = tuple(v for v in results if v is not None)
    program = Program("test", Phase.INFERENCE, storages.buffers, (op,), (), outputs)
    return Call(program, storages.contents, tensors, results)


def run_kernels(
    operations: Sequence[Operation],
    program: Program,
    contents: dict[str, torch.Tensor],
    hints: Mapping[sympy.Symbol, int],
) -> None:
    """Verify and run each kernel; temporaries are made, poisoned."""
    for name, buffer in program.buffers.items():
        if name not in contents:
            count = evaluate(buffer.nbytes, hints) // buffer.dtype.itemsize
            contents[name] = poisoned_like(torch.empty(count, dtype=buffer.dtype))
    for op in operations:
        assert isinstance(op, KernelOp)
        verify_kernel(op.kernel, program.buffers, hints, name=op.name)
        run_reference(op.kernel, contents, hints)


def lowered(call: Call, config: Config | None = None) -> tuple[Operation, ...] | None:
    """The kernels, or None where the call stays extern."""
    program = lower_program(call.program, config or Config())
    return None if any(isinstance(op, Extern) for op in program.operations) else program.operations


def check(overload: torch._ops.OpOverload, *args: object, **kwargs: object) -> tuple[Operation, ...] | None:
    """Lower the call, run it by the reference evaluator, compare with eager.

    Returns the kernels, or None where the call stays extern.
    """
    return check_call(overload, args, kwargs, overload(*args, **kwargs))


def check_call(
    overload: torch._ops.OpOverload,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    expected: object,
    device: str = "cpu",
) -> tuple[Operation, ...] | None:
    """As `check`, with eager's answer given, and as if on ``device``."""
    call = make_call(overload, args, kwargs, expected, device)
    program = lower_program(call.program, Config())
    if any(isinstance(op, Extern) for op in program.operations):
        return None
    run_kernels(program.operations, program, call.contents, {})
    if not program.operations and "empty" in str(overload):
        return ()
    for k, (view, want) in enumerate(zip(call.results, call.expected, strict=True)):
        if view is None or want is None:
            continue
        got = call.contents[view.buffer].as_strided(want.shape, want.stride(), want.storage_offset())
        compare(got, want, f"result {k} of {overload}")
    return program.operations


def compare(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    rtol, atol = TOLERANCE.get(want.dtype, (0, 0))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}")


@dataclass
class LoweringMode(TorchDispatchMode):
    """Checks every ATen call that is dispatched; eager's results go on.

    ``lowered`` and ``extern`` count operators; ``failures`` are messages by operator, collected where ``collect``.
    """

    collect: bool = False
    device: str = "cpu"
    largest: int = 1 << 16
    lowered: Counter[str] = field(default_factory=Counter)
    extern: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.table = decomposition_table(Config())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in self.table:
            with self:
                out = self.table[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        expected = func(*args, **kwargs)
        if self.is_plain(func, args, kwargs, expected):
            self.check(func, args, kwargs, expected)
        return expected

    def is_plain(self, func, args, kwargs, expected) -> bool:  # type: ignore[no-untyped-def]
        """Functional calls with fresh dense results, of a size that the evaluator can manage."""
        if func._schema.is_mutable or any(a.alias_info is not None for a in func._schema.returns):
            return False
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, expected)) if isinstance(t, torch.Tensor)]
        if not any(isinstance(t, torch.Tensor) for t in torch.utils._pytree.tree_leaves(expected)):
            return False
        return all(
            t.layout is torch.strided and type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors
        ) and all(t.numel() <= self.largest for t in tensors)

    def check(self, func, args, kwargs, expected) -> None:  # type: ignore[no-untyped-def]
        try:
            with torch.no_grad():
                found = check_call(func, args, kwargs, expected, self.device)
        except Exception as error:
            if not self.collect:
                raise
            self.failures.append((str(func), f"{type(error).__name__}: {str(error)[:600]}"))
            return
        (self.extern if found is None else self.lowered)[str(func)] += 1
